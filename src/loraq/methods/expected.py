"""What a weight tells of its inputs: second moments that need no data.

Training adds to a weight outer products of its inputs with what its outputs lack, so what it reads
most is what it has seen most: its leading right singular directions hold several times as much
power of its inputs as others (docs/log.md, 2026-11-29), and an error in them costs as much more. So
inputs are expected to have the second moment

    H = I + c · in · Σ σᵢ² vᵢ vᵢᵀ / ‖W‖²

with the leading singular triplets of W. It is a diagonal and a few directions: neither H nor its
factors are ever formed.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.formats import CastFormat, Format, QTensor
from loraq.linalg import TruncatedSVD, energy
from loraq.methods.feedback import FewDirections
from loraq.methods.inputs import Inputs
from loraq.methods.noise import noise_powers

#: Most singular directions that are told from the others.
_MOST = 64


@dataclass(frozen=True, kw_only=True)
class ExpectedInputs(Inputs):
    """Inputs of one layer, as its weight lets expect them; see the module text.

    As in `Inputs`, energies are in units of the mean power of a channel.
    """

    #: Power of white inputs in it.
    white: float
    #: √λᵢ vᵢ, (directions, in): H is `white` · I + directionsᵀ directions.
    directions: Tensor

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "out in"],
        svd: TruncatedSVD,
        prior: float,
        activation: Format | None,
        feedback_damping: float = Inputs.feedback_damping,
    ) -> "ExpectedInputs":
        """Return the inputs that a weight lets expect.

        Args:
            weight: W.
            svd: leading singular triplets of W.
            prior: c, how much power the directions of the weight have beside white inputs.
            activation: as in `Inputs`.
            feedback_damping: as in `Inputs`.
        """
        total = energy(weight)
        shares = svd.values[:_MOST].double().square() / torch.where(total > 0, total, 1.0)
        white = 1 / (1 + prior * shares.sum())  # the mean power of a channel is 1
        scales = (white * prior * weight.shape[1] * shares).sqrt().float()
        return cls(
            feedback_damping=feedback_damping,
            activation=activation,
            white=white.item(),
            directions=scales[:, None] * svd.right[:_MOST],
        )

    def importance(self, damping: float) -> Float[Tensor, " in"]:
        """Return what an error of each channel counts, 1 in the mean."""
        weights = self._powers.float() + damping
        return weights / weights.mean()

    @property
    def rounds_with_feedback(self) -> bool:
        """Always: all second moments are expected."""
        return True

    def round(self, target: Float[Tensor, "out in"], fmt: Format, rule: str | None) -> QTensor:
        """Return the rounded matrix that answers inputs as the target does; see `Inputs.round`.

        The noise filter is H (H + Σ)⁻¹ = I − Σ (H + Σ)⁻¹, by Woodbury's identity.
        """
        diagonal = torch.full_like(self._powers, self.white + self.feedback_damping)
        if self.activation is not None and not isinstance(self.activation, CastFormat):
            diagonal += self._noise
            share = self._noise / diagonal
            divided = self.directions.double() / diagonal
            inner = divided @ self.directions.double().mT
            inner.diagonal().add_(1)
            left = torch.cholesky_solve(divided, torch.linalg.cholesky_ex(inner).L)
            noisy = target * share.float()
            target = torch.sub(target, noisy).addmm_(noisy @ self.directions.mT, left.float())
        return FewDirections(diagonal, self.directions).round(target, fmt, rule)

    def error_energy(self, error: Float[Tensor, "out in"]) -> float:
        """Return E‖x errorᵀ‖²."""
        seen = energy(error @ self.directions.mT)
        return (self.white * energy(error) + seen).item()

    def noise_energy(self, matrix: Float[Tensor, "out in"]) -> float:
        """Return E‖n matrixᵀ‖² for a noise n as large as the input, of uncorrelated channels."""
        return _energy(matrix, self._powers)

    def rounding_energy(self, matrix: Float[Tensor, "out in"], relative: float) -> float:
        """Return E‖n matrixᵀ‖² for the noise n of rounded activations of the main path."""
        return _energy(matrix, self._noise)

    def size(self, weight: Float[Tensor, "out in"]) -> float:
        """Return √E‖x Wᵀ‖², 1 if it is zero."""
        return math.sqrt(self.error_energy(weight)) or 1.0

    @cached_property
    def _powers(self) -> Float[Tensor, " in"]:
        """E[x²] of each channel, in double precision."""
        return self.white + self.directions.double().square().sum(0)

    @cached_property
    def _noise(self) -> Float[Tensor, " in"]:
        assert self.activation is not None
        return noise_powers(self._powers + self.feedback_damping, self.activation)


def _energy(matrix: Tensor, powers: Tensor) -> float:
    return (matrix.square().sum(0, dtype=torch.float64) @ powers).item()
