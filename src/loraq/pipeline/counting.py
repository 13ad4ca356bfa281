"""How large a model is, and what it stores outside of the weights that are quantized."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from loraq.layers import is_linear
from loraq.nn import QuantizedLayer


@dataclass(frozen=True)
class ComponentSize:
    """How large a model of a pipeline is, with all that is in it and not in linear layers."""

    name: str
    class_name: str
    #: Bytes of all its weights in bf16.
    nbytes_bf16: int
    #: Bytes after the run; `None` if it is left as it is.
    nbytes: int | None = None
    #: What they would be if it were quantized; `None` if it is, or if that is not known.
    if_quantized: int | None = None


def list_beside(
    model: nn.Module, names: Collection[str]
) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield all that a model stores beside the weights of these names: owner, name and tensor."""
    places = (name.rpartition(".") for name in names)
    weights = {(model.get_submodule(owner), leaf) for owner, _, leaf in places}
    # What computes a weight (`parametrize`) goes with it.
    inner = {part for owner, _ in weights if is_linear(owner) for part in owner.modules()}
    inner -= {owner for owner, _ in weights}
    seen: set[int] = set()
    for place, module in model.named_modules():
        for name, tensor in (module._parameters | module._buffers).items():
            is_new_bytes = (module, name) in weights or module in inner
            is_lost = name in module._non_persistent_buffers_set
            if tensor is None or is_new_bytes or is_lost or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield module, f"{place}.{name}" if place else name, tensor


def count_beside(model: nn.Module, names: Collection[str]) -> tuple[int, int]:
    """Return numbers and bytes of all that a model stores beside the weights of these names.

    A layer that is quantized already counts with the numbers that its bytes stand for.
    """
    quantized = (module for module in model.modules() if isinstance(module, QuantizedLayer))
    numbers, nbytes = sum(math.prod(layer.packed_shape) for layer in quantized), 0
    for module, name, tensor in list_beside(model, names):
        nbytes += tensor.nbytes
        is_packed = isinstance(module, QuantizedLayer) and name.rpartition(".")[2] != "bias"
        numbers += 0 if is_packed else tensor.numel()
    return numbers, nbytes
