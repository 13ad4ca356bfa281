"""Rounding with error feedback: channels that are left make up for the error of those before.

GPTQ, arXiv 2210.17323, algorithm 1 (the same rounding as LDLQ of QuIP, arXiv 2307.13304).

Scales are those of rounding to nearest, settled before the first channel, so that channels can go
in any order. They go by falling mean square ("act order" of the authors' code): the largest are
rounded while all others can still make up for them. Scales chosen on the way, from left to right,
are worse (docs/log.md).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.formats import BlockFormat, FixedScales, Format, QTensor
from loraq.linalg import damped_cholesky, inverse_of_lower

#: Channels after which the errors are carried to the channels that are further away, in one
#: product.
_LAZY = 64


class Feedback:
    """Rounding with error feedback through one second moment, factored once for all weights."""

    def __init__(self, hessian: Float[Tensor, "in in"], *, damping: float = 0.01) -> None:
        """Settle the order of the channels, and what an error asks of later ones.

        Args:
            hessian: H, symmetric and positive semi-definite; a zero matrix counts as the identity.
            damping: added to the diagonal, as a share of its mean.
        """
        self._order = hessian.diagonal().argsort(descending=True, stable=True)
        last_first = self._order.flip(0)
        # Nobody else may hold the moment in that order: it is as large as all that comes of it.
        self._factor = _unit_factor(hessian[last_first[:, None], last_first], damping)

    def round(
        self, weight: Float[Tensor, "out in"], fmt: Format, rule: str | None = "search"
    ) -> QTensor:
        """Return a rounded weight Q that lowers tr((W − Q) H (W − Q)ᵀ).

        With a diagonal H it is round to nearest.

        Args:
            weight: fp32.
            fmt: a 16-bit format rounds to nearest, because there is nothing to gain.
            rule: scale rule.
        """
        if not isinstance(fmt, BlockFormat):
            return fmt.quantize(weight, rule)
        scales, of_values, channels = _in_order(weight, fmt, rule, self._order)
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


class FewDirections:
    """The same for a moment of which little is not diagonal, at a cost that grows with that.

    Let H = diag(d) + ZᵀZ, and let s = Σ eᵢ zᵢ be what the errors of the channels so far add up to.
    What is best for the rest, if it could be had without rounding, is eⱼ = −zⱼᵀ Aⱼ s / dⱼ with
    Aⱼ = (I + Σ zₗ zₗᵀ / dₗ)⁻¹ over the channels from j on: what `Feedback` finds by the factors of
    H. So only s is carried, and the Aⱼ zⱼ / dⱼ are settled from the last channel to the first.
    """

    def __init__(self, diagonal: Float[Tensor, " in"], directions: Float[Tensor, "k in"]) -> None:
        """Settle the order of the channels, and what they make of earlier errors.

        Args:
            diagonal: d, positive, in double precision.
            directions: Z.
        """
        powers = diagonal + directions.double().square().sum(0)
        self._order = powers.argsort(descending=True, stable=True)
        self._directions = directions.mT[self._order].contiguous()  # (in, k)
        self._gains = _gains(diagonal[self._order], self._directions.double()).float()

    def round(
        self, weight: Float[Tensor, "out in"], fmt: Format, rule: str | None = "search"
    ) -> QTensor:
        """Return a rounded weight Q that lowers tr((W − Q) H (W − Q)ᵀ); as `Feedback.round`."""
        if not isinstance(fmt, BlockFormat):
            return fmt.quantize(weight, rule)
        scales, of_values, channels = _in_order(weight, fmt, rule, self._order)
        carried = channels.new_zeros((channels.shape[1], self._directions.shape[1]))  # (out, k)
        for start in range(0, len(channels), _LAZY):
            part = slice(start, start + _LAZY)
            own, directions, gains = channels[part], self._directions[part], self._gains[part]
            targets = torch.addmm(own, gains, carried.mT)
            within = directions @ gains.mT  # what an error asks of later channels of the part
            errors = torch.empty_like(own)
            for j in range(len(own)):
                rounded = scales.round(targets[j], of_values[start + j])
                errors[j] = own[j] - rounded
                own[j] = rounded
                targets[j + 1 :].addr_(within[j, j + 1 :], errors[j])
            carried.addmm_(errors.mT, directions)
        return scales.pack(channels[self._order.argsort()].mT.contiguous())


def _in_order(
    weight: Tensor, fmt: BlockFormat, rule: str | None, order: Tensor
) -> tuple[FixedScales, Tensor, Tensor]:
    """Return the scales, those of all values and the values, (in, out): a channel is a row."""
    scales = FixedScales(weight, fmt, rule)
    return scales, scales.of_values.mT[order], weight.mT[order]


def _gains(diagonal: Tensor, directions: Tensor) -> Tensor:
    """Return the rows Aⱼ zⱼ / dⱼ, (in, k), of `FewDirections`."""
    gains = torch.empty_like(directions)
    inverse = torch.eye(directions.shape[1], dtype=directions.dtype, device=directions.device)
    for j in range(len(directions) - 1, -1, -1):
        seen = inverse @ directions[j]
        gains[j] = seen / (diagonal[j] + directions[j] @ seen)
        inverse.addr_(seen, gains[j], alpha=-1)
    return gains


def _unit_factor(reversed_hessian: Tensor, damping: float) -> Tensor:
    """Return the unit upper triangular F of the feedback, from H with the last channel first.

    An error e of channel i asks of channel j > i the change −e F[i, j]. With H⁻¹ = Rᵀ R and R
    upper triangular, F is R with its rows divided by the diagonal. R is the inverse of the Cholesky
    factor of H taken from the last channel to the first. Everything in double precision.
    """
    inverse = inverse_of_lower(damped_cholesky(reversed_hessian, damping)).flip(0, 1)
    return (inverse / inverse.diagonal()[:, None]).float()
