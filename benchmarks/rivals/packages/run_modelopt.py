"""NVIDIA Model-Optimizer: `mtq.quantize`, INT4 in blocks of 128 and 64, with and without SVDQuant.

Its SVDQuant wants inputs to choose its scales of input channels by; without data they are standard
normal ones. It simulates: bytes are counted with bf16 scales and bf16 factors. FP4 needs a GPU.
"""

import copy
from functools import partial

import modelopt.torch.quantization as mtq
import torch
from contract import Quantized, Variant, linear, run
from torch import Tensor, nn


def quantize(weight: Tensor, rank: int, block: int, svd: bool) -> Quantized:
    """Quantize a model of one layer."""
    config = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"]["block_sizes"][-1] = block
    n_out, n_in = weight.shape
    nbytes = weight.numel() // 2 + n_out * -(-n_in // block) * 2
    x = torch.randn(256, n_in, dtype=torch.bfloat16)
    if svd:
        config["algorithm"] = {"method": "svdquant", "lowrank": rank}
        nbytes += 2 * rank * (n_out + n_in) + 2 * n_in
    model = mtq.quantize(nn.Sequential(linear(weight)), config, forward_loop=lambda model: model(x))
    effective = model(torch.eye(n_in, dtype=torch.bfloat16)).T.float()
    return Quantized(effective, nbytes, splits=not svd)


run(
    *(
        Variant(
            f"INT4 g{block}{' SVD' if svd else ''}",
            partial(quantize, block=block, svd=svd),
            counted="as packed",
        )
        for block in (128, 64)
        for svd in (False, True)
    )
)
