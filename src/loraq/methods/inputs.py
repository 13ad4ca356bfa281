"""What a solver knows of a layer's inputs: nothing, mean squares, or all second moments.

Without statistics inputs count as white. With mean squares h an error of channel j counts h_j. With
E[x xᵀ] the price of an error is exactly the output error it makes, rounding feeds errors back
(`loraq.methods.feedback.Feedback`), and noise of rounded activations is filtered. Activation noise
is priced by h alone: it is taken as uncorrelated with the input, and its power in each channel is
measured on Gaussian inputs of mean squares h (`loraq.methods.noise.noise_powers`).

Let the noise have power Σ, and let a branch leave R = W − UD of the weight. The main weight that
answers noisy inputs best is R H (H + Σ)⁻¹ (Wiener's filter), and what it cannot avoid is

    min over M of tr((R − M) H (R − M)ᵀ) + tr(M Σ Mᵀ) = tr(R N Rᵀ),  N = H (H + Σ)⁻¹ Σ

So the best branch of rank r beside such a main weight is not the truncated SVD of W but the one in
the metric N: with N = C Cᵀ, SVD_r(W C) C⁻¹. In directions with more signal than noise N is Σ, in
the others H: a branch gains nothing where there is no signal.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.formats import CastFormat, Format, QTensor
from loraq.linalg import (
    TruncatedSVD,
    damped_cholesky,
    energy,
    frobenius,
    require_damping,
    svd_of_product,
    truncated_svd,
)
from loraq.methods.feedback import Feedback
from loraq.methods.fits import Fit
from loraq.methods.noise import noise_powers
from loraq.stats import ActivationStats


@dataclass(frozen=True)
class Inputs:
    """Inputs of one layer.

    Energies are in units of the mean power of a channel, so that white inputs count as 1.
    """

    #: As the prepared weight sees them, or `None` for white inputs.
    stats: ActivationStats | None = None
    #: `GPTQ.damping` of rounding with feedback.
    feedback_damping: float = 0.01
    #: Of the main path's activations, whose noise is priced and filtered; `None` for neither.
    activation: Format | None = None

    def importance(self, damping: float) -> Float[Tensor, " in"] | None:
        """Return what an error of each channel counts, 1 in the mean, or `None` for all alike.

        Args:
            damping: added to each mean square, as a share of their mean.
        """
        if self.stats is None:
            return None
        weights = self.stats.mean_square / self._power + damping
        return weights / weights.mean()

    @property
    def rounds_with_feedback(self) -> bool:
        """Whether all second moments are known, which `round` makes use of."""
        return self.stats is not None and self.stats.is_full

    def round(self, target: Float[Tensor, "out in"], fmt: Format, rule: str | None) -> QTensor:
        """Return the rounded matrix that answers inputs as the target T does.

        With all second moments it is better than rounding to nearest.
        With second moments H, and activation rounding that adds noise of power Σ, the expected
        squared error of a matrix M is tr((T − M) H (T − M)ᵀ) + tr(M Σ Mᵀ): up to a constant that of
        rounding T H (H + Σ)⁻¹ for inputs of moment H + Σ. Where inputs are correlated, that filters
        noise which would reach the output through directions without signal (Wiener's filter).
        """
        if not self.rounds_with_feedback:
            return fmt.quantize(target, rule)
        return self._answer.round(target, fmt, rule)

    def error_energy(self, error: Float[Tensor, "out in"]) -> float:
        """Return E‖x errorᵀ‖²."""
        if self.stats is None:
            return energy(error).item()
        return self.stats.output_energy(error, torch.float32) / self._power

    def noise_energy(self, matrix: Float[Tensor, "out in"]) -> float:
        """Return E‖n matrixᵀ‖² for a noise n as large as the input, of uncorrelated channels."""
        if self.stats is None:
            return energy(matrix).item()
        return self._energy(matrix, self.stats.mean_square.double())

    def rounding_energy(self, matrix: Float[Tensor, "out in"], relative: float) -> float:
        """Return E‖n matrixᵀ‖² for the noise n of rounded activations of the main path.

        Args:
            matrix: what they are multiplied with.
            relative: its power relative to the input, if nothing is known of that.
        """
        if self.stats is None:
            return relative * energy(matrix).item()
        return self._energy(matrix, self._noise)

    def choose(self, weight: Float[Tensor, "out in"], *fits: Fit) -> Fit:
        """Return the fit of least output error, activation noise counted if that is filtered."""

        def price(fit: Fit) -> float:
            rounded = fit.main.dequantize()
            noise = 0.0 if self.activation is None else self.rounding_energy(rounded, 0.0)
            target = weight if fit.branch is None else fit.branch.subtract_from(weight)
            return noise + self.error_energy(target - rounded)

        return min(fits, key=price)

    def best_branch(
        self, weight: Float[Tensor, "out in"], svd: TruncatedSVD, seed: int
    ) -> TruncatedSVD:
        """Return SVD_r(W C) C⁻¹, the branch of which `round` makes the most; see the module text.

        Only with all second moments and activation noise.

        Args:
            weight: W.
            svd: the truncated SVD of W, which is near enough to begin with.
            seed: of the randomized SVD.
        """
        noise_filter = self._answer.noise_filter
        assert noise_filter is not None
        metric = noise_filter.double() * self._noise
        metric = (metric + metric.mT) / metric.diagonal().mean()  # symmetric but for fp32
        root = damped_cholesky(metric, 1e-6).float()
        rank, near = len(svd.values), root.mT @ svd.right.mT
        up, down = truncated_svd(
            weight @ root, rank, seed=seed, iterations=2, start=near
        ).to_balanced()
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
        return svd_of_product(up, down)

    def size(self, weight: Float[Tensor, "out in"]) -> float:
        """Return √E‖x Wᵀ‖², 1 if it is zero."""
        if self.stats is None:
            return frobenius(weight).item() or 1.0
        return math.sqrt(self.error_energy(weight)) or 1.0

    @property
    def _power(self) -> float:
        assert self.stats is not None
        return self.stats.mean_square.double().mean().item() or 1.0

    def _energy(self, matrix: Tensor, powers: Tensor) -> float:
        return (matrix.square().sum(0, dtype=torch.float64) @ powers).item() / self._power

    @property
    def _ridge(self) -> float:
        return self.feedback_damping * self._power

    @cached_property
    def _noise(self) -> Float[Tensor, " in"]:
        """Σ, in double precision: that of the damped moment, because no channel is without."""
        assert self.stats is not None
        assert self.activation is not None
        return noise_powers(self.stats.mean_square.double() + self._ridge, self.activation)

    @property
    def moment(self) -> Float[Tensor, "in in"]:
        """H in double precision, damped for what it has not seen."""
        assert self.stats is not None
        require_damping(self.feedback_damping)
        moment = self.stats.second_moment.to(torch.float64, copy=True)
        moment.diagonal().add_(self._ridge)
        return moment

    @cached_property
    def _answer(self) -> "Answer":
        """The answer to H, damped for what it has not seen."""
        return self.answer_to(self.moment)

    def answer_to(self, moment: Float[Tensor, "in in"]) -> "Answer":
        """Return how a main weight answers inputs of any second moment H, noisy as these.

        Args:
            moment: H, positive definite, in double precision; overwritten.
        """
        if self.activation is None or isinstance(self.activation, CastFormat):
            return Answer(None, Feedback(moment, damping=0.0))
        noise = self._noise
        moment.diagonal().add_(noise)
        # H (H + Σ)⁻¹ = I − Σ (H + Σ)⁻¹, in less than half of the time of a solution by LU.
        noise_filter = torch.cholesky_inverse(damped_cholesky(moment, 0.0)).mul_(-noise[:, None])
        noise_filter.diagonal().add_(1)
        return Answer(noise_filter.float(), Feedback(moment, damping=0.0))


class Answer(NamedTuple):
    """How a main weight is rounded that answers some inputs."""

    #: H (H + Σ)⁻¹, or `None` without noise.
    noise_filter: Float[Tensor, "in in"] | None
    #: Through H + Σ.
    feedback: Feedback

    def round(self, target: Tensor, fmt: Format, rule: str | None) -> QTensor:
        """Return the rounded matrix; see `Inputs.round`."""
        if self.noise_filter is not None:
            target = target @ self.noise_filter
        return self.feedback.round(target, fmt, rule)
