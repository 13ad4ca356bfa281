"""GPTQ: round one input channel after the other, and let those that are left make up for the error.

GPTQ, arXiv 2210.17323, algorithm 1 (the same rounding as LDLQ of QuIP, arXiv 2307.13304). Beside a
branch it rounds what the branch leaves, as SVDQuant, arXiv 2411.05007, does with its option "gptq".

Scales are those of rounding to nearest, settled before the first channel, so that channels can go
in any order. They go by falling mean square ("act order" of the authors' code): the largest are
rounded while all others can still make up for them. Scales chosen on the way, from left to right,
are worse (docs/log.md).
"""

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.formats import BlockFormat, FixedScales, Format, QTensor
from loraq.linalg import damped_cholesky, truncated_svd
from loraq.methods.base import (
    full_moment,
    output_error,
    prepare,
    prepare_stats,
    quantize_branch,
    relative_error,
    require_stats,
)
from loraq.packed import LayerSolution, PackedWeight
from loraq.scheme import Scheme
from loraq.stats import ActivationStats

#: Channels after which the errors are carried to the channels that are further away, in one
#: product.
_LAZY = 64


@dataclass(frozen=True)
class GPTQ:
    """Round with error feedback through the second moment; a branch is one-shot SVDQuant's."""

    use_of_stats: ClassVar[str] = "required"
    needs_full_moment: ClassVar[bool] = True

    #: What is added to the diagonal of the second moment, as a share of its mean.
    damping: float = 0.01
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
        """Round what the branch leaves, or all of the weight without one; full second moments are required.

        `metrics` holds "output_error"; see `output_error` and `Method.solve`.
        """
        begin = time.perf_counter()
        weight = prepare(weight, scheme)
        stats = prepare_stats(require_stats(stats, "gptq"), weight, scheme)
        branch, target = None, weight
        if scheme.branch is not None:
            svd = truncated_svd(weight, scheme.branch.rank, seed=seed)
            branch = quantize_branch(*svd.canonical(), scheme.branch, self.scale_rule)
            target = weight - branch.reconstruct()
        feedback = Feedback(full_moment(stats, "gptq"), damping=self.damping)
        stored = feedback.round(target, scheme.weight_format, self.scale_rule)
        return LayerSolution(
            PackedWeight(scheme, stored, branch),
            relative_error(weight, stored, branch),
            time.perf_counter() - begin,
            {"output_error": output_error(weight, stored, branch, stats)},
        )


class Feedback:
    """Rounding with error feedback through one second moment, whose factor is made once for any number of weights."""

    def __init__(self, hessian: Float[Tensor, "in in"], *, damping: float = 0.01) -> None:
        """Settle the order of the channels, and what an error asks of later ones.

        Args:
            hessian: H, symmetric and positive semi-definite; a zero matrix counts as the identity.
            damping: added to the diagonal, as a share of its mean.
        """
        self._order = hessian.diagonal().argsort(descending=True, stable=True)
        self._factor = _unit_factor(hessian[self._order][:, self._order], damping)

    def round(
        self, weight: Float[Tensor, "out in"], fmt: Format, rule: str | None = "search"
    ) -> QTensor:
        """Return a rounded weight Q that lowers tr((W − Q) H (W − Q)ᵀ); with a diagonal H it is round to nearest.

        Args:
            weight: fp32.
            fmt: a 16-bit format rounds to nearest, because there is nothing to gain.
            rule: scale rule.
        """
        if not isinstance(fmt, BlockFormat):
            return fmt.quantize(weight, rule)
        scales = FixedScales(weight, fmt, rule)
        of_values = scales.of_values.mT[self._order]  # (in, out): a channel is a row in memory
        channels = weight.mT[self._order]
        for start in range(0, len(channels), _LAZY):
            stop = min(start + _LAZY, len(channels))
            errors = torch.empty_like(channels[start:stop])
            for j in range(start, stop):
                rounded = scales.round(channels[j], of_values[j])
                errors[j - start] = channels[j] - rounded
                channels[j] = rounded
                channels[j + 1 : stop].addr_(
                    self._factor[j, j + 1 : stop], errors[j - start], alpha=-1
                )
            channels[stop:].addmm_(self._factor[start:stop, stop:].mT, errors, alpha=-1)
        return scales.pack(channels[self._order.argsort()].mT.contiguous())


def _unit_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the unit upper triangular F: an error e of channel i asks of channel j > i the change −e F[i, j].

    With H⁻¹ = Rᵀ R and R upper triangular, F is R with its rows divided by the diagonal. R is the
    inverse of the Cholesky factor of H taken from the last channel to the first. Everything in
    double precision.
    """
    factor = damped_cholesky(hessian.flip(0, 1), damping).flip(0, 1)
    eye = torch.eye(len(hessian), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=True)
    return (inverse / inverse.diagonal()[:, None]).float()
