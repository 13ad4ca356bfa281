"""LQER without data: the branch is the truncated SVD of the rounding error.

LQER, arXiv 2402.02446, equation of section 3.1 ("plain" form, no activation statistics).
"""

import time
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from loraq.linalg import truncated_svd
from loraq.methods.base import prepare, quantize_branch, relative_error, require_branch
from loraq.packed import LayerSolution, PackedWeight
from loraq.scheme import Scheme
from loraq.stats import ActivationStats


@dataclass(frozen=True)
class LQER:
    """Round the weight first, then approximate the error W − Q(W) by a low-rank branch."""

    use_of_stats: ClassVar[str] = "ignored"
    needs_full_moment: ClassVar[bool] = False

    #: Scale rule of weight and factors; `None` is the direct rule of each format.
    scale_rule: str | None = "search"

    def solve(
        self,
        weight: Float[Tensor, "out in"],
        scheme: Scheme,
        *,
        seed: int = 0,
        stats: ActivationStats | None = None,
    ) -> LayerSolution:
        """Round the weight and fit its error; statistics are ignored. See `Method.solve`."""
        begin = time.perf_counter()
        branch = require_branch(scheme, "lqer")
        weight = prepare(weight, scheme)
        residual = scheme.weight_format.quantize(weight, self.scale_rule)
        svd = truncated_svd(weight - residual.dequantize(), branch.rank, seed=seed)
        fitted = quantize_branch(*svd.canonical(), branch, self.scale_rule)
        error = relative_error(weight, residual, fitted)
        return LayerSolution(
            PackedWeight(scheme, residual, fitted), error, time.perf_counter() - begin
        )
