"""Which parameters of three axes are stacks of experts, and how they lie."""

import pytest
import torch
from torch import nn

from loraq.layers import find_stacks, linear_layers, matrix_shapes, other_weights
from loraq.stacks import Stack, stacks_in


class Holder(nn.Module):
    """A module with parameters of given shapes and nothing else."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def test_a_fused_gate_tells_how_the_stacks_lie():
    # (experts, 2 inner, width) and (experts, width, inner): for `linear`.
    plain = Holder(gate_up_proj=(3, 12, 8), down_proj=(3, 8, 6))
    assert stacks_in(plain) == {
        "down_proj": Stack((3, 8, 6), transposed=False),
        "gate_up_proj": Stack((3, 12, 8), transposed=False),
    }
    # (experts, width, 2 inner) and (experts, inner, width): for `x @ weight`.
    transposed = Holder(gate_up_proj=(3, 8, 12), down_proj=(3, 6, 8))
    assert stacks_in(transposed) == {
        "down_proj": Stack((3, 8, 6), transposed=True),
        "gate_up_proj": Stack((3, 12, 8), transposed=True),
    }


def test_names_do_not_matter():
    assert set(stacks_in(Holder(w2=(3, 8, 6), w1=(3, 12, 8)))) == {"w1", "w2"}


@pytest.mark.parametrize("width", [4, 6, 8, 12, 24])
def test_no_width_makes_a_fused_gate_ambiguous(width):
    for transposed in (False, True):
        up, down = ((3, 12, width), (3, width, 6))
        shapes = [(n, b, a) if transposed else (n, a, b) for n, a, b in (up, down)]
        found = stacks_in(Holder(up=shapes[0], down=shapes[1]))
        assert {stack.transposed for stack in found.values()} == {transposed}


def test_experts_of_transformers_say_it():
    class Declared(Holder):
        is_transposed = True

        def _apply_gate(self) -> None:
            """What transformers gives its experts."""

    # Without a gate the shapes alone leave both readings.
    shapes = {"up_proj": (3, 6, 8), "down_proj": (3, 8, 6)}
    assert stacks_in(Holder(**shapes)) == {}
    assert stacks_in(Declared(**shapes))["up_proj"] == Stack((3, 8, 6), transposed=True)


@pytest.mark.parametrize(
    "shapes",
    [
        {"table": (1, 6, 8)},
        {"a": (3, 12, 8), "b": (4, 8, 6)},
        {"a": (3, 12, 8), "b": (3, 8, 7)},
        {"a": (3, 8, 8), "b": (3, 8, 8)},
        {"a": (3, 12, 8), "b": (3, 8, 6), "c": (3, 8, 6)},
        {"a": (12, 8), "b": (8, 6)},
    ],
)
def test_all_else_is_no_stack(shapes):
    assert stacks_in(Holder(**shapes)) == {}


def test_a_stack_is_the_last_child_of_its_module_and_no_other_weight():
    holder = Holder(gate_up_proj=(3, 12, 8), down_proj=(3, 8, 6), table=(5, 5))
    holder.add_module("router", nn.Linear(8, 3))
    model = nn.ModuleDict({"experts": holder, "after": nn.Linear(8, 8)})
    assert list(matrix_shapes(model)) == [
        "experts.router",
        "experts.down_proj",
        "experts.gate_up_proj",
        "after",
    ]
    assert list(other_weights(model)) == ["experts.table"]
    assert set(find_stacks(model)) | set(linear_layers(model)) == set(matrix_shapes(model))


def test_a_model_may_be_the_holder_itself():
    assert set(find_stacks(Holder(a=(3, 12, 8), b=(3, 8, 6)))) == {"a", "b"}
