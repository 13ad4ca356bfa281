"""Factors of a branch in 16 or 32 bits: whether that is exact, LoRAs stacked on them, padding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraq.errors import ExportError
from loraq.exports.layer import Factors, Head
from loraq.formats import CastFormat, Format
from loraq.formats.block import BlockFormat
from loraq.integrations.lora import Adapter
from loraq.packed import PackedWeight

#: Significant bits that a block scale adds to an element's, for scales of few.
_OF_SCALE = {"e8m0": 0, "e4m3": 4}
#: Bits of the significand, the leading one included.
_SIGNIFICANT = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


def build_factors(packed: PackedWeight, adapters: Sequence[Adapter]) -> Factors | None:
    """Return the branch of a layer in fp32, LoRAs stacked onto it: `[U, scale·B] @ [D; A]`.

    The product is the sum of all products, without a rounding of its own.
    """
    ups, downs = [], []
    if packed.branch is not None:
        ups.append(packed.branch.proj_up.dequantize())
        downs.append(packed.branch.proj_down.dequantize())
    for adapter in adapters:
        ups.append(adapter.scale * adapter.up.float().flatten(1))
        downs.append(adapter.down.float().flatten(1))
    return Factors(torch.cat(ups, 1), torch.cat(downs, 0)) if ups else None


def cast_factors(branch: Factors, dtype: torch.dtype, name: str) -> Factors:
    """Return factors in a dtype.

    Raises:
        ExportError: a value is beyond the dtype.
    """
    cast = Factors(branch.up.to(dtype), branch.down.to(dtype))
    if not (cast.up.isfinite().all() and cast.down.isfinite().all()):
        raise ExportError(
            f"The branch of layer '{name}' has values beyond {str(dtype).removeprefix('torch.')}. "
            "Use `--dtype bfloat16`."
        )
    return cast


def pad_rank(branch: Factors | None, rank: int, shape: tuple[int, int]) -> Factors:
    """Return factors of a rank, the rest of which is zeros; of no branch, zeros alone."""
    if branch is None:
        return Factors(torch.zeros(shape[0], rank), torch.zeros(rank, shape[1]))
    more = rank - branch.rank
    up: Tensor = torch.nn.functional.pad(branch.up, (0, more))
    return Factors(up, torch.nn.functional.pad(branch.down, (0, 0, 0, more)))


def is_exact(fmt: Format, dtype: torch.dtype) -> bool:
    """Return whether every number of a format is one of a dtype, as far as the formats say.

    An element of few significant bits under a power of two is one of bf16, whose exponents reach
    as far as those of fp32, and so is one under an E4M3 scale of NVFP4, whose global scale is a
    power of two; fp16 is taken for too narrow unless the numbers are its own.
    """
    if dtype == torch.float32:
        return True
    if isinstance(fmt, CastFormat):
        return fmt.dtype == dtype
    if not isinstance(fmt, BlockFormat) or fmt.scale_format.name not in _OF_SCALE:
        return False
    element = fmt.element
    bits = element.mantissa_bits + 1 if element.is_float else element.bits - 1
    bits += _OF_SCALE[fmt.scale_format.name]
    return dtype == torch.bfloat16 and bits <= _SIGNIFICANT[dtype]


def explain_rounding(head: Head, dtype: torch.dtype) -> str:
    """Return what of a layer's branch a dtype rounds, in words; "" for nothing."""
    branch = head.scheme.branch
    name = str(dtype).removeprefix("torch.")
    if head.lora_rank and dtype != torch.float32:
        return f"LoRA rounded to {name}"
    if branch is None or is_exact(branch.weight_format, dtype):
        return ""
    return f"{branch.weight} factors rounded to {name}"
