"""How large a model is, and what it stores outside of the weights that are quantized."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

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


def count_beside(model: nn.Module, names: Collection[str]) -> tuple[int, int]:
    """Return numbers and bytes of all that a model stores beside the weights of these names.

    A layer that is quantized already counts with the numbers that its bytes stand for.
    """
    places = (name.rpartition(".") for name in names)
    weights = {(model.get_submodule(owner), leaf) for owner, _, leaf in places}
    # What computes a weight (`parametrize`) goes with it.
    inner = {part for owner, _ in weights if is_linear(owner) for part in owner.modules()}
    inner -= {owner for owner, _ in weights}
    seen: set[int] = set()
    numbers = nbytes = 0
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            numbers += math.prod(module.packed_shape)
        for name, tensor in (module._parameters | module._buffers).items():
            is_new_bytes = (module, name) in weights or module in inner
            is_lost = name in module._non_persistent_buffers_set
            if tensor is None or is_new_bytes or is_lost or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            nbytes += tensor.nbytes
            is_packed = isinstance(module, QuantizedLayer) and name != "bias"
            numbers += 0 if is_packed else tensor.numel()
    return numbers, nbytes
