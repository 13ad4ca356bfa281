"""comfy-kitchen (Apache-2.0): the formats that ComfyUI runs, by its own eager functions.

ConvRot INT4 has one scale a row and multiplies 4-bit codes of both sides; W4A8 looks 4-bit codes up
in a Lloyd-Max table with FP8 scales every 16 values. Both rotate weight and input by regular
Hadamard blocks, whose side is the largest power of four that divides the width, at most 256.
"""

from comfy_kitchen.tensor.convrot_w4a4 import (
    dequantize_convrot_w4a4_weight,
    quantize_convrot_w4a4_weight,
)
from comfy_kitchen.tensor.w4a8_int8 import dequantize_w4a8_int8_weight, quantize_w4a8_int8_weight
from contract import Quantized, Variant, nbytes_of, run
from torch import Tensor, float32


def side_of(weight: Tensor) -> int:
    """Return the side of the Hadamard blocks."""
    return next(side for side in (256, 64, 16, 4) if weight.shape[1] % side == 0)


def convrot(weight: Tensor, rank: int) -> Quantized:
    """Rotate, and round to INT4 with one scale a row."""
    side = side_of(weight)
    codes, scales = quantize_convrot_w4a4_weight(weight, convrot_groupsize=side)
    main = dequantize_convrot_w4a4_weight(codes, scales, convrot_groupsize=side)
    return Quantized(main, nbytes_of([codes, scales]), splits=False)


def lloyd_max(weight: Tensor, rank: int) -> Quantized:
    """Rotate, and look up in a table."""
    side = side_of(weight)
    codes, relative, channel, correction, table = quantize_w4a8_int8_weight(
        weight, convrot_groupsize=side
    )
    main = dequantize_w4a8_int8_weight(
        codes, relative, channel, table, correction, convrot_groupsize=side, output_dtype=float32
    )
    stored = [t for t in (codes, relative, channel, table, correction) if t is not None]
    return Quantized(main, nbytes_of(stored), splits=False)


run(Variant("ConvRot INT4", convrot), Variant("W4A8 Lloyd-Max g16", lloyd_max))
