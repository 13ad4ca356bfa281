"""AutoRound without data: rounding to nearest, and its SVDQuant with 1 and 20 rounds.

Factors are in bf16.

These are functions inside the package (the command line wants a whole FLUX or SDXL pipeline) and
simulate the formats: bytes are counted as its exports pack them, bf16 scales for INT4 and E8M0
scales for MXFP4.
"""

from functools import partial

import torch
from auto_round.algorithms.transforms.svdquant.residual import (
    ResidualQuantScheme,
    iterate_residual_decomposition,
    rtn_qdq_residual,
)
from contract import Quantized, Variant, nbytes_of, run
from torch import Tensor

INT4 = ResidualQuantScheme(data_type="int", bits=4, group_size=64, sym=True)
MXFP4 = ResidualQuantScheme(data_type="mx_fp", bits=4, group_size=32, sym=True)


def packed_bytes(weight: Tensor, scheme: ResidualQuantScheme) -> int:
    """Return the bytes of codes and scales."""
    return weight.numel() // 2 + weight.numel() // scheme.group_size * (2 if scheme is INT4 else 1)


def rtn(weight: Tensor, rank: int, scheme: ResidualQuantScheme) -> Quantized:
    """Round to nearest."""
    return Quantized(
        rtn_qdq_residual(weight.bfloat16(), scheme).float(), packed_bytes(weight, scheme)
    )


def svd(weight: Tensor, rank: int, scheme: ResidualQuantScheme, rounds: int) -> Quantized:
    """Alternate SVD and rounding."""
    found = iterate_residual_decomposition(
        weight,
        rank=rank,
        scheme=scheme,
        iterations=rounds,
        early_stop=False,
        residual_dtype=torch.bfloat16,
        low_rank_dtype=torch.bfloat16,
    )
    main = rtn_qdq_residual(found.residual.bfloat16(), scheme).float()
    nbytes = packed_bytes(weight, scheme) + nbytes_of([found.up, found.down])
    return Quantized(main, nbytes, found.up.float() @ found.down.float())


def variants(name: str, scheme: ResidualQuantScheme, family: str) -> list[Variant]:
    """Return all variants of a format."""
    return [
        Variant(f"{name} RTN", partial(rtn, scheme=scheme), family, "as packed"),
        Variant(f"{name} SVD x1", partial(svd, scheme=scheme, rounds=1), family, "as packed"),
        Variant(f"{name} SVD x20", partial(svd, scheme=scheme, rounds=20), family, "as packed"),
    ]


run(*variants("INT4 g64", INT4, "int4"), *variants("MXFP4", MXFP4, "mxfp4"))
