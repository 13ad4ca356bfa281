"""Which values cannot be stored: those that are no numbers, and those that fp32 does not hold."""

import math

import torch
from torch import Tensor

from loraq.errors import FormatError

#: What to do about a weight that is to be quantized.
_ADVICE = (
    "Every value must be a finite number. Repair the source, download it again, or leave the layer "
    "as it is (a rule with `skip = true`)."
)


def require_finite(x: Tensor, what: str) -> None:
    """Raise `FormatError` that names the first value that is NaN, infinite, or beyond fp32."""
    if fault := _find_extreme(x, torch.finfo(torch.float32).max):
        raise FormatError(f"Cannot quantize to '{what}': {fault}. {_ADVICE}")


def find_fault(weight: Tensor) -> str | None:
    """Return why a float weight cannot be quantized, or `None`; runs at the memory's speed.

    It is converted to fp32, which must hold its largest values. A tiny value among normal ones is
    no fault.
    """
    if not weight.is_floating_point() or not weight.numel():
        return None
    if fault := _find_extreme(weight, torch.finfo(torch.float32).max):
        return f"{fault}. {_ADVICE}"
    least, most = weight.detach().aminmax()
    largest, smallest = max(-least.item(), most.item()), torch.finfo(torch.float32).tiny
    if largest == 0 or largest >= smallest:
        return None
    return (
        f"the largest magnitude is {largest:.3g}, below the normal numbers of fp32 "
        f"({smallest:.3g}), so that nothing of the weight would be left. Scale it, set it to zero, "
        "or keep it in floats."
    )


def find_not_finite(x: Tensor) -> str | None:
    """Return which value of a tensor is the first that is NaN or infinite, or `None`."""
    if not x.is_floating_point():
        return None
    x = x if x.dtype.itemsize > 1 else x.bfloat16()  # no order is known of 8-bit floats
    return _find_extreme(x, torch.finfo(x.dtype).max)


def _find_extreme(x: Tensor, limit: float) -> str | None:
    """Return which value is the first that is NaN or larger than a limit, or `None`."""
    if not x.numel():
        return None
    # A NaN makes both the smallest and the largest value NaN.
    least, most = x.detach().aminmax()
    if -limit <= least.item() and most.item() <= limit:
        return None
    wrong = ~(x.abs() <= limit)
    index = tuple(int(i) for i in wrong.nonzero()[0])
    value = x[index].item()
    kind = f"beyond {limit:.3g}, the largest of fp32" if math.isfinite(value) else "not finite"
    return (
        f"the value at {index} is {value}, and {int(wrong.sum())} of {x.numel()} values are {kind}"
    )
