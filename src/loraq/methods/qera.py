"""QERA: the branch that is the best answer to a rounding error, given what the inputs look like.

QERA, arXiv 2410.06040, theorem 1 (exact) and theorem 2 (diagonal, for uncorrelated channels; the
scaling of L²QER, arXiv 2402.02446, with root mean squares in place of mean magnitudes). With H =
E[x xᵀ] = C Cᵀ the expected output error of a branch P is ‖(W − Q(W) − P) C‖²; so the best P of rank
r is SVD_r((W − Q(W)) C) C⁻¹, whatever root C is.
"""

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.linalg import damped_cholesky, truncated_svd
from loraq.methods.base import (
    full_moment,
    output_error,
    prepare,
    prepare_stats,
    quantize_branch,
    relative_error,
    require_branch,
    require_stats,
)
from loraq.packed import LayerSolution, PackedWeight
from loraq.scheme import Scheme
from loraq.stats import ActivationStats


@dataclass(frozen=True)
class QERA:
    """Round the weight first, then answer its error with a branch that weighs directions by how often they occur."""

    use_of_stats: ClassVar[str] = "required"

    #: Whether all second moments are used, or only the mean squares.
    exact: bool = True
    #: What is added to the diagonal of the second moment, as a share of its mean.
    damping: float = 1e-4
    #: Scale rule of weight and factors; `None` is the direct rule of each format.
    scale_rule: str | None = "search"

    @property
    def needs_full_moment(self) -> bool:
        """Whether statistics of mean squares alone do not do: in the exact form."""
        return self.exact

    def solve(
        self,
        weight: Float[Tensor, "out in"],
        scheme: Scheme,
        *,
        seed: int = 0,
        stats: ActivationStats | None = None,
    ) -> LayerSolution:
        """Round the weight and fit its error; statistics of mean squares alone do for `exact=False`.

        `metrics` holds "output_error"; see `output_error` and `Method.solve`.
        """
        begin = time.perf_counter()
        branch = require_branch(scheme, "qera")
        weight = prepare(weight, scheme)
        stats = prepare_stats(require_stats(stats, "qera"), weight, scheme)
        moment = full_moment(stats, "qera") if self.exact else stats.mean_square
        residual = scheme.weight_format.quantize(weight, self.scale_rule)
        up, down = weighted_svd(
            weight - residual.dequantize(), moment, branch.rank, damping=self.damping, seed=seed
        )
        fitted = quantize_branch(up, down, branch, self.scale_rule)
        return LayerSolution(
            PackedWeight(scheme, residual, fitted),
            relative_error(weight, residual, fitted),
            time.perf_counter() - begin,
            {"output_error": output_error(weight, residual, fitted, stats)},
        )


def weighted_svd(
    error: Float[Tensor, "out in"], moment: Tensor, rank: int, *, damping: float, seed: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Return (up, down) of rank r that minimize ‖(E − up down) C‖ with C Cᵀ = moment + damping · its mean.

    `up` is orthonormal. A moment of zeros counts as the identity, a vector is a diagonal.
    """
    if moment.dim() == 1:
        mean = moment.double().mean()
        root = (moment.double() + (damping * mean if mean > 0 else 1.0)).sqrt()
        up, down = truncated_svd((error.double() * root).float(), rank, seed=seed).canonical()
        return up, (down / root).float()
    root = damped_cholesky(moment, damping)
    up, down = truncated_svd((error.double() @ root).float(), rank, seed=seed).canonical()
    return up, torch.linalg.solve_triangular(root, down.double(), upper=False, left=False).float()
