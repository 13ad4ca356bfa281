"""QERA and LQER: round the weight first, and answer its rounding error with a branch.

QERA, arXiv 2410.06040, theorem 1 (exact) and theorem 2 (diagonal, for uncorrelated channels; the
scaling of L²QER, arXiv 2402.02446, with root mean squares in place of mean magnitudes). With H =
E[x xᵀ] = C Cᵀ the expected output error of a branch P is ‖(W − Q(W) − P) C‖²; so the best P of
rank r is SVD_r((W − Q(W)) C) C⁻¹, whatever root C is.

LQER, arXiv 2402.02446, section 3.1, knows nothing of the inputs: H is the identity.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.formats.scale_rules import RuleName
from loraq.linalg import damped_cholesky, svd_of_product, truncated_svd
from loraq.methods.base import Method, register
from loraq.methods.descent import Factors, spread
from loraq.methods.fits import Fit, quantize_branch
from loraq.methods.prediction import tail_energies
from loraq.options import Range
from loraq.scheme import Scheme
from loraq.stats import ActivationStats

#: Rows of an error that are scaled at a time, in double precision.
_ROWS = 64


class _ErrorSVD(Method):
    """A branch that is the weighted SVD of the rounding error."""

    scale_rule: RuleName | None
    rotate: bool

    @abstractmethod
    def _weigh(self, weight: Tensor, stats: ActivationStats | None) -> tuple[Tensor, float]:
        """Return H, a matrix or a diagonal (in), and its damping."""

    def _fit(self, weight: Tensor, scheme: Scheme, seed: int, stats: ActivationStats | None) -> Fit:
        branch = self._require_branch(scheme)
        moment, damping = self._weigh(weight, stats)
        main = scheme.weight_format.quantize(weight, self.scale_rule)
        error = main.dequantize()
        torch.sub(weight, error, out=error)
        up, down = weighted_svd(error, moment, branch.rank, damping=damping, seed=seed)
        if self.rotate:
            factors = svd_of_product(up.contiguous(), down.contiguous()).to_balanced()
            up, down = spread(Factors(*factors), seed)
        return Fit(main, quantize_branch(up, down, branch, self.scale_rule))

    def _predict_shares(self, weight: Tensor, error: Tensor, scheme: Scheme) -> Tensor:
        return tail_energies(error)


@register
@dataclass(frozen=True)
class LQER(_ErrorSVD):
    """Round the weight, then approximate the error W − Q(W) by a low-rank branch."""

    name = "lqer"
    summary = "truncated SVD of the rounding error"

    #: Scale rule of weight and factors; `None` is the direct rule of each format.
    scale_rule: RuleName | None = "search"
    #: Whether the factors are rotated in rank space, as LoRaQ's are; see `spread`.
    rotate: bool = False

    def _weigh(self, weight: Tensor, stats: ActivationStats | None) -> tuple[Tensor, float]:
        return torch.ones(weight.shape[1], device=weight.device), 0.0


@register
@dataclass(frozen=True)
class QERA(_ErrorSVD):
    """The same, with a branch that weighs directions by how often they occur."""

    name = "qera"
    summary = "the best branch for the rounding error, given statistics"
    use_of_stats = "required"

    #: Whether all second moments are used, or only the mean squares.
    exact: bool = True
    #: What is added to the diagonal of the second moment, as a share of its mean.
    damping: Annotated[float, Range(0, 1e9)] = 1e-4
    #: Scale rule of weight and factors; `None` is the direct rule of each format.
    scale_rule: RuleName | None = "search"
    #: Whether the factors are rotated in rank space, as LoRaQ's are; see `spread`.
    rotate: bool = False

    @property
    def needs_full_moment(self) -> bool:
        """Whether the method needs E[x xᵀ], not only E[x²]: in the exact form."""
        return self.exact

    def _weigh(self, weight: Tensor, stats: ActivationStats | None) -> tuple[Tensor, float]:
        assert stats is not None
        return stats.second_moment if self.exact else stats.mean_square, self.damping


def weighted_svd(
    error: Float[Tensor, "out in"], moment: Tensor, rank: int, *, damping: float, seed: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Return (up, down) of rank r that minimize ‖(E − up down) C‖.

    C Cᵀ is moment + damping · its mean; `up` is orthonormal. A moment of zeros counts as the
    identity, a vector is a diagonal.
    """
    if moment.dim() == 1:
        mean = moment.double().mean()
        root = (moment.double() + (damping * mean if mean > 0 else 1.0)).sqrt()
        scaled = torch.empty_like(error)
        for rows, into in zip(error.split(_ROWS), scaled.split(_ROWS), strict=True):
            into.copy_(rows.double() * root)
        up, down = truncated_svd(scaled, rank, seed=seed).to_canonical()
        return up, (down / root).float()
    root = damped_cholesky(moment, damping)
    up, down = truncated_svd((error.double() @ root).float(), rank, seed=seed).to_canonical()
    return up, torch.linalg.solve_triangular(root, down.double(), upper=False, left=False).float()
