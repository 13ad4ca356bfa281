"""SVDQuant without data: the branch is the truncated SVD of the weight, one-shot or alternated with rounding.

SVDQuant, arXiv 2411.05007, section 4.2; the alternation is the one of its reference implementation
(and of LoftQ, arXiv 2310.08659, algorithm 1, but started from the weight). Smoothing needs
activations and is not used.
"""

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.linalg import truncated_svd
from loraq.methods.base import frobenius, prepare, quantize_branch, relative_error, require_branch
from loraq.packed import LayerSolution, PackedWeight
from loraq.scheme import Scheme
from loraq.stats import ActivationStats


@dataclass(frozen=True)
class SVDQuant:
    """Keep the leading singular directions in the branch and round what is left.

    The branch is rounded to its format before the residual is formed, so that the main weight
    absorbs its rounding.
    """

    use_of_stats: ClassVar[str] = "ignored"
    needs_full_moment: ClassVar[bool] = False

    #: Number of (SVD, round) alternations; 1 is one-shot. The best round is kept.
    rounds: int = 1
    #: Rounds without improvement after which the alternation stops.
    patience: int = 5
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
        """Alternate truncated SVD and rounding; statistics are ignored. See `Method.solve`."""
        begin = time.perf_counter()
        branch = require_branch(scheme, "svdquant")
        weight = prepare(weight, scheme)
        main, factor = scheme.weight_format, branch.weight_format
        best, best_error, best_round = None, torch.inf, 0
        target, start = weight, None
        for t in range(self.rounds):
            svd = truncated_svd(
                target, branch.rank, seed=seed, iterations=2 if t else 8, start=start
            )
            start = svd.right.mT
            up, down = svd.canonical()
            residual = weight - factor.round(up, self.scale_rule) @ factor.round(
                down, self.scale_rule
            )
            rounded = main.round(residual, self.scale_rule)
            error = frobenius(residual - rounded).item()
            if error < best_error:
                best, best_error, best_round = (up, down), error, t
            elif t - best_round >= self.patience:
                break
            target = weight - rounded
        assert best is not None
        fitted = quantize_branch(*best, branch, self.scale_rule)
        stored = main.quantize(weight - fitted.reconstruct(), self.scale_rule)
        error = relative_error(weight, stored, fitted)
        metrics = {"rounds": float(t + 1)}
        return LayerSolution(
            PackedWeight(scheme, stored, fitted), error, time.perf_counter() - begin, metrics
        )
