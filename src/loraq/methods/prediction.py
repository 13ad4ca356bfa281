"""What a branch of each rank would leave of a weight, predicted from its singular values without solving.

Three facts make the prediction: E₀ = ‖W − Q(W)‖, what rounding alone leaves; t(r), the share of
‖W‖² outside the r leading singular directions; ρ(r) = r (m + n − r) / (m n), the share of a
matrix's freedoms that a rank-r product has.

    svdquant, gptq   E² = E₀² t(r)                          rounding error follows what is left to round
    loraq            E² = E₀² t(r)^0.7 exp(−2.8 √ρ)         fitted, see below; 2.8 is for factors of 6 bits
    lqer, qera       E² = E₀² t'(r), of the rounding error  the truncated SVD's own error

Ranks go by the slopes of these curves alone, so that what scales all layers alike is of no account.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.methods.base import frobenius, prepare, require_branch
from loraq.scheme import Scheme

#: Exponent of t(r), and that of −√ρ for factors of few bits and for others; fitted to `fast` solves
#: of the trained digits layers at ranks 2 to 64, and right within some percent of E on 1152×1152
#: and 1152×4608 matrices.
_TAIL = 0.7
_FREEDOM, _FREEDOM_OF_BITS = 3.2, {4: 1.6, 5: 2.8, 6: 2.8}


@dataclass(frozen=True)
class Prediction:
    """What branches of each rank would leave of one weight."""

    #: ‖W‖².
    energy: float
    #: ‖W − Ŵ‖² with a branch of rank 0 (round to nearest), 1, 2 …; never rising.
    left: tuple[float, ...]

    def relative_error(self, rank: int) -> float:
        """Return ‖W − Ŵ‖ / ‖W‖; the absolute error if W is zero."""
        return math.sqrt(self.left[rank] / (self.energy or 1.0))


def predicted(
    weight: Float[Tensor, "out in"], scheme: Scheme, method: str, most: int
) -> Prediction:
    """Return what branches of rank 0 to `most` are predicted to leave of a weight.

    Args:
        weight: full-precision weight, rows are output channels; any float dtype.
        scheme: formats; the rank of its branch does not matter as long as it can be solved.
        method: name of a method that fits a branch.
        most: largest rank, at most min(out, in).

    Raises:
        FormatError: a weight is NaN or infinite.
        SchemeError: the scheme does not fit the weight.
    """
    weight = prepare(weight, scheme)
    error = weight - scheme.weight_format.round(weight, "search")
    tail = _tail(error if method in ("lqer", "qera") else weight)[: most + 1]
    branch = require_branch(scheme, method)
    if method == "loraq":
        n_out, n_in = weight.shape
        ranks = torch.arange(most + 1, dtype=torch.float64)
        freedom = ranks * (n_out + n_in - ranks) / (n_out * n_in)
        tail = tail**_TAIL * torch.exp(
            -_FREEDOM_OF_BITS.get(branch.weight_format.bits, _FREEDOM) * freedom.sqrt()
        )
    left: list[float] = (frobenius(error).item() ** 2 * tail).tolist()
    return Prediction(frobenius(weight).item() ** 2, tuple(left))


def _tail(matrix: Tensor) -> Float[Tensor, " ranks"]:
    """Return the share of the energy outside the r leading singular directions, from 1 for r = 0 on.

    By the eigenvalues of the smaller Gram matrix, in a tenth of the time of an SVD; shares below
    1e-6 are lost in its rounding and count as nothing.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    wide = wide / (wide.abs().max() or 1.0)  # squares of fp32 numbers need not fit
    energies = torch.linalg.eigvalsh(wide @ wide.mT).cpu().double().clamp(min=0).flip(0)
    kept = energies.cumsum(0) / (energies.sum() or 1.0)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - kept).clamp(min=0)])
