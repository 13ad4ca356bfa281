"""Tensors that converters make are read expert by expert: what of the file is read for each."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loraq.integrations.deferred import Deferred, DeferredReader, stand_in

EXPERTS = 3


class CountingFiles:
    """Tensors of a file, and what of them was read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.was_read: list[tuple[str, int | None]] = []

    names = property(lambda self: list(self.tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> str:
        return "F32"

    def read(self, name: str) -> Tensor:
        self.was_read.append((name, None))
        return self.tensors[name].clone()

    def read_slice(self, name: str, index: int) -> Tensor:
        self.was_read.append((name, index))
        return self.tensors[name][index].clone()


def join_gates(files: dict) -> Tensor:
    """Do as transformers does to experts that are stored one by one."""
    gates = torch.stack([files[f"gate.{i}"] for i in range(EXPERTS)], dim=0)
    return torch.cat([gates, torch.stack([files[f"up.{i}"] for i in range(EXPERTS)])], dim=1)


MADE: dict[str, tuple[Callable[[dict], Tensor], list[tuple[str, int | None]]]] = {
    "stacked": (
        lambda files: torch.stack([files[f"up.{i}"] for i in range(EXPERTS)]),
        [("up.1", None)],
    ),
    "stacked and joined": (join_gates, [("gate.1", None), ("up.1", None)]),
    "as stored": (lambda files: files["stack"], [("stack", 1)]),
    "turned": (
        lambda files: torch.transpose(files["stack"], dim0=1, dim1=2).contiguous(),
        [("stack", 1)],
    ),
    "turned in place": (lambda files: files["stack"].transpose(-1, -2), [("stack", 1)]),
    "stacked and turned": (
        lambda files: join_gates(files).transpose(1, 2).contiguous(),
        [("gate.1", None), ("up.1", None)],
    ),
    # Here each expert is in every part: no less can be read.
    "turned to the front": (lambda files: files["stack"].transpose(0, 1), [("stack", None)]),
    "joined along the experts": (
        lambda files: torch.cat([files["stack"], files["stack"]], dim=0),
        [("stack", None), ("stack", None)],
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_of_a_stack_only_the_expert_that_is_asked_for_is_read(name):
    torch.manual_seed(0)
    tensors = {f"{kind}.{i}": torch.randn(4, 6) for kind in ("gate", "up") for i in range(EXPERTS)}
    tensors["stack"] = torch.randn(EXPERTS, 4, 6)
    make, wanted = MADE[name]
    files = CountingFiles(tensors)
    made = make({name: stand_in(files, name) for name in files.names})
    assert isinstance(made, Deferred)
    reader = DeferredReader({"weight": made}, ())
    assert files.was_read == []
    expert = reader.read_slice("weight", 1)
    assert torch.equal(expert, make(tensors)[1])
    assert expert.is_contiguous()
    assert files.was_read == wanted
