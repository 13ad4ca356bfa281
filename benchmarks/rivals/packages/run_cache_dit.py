"""cache-dit's SVDQuant without data: identity smoothing, INT4 in groups of 64.

It runs one-shot and with 10 refinements.

The public interface wants CUDA, so these are functions inside the package: bytes are those of the
state that it packs, smoothing vectors included; values are those of its own simulation of what is
packed. Ranks are multiples of 16.
"""

from functools import partial

import torch
from cache_dit.quantization.svdquant import quantizer
from contract import Quantized, Variant, linear, nbytes_of, run
from torch import Tensor


def quantize(weight: Tensor, rank: int, rounds: int, precision: str) -> Quantized:
    """Split a weight, and refine the split `rounds` times."""
    bf16 = torch.bfloat16
    math = quantizer._resolve_math_dtype(bf16, precision)
    ones = torch.ones(weight.shape[1])
    common = {"precision": "int4", "calibrate_precision": precision, "torch_dtype": bf16}
    packed = quantizer._quantize_from_smooth_scale(
        linear(weight), ones, rank=rank, device="cpu", return_state_dict=True, **common
    )
    down, up, residual = quantizer._refine_lowrank_split(
        weight.to(bf16).to(math), rank, refine_iters=rounds, math_dtype=math, **common
    )
    main = quantizer._fake_quantize_dequantize_residual(
        residual, precision="int4", math_dtype=math, torch_dtype=bf16
    )
    return Quantized(main.float(), nbytes_of(packed.values()), up.float() @ down.float())


run(
    Variant("INT4 g64 SVD", partial(quantize, rounds=0, precision="low")),
    Variant("INT4 g64 SVD, 10 refinements", partial(quantize, rounds=10, precision="low")),
    Variant(
        "INT4 g64 full SVD, 10 refinements",
        partial(quantize, rounds=10, precision="medium"),
        slow=True,
    ),
)
