"""bitsandbytes: `quantize_4bit` in blocks of 64, NF4 (block scales quantized or not) and FP4."""

from functools import partial

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from contract import Quantized, Variant, nbytes_of, run
from torch import Tensor


def quantize(weight: Tensor, rank: int, kind: str, double: bool) -> Quantized:
    """Quantize a matrix."""
    packed, state = quantize_4bit(
        weight.bfloat16(), blocksize=64, quant_type=kind, compress_statistics=double
    )
    stored = [value for value in state.as_dict().values() if isinstance(value, torch.Tensor)]
    return Quantized(dequantize_4bit(packed, state).float(), nbytes_of([packed, *stored]))


run(
    Variant("NF4", partial(quantize, kind="nf4", double=False)),
    Variant("NF4, double", partial(quantize, kind="nf4", double=True)),
    Variant("FP4", partial(quantize, kind="fp4", double=False)),
)
