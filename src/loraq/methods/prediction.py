"""What a branch of each rank would leave of a weight, predicted without solving.

Two facts make a prediction: E₀ = ‖W − Q(W)‖, what rounding alone leaves, and a share of E₀² that a
branch of rank r leaves, which each method states (`Method._predict_shares`):

    svdquant, gptq   t(r)                            of the weight: the error follows what is left
    loraq            t(r)^0.7 exp(−2.8 √ρ(r))        fitted; 2.8 is for factors of 6 bits
    lqer, qera       t(r)                            of the rounding error: the truncated SVD's own

t(r) is the share of a matrix's energy outside the r leading singular directions, ρ(r) =
r (m + n − r) / (m n) the share of its freedoms that a rank-r product has. Ranks go by the slopes of
these curves alone, so a factor common to all layers cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """What branches of each rank would leave of one weight."""

    #: ‖W‖².
    energy: float
    #: ‖W − Ŵ‖² with a branch of rank 0 (round to nearest), 1, 2 …; never rising.
    left: tuple[float, ...]

    @classmethod
    def sum(cls, predictions: "Sequence[Prediction]") -> "Prediction":
        """Return the prediction for several weights that have branches of one rank."""
        columns = zip(*(each.left for each in predictions), strict=True)
        return cls(sum(each.energy for each in predictions), tuple(map(sum, columns)))

    def relative_error(self, rank: int) -> float:
        """Return ‖W − Ŵ‖ / ‖W‖; the absolute error if W is zero."""
        return math.sqrt(self.left[rank] / (self.energy or 1.0))


def tail_energies(matrix: Float[Tensor, "out in"]) -> Float[Tensor, " ranks"]:
    """Return t(r): the share of the energy outside r singular directions, 1 for r = 0.

    By the eigenvalues of the smaller Gram matrix, in a tenth of the time of an SVD; shares below
    1e-6 are lost in its rounding and count as nothing.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    wide = wide / (wide.abs().max() or 1.0)  # squares of fp32 numbers need not fit
    energies = torch.linalg.eigvalsh(wide @ wide.mT).cpu().double().clamp(min=0).flip(0)
    kept = energies.cumsum(0) / (energies.sum() or 1.0)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - kept).clamp(min=0)])
