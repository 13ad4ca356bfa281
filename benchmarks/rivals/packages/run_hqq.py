"""HQQ through `HQQLinear`: half-quadratic fit, 4 bits, scales and zero points in bf16."""

from functools import partial

import torch
from contract import Quantized, Variant, linear, nbytes_of, run
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor


def quantize(weight: Tensor, rank: int, group_size: int) -> Quantized:
    """Quantize groups along the input axis."""
    config = BaseQuantizeConfig(nbits=4, group_size=group_size, axis=1)
    layer = HQQLinear(linear(weight), config, compute_dtype=torch.bfloat16, device="cpu")
    nbytes = nbytes_of([layer.W_q, layer.meta["scale"], layer.meta["zero"]])
    return Quantized(layer.dequantize().float(), nbytes)


run(*(Variant(f"4-bit g{size}", partial(quantize, group_size=size)) for size in (64, 128)))
