"""Brevitas: symmetric INT4 in groups of 64, alone and with the SVD correction of its examples.

The correction runs for 1 and for 10 rounds.

It simulates: bytes are counted with bf16 scales and bf16 factors, to which scales and factors are
not rounded here.
"""

from functools import partial

import torch
from brevitas.nn import QuantLinear
from brevitas_examples.common.generative.quantizers import (
    IntWeightSymmetricGroupQuant,
    IntWeightSymmetricGroupQuantMSE,
)
from brevitas_examples.common.svd_quant import LayerwiseLowRankCorrection
from contract import Quantized, Variant, run
from torch import Tensor, nn


def quantize(
    weight: Tensor, rank: int, rounds: int, quantizer: type = IntWeightSymmetricGroupQuant
) -> Quantized:
    """Quantize a layer, and correct it `rounds` times."""
    layer = QuantLinear(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        weight_quant=quantizer,
        weight_bit_width=4,
        weight_group_size=64,
    )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    nbytes = weight.numel() // 2 + weight.numel() // 64 * 2
    if not rounds:
        return Quantized(layer.quant_weight().value, nbytes)
    model, _ = LayerwiseLowRankCorrection(nn.Sequential(layer)).apply(
        rank=rank, iters=rounds, dtype=torch.float32
    )
    corrected = model[0]
    branch = corrected.correction.l2.weight @ corrected.correction.l1.weight
    return Quantized(
        corrected.layer.quant_weight().value, nbytes + 2 * rank * sum(weight.shape), branch
    )


run(
    Variant("INT4 g64", partial(quantize, rounds=0), counted="as packed"),
    Variant(
        "INT4 g64 MSE",
        partial(quantize, rounds=0, quantizer=IntWeightSymmetricGroupQuantMSE),
        counted="as packed",
    ),
    Variant("INT4 g64 SVD x1", partial(quantize, rounds=1), counted="as packed", slow=True),
    Variant("INT4 g64 SVD x10", partial(quantize, rounds=10), counted="as packed", slow=True),
)
