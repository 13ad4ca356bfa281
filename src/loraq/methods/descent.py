"""The step of LoRaQ's annealing: factors, the objective at them, and a projected gradient step."""

from typing import NamedTuple

import torch
from torch import Tensor

from loraq.formats import Format
from loraq.linalg import spreading_rotation
from loraq.methods.noise import ActivationNoise


class Factors(NamedTuple):
    """U and D of a branch."""

    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in)

    @classmethod
    def of(cls, up: Tensor, down: Tensor) -> "Factors":
        """Return factors that are contiguous, as every step leaves them.

        BLAS adds in another order for other strides, and an SVD returns what it likes.
        """
        return cls(up.contiguous(), down.contiguous())

    def shrink_(self, share: float) -> "Factors":
        """Make the product smaller by about `share`, in place."""
        return Factors(*(factor.mul_(1 - share / 2) for factor in self)) if share else self


class Iterate(NamedTuple):
    """The objective at some factors, and what a step from there needs."""

    #: Before the branch's rounding.
    factors: Factors
    #: As the product used them.
    seen: Factors
    #: D of what was seen, its channels times their importance, (rank, in).
    weighted: Tensor
    #: UᵀU and the weighted DDᵀ of what was seen, (rank, rank).
    grams: tuple[Tensor, Tensor]
    #: R − Qw(R), (out, in); valid until the next evaluation.
    error: Tensor
    #: Qw(R), (out, in); valid until the next evaluation.
    rounded: Tensor
    #: J, a number on the device of the weight: to read it would make the host wait for it.
    objective: Tensor

    def gradient(self, pull: float) -> Tensor:
        """Return what lowers ‖R − Qw(R)‖² + pull ‖Qw(R)‖² in the product; overwrites `error`."""
        return self.error.add_(self.rounded, alpha=pull) if pull else self.error


class Best:
    """The factors with the least objective so far, chosen on their device.

    The host never waits for a number of the device: it is steps ahead of it.
    """

    def __init__(self, iterate: Iterate) -> None:
        """Begin with an iterate."""
        self.objective = iterate.objective
        self.factors = Factors(*(factor.clone() for factor in iterate.factors))

    def take(self, iterate: Iterate) -> None:
        """Keep an iterate if it is better; one that is not a number never is."""
        better = iterate.objective < self.objective
        self.objective = torch.where(better, iterate.objective, self.objective)
        for mine, new in zip(self.factors, iterate.factors, strict=True):
            torch.where(better, new, mine, out=mine)


class Problem:
    """A weight and its prices.

    Two buffers are reused by every evaluation, because fresh pages cost more than the sums: `error`
    and `rounded` of an `Iterate` are these buffers, and only those of the latest one hold its
    numbers. An older iterate is kept for its factors and its objective alone.
    """

    def __init__(
        self,
        weight: Tensor,
        main: Format,
        factor: Format,
        noise: ActivationNoise,
        importance: Tensor | None,
    ) -> None:
        """Settle what does not change.

        Args:
            weight: fp32, (out, in).
            main: format of the main weight.
            factor: format of both factors.
            noise: prices of activation rounding.
            importance: weight of an error in each channel, (in), or `None` for all alike.
        """
        self.weight, self.main, self.factor, self.noise = weight, main, factor, noise
        self.importance, self._root = importance, None if importance is None else importance.sqrt()
        self._rest, self._rounded = torch.empty_like(weight), torch.empty_like(weight)

    def evaluate(self, factors: Factors, *, rounded: bool) -> Iterate:
        """Round what the factors leave of the weight, and price it.

        Args:
            factors: U and D.
            rounded: whether the product is that of the factors in the branch's format.
        """
        seen = factors
        if rounded:
            seen = Factors(*(self.factor.round(factor, "fitted") for factor in factors))
        torch.addmm(self.weight, *seen, alpha=-1, out=self._rest)
        self.main.round(self._rest, "fitted", out=self._rounded)
        error = self._rest.sub_(self._rounded)  # the buffer of R becomes that of R − Qw(R)
        weighted = seen.down if self.importance is None else seen.down * self.importance
        grams = seen.up.mT @ seen.up, weighted @ seen.down.mT
        branch_energy = (grams[0].double() * grams[1]).sum()  # ‖U D‖² = tr(UᵀU DDᵀ)
        objective = self.noise.price(error, self._rounded, branch_energy, self._root)
        return Iterate(factors, seen, weighted, grams, error, self._rounded, objective)


def move(iterate: Iterate, gradient: Tensor, step: float, cap: float) -> Factors:
    """Step the factors along the gradient, projected on the tangent space at those that are seen.

    The projection of G at U D is P_U G + G P_D − P_U G P_D with P_U = U (UᵀU)⁻¹ Uᵀ and P_D alike;
    each factor takes half of the overlap P_U G P_D. If channels differ in importance M, P_D =
    M Dᵀ (D M Dᵀ)⁻¹ D is orthogonal in that metric.

    Rows and columns of G whose leverage (diagonal of P) times the step exceeds `cap` are scaled
    down: there the branch has nearly all freedom, and an over-relaxed step would diverge.

    Args:
        iterate: where the step begins.
        gradient: G, (out, in).
        step: 1 goes to the minimum along a quadratic, up to 2 is stable, more is hot.
        cap: largest leverage times step of a row or column.
    """
    up, down = iterate.seen
    up_dual = up @ _inverse(iterate.grams[0])  # (out, rank): its product with Uᵀ is P_U
    down_dual = _inverse(iterate.grams[1]) @ iterate.weighted  # (rank, in)
    rows = (cap / (step * (up_dual * up).sum(-1, keepdim=True))).clamp_(max=1)  # (out, 1)
    columns = (cap / (step * (down_dual * down).sum(-2, keepdim=True))).clamp_(max=1)  # (1, in)
    # In place wherever it can be: on a CPU, fresh pages for these factors cost more than the
    # arithmetic.
    down_step = (up_dual.mul_(rows).mT @ gradient).mul_(columns)  # (rank, in)
    overlap = down_step @ down_dual.mT / 2  # (rank, rank)
    up_step = (gradient @ down_dual.mul_(columns).mT).mul_(rows)  # (out, rank)
    up_step.addmm_(up, overlap, alpha=-1).mul_(step).add_(iterate.factors.up)
    down_step.addmm_(overlap, down, alpha=-1).mul_(step).add_(iterate.factors.down)
    return Factors(up_step, down_step)


def spread(factors: Factors, seed: int) -> Factors:
    """Rotate factors in rank space so that no rank direction stands out; the product stays.

    It does nothing for the weight, but the intermediate x Dᵀ shares scales along the rank: in an
    SVD's own basis its first entries would drown the others (docs/log.md).
    """
    rotation = spreading_rotation(factors.up.shape[1], seed=seed).to(factors.up.device)
    return Factors(factors.up @ rotation, rotation.mT @ factors.down)


def _inverse(gram: Tensor) -> Tensor:
    """Invert a Gram matrix in double precision; a tiny ridge covers factors without full rank."""
    gram = gram.double()
    mean = gram.diagonal().mean()
    ridge = torch.where(mean > 0, 1e-7 * mean, 1.0)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # `inv` is this and a look at `info`, for which the host would wait.
    return torch.linalg.inv_ex(gram + ridge * eye).inverse.float()
