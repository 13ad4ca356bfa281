"""How much each input channel of a layer is smoothed: factors s of x / s and W s, by statistics.

The factors are SVDQuant's (arXiv 2411.05007, equation 4), with one change beside 4-bit activations,
whose rounding is most of a layer's error. Factors that suit all calls together may be wrong in
some, because channels change their sizes from timestep to timestep, and a few timesteps can have
most of a model's error. So a layer is smoothed only if rounding its input leaves no more in any
call, as far as statistics tell calls apart.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from loraq.errors import CalibrationError
from loraq.formats import BlockFormat
from loraq.scheme import Scheme
from loraq.stats import ActivationStats
from loraq.transforms import ONE, STEPS

#: Least mean square of a channel that counts as it is, as a share of their mean: what the samples
#: hardly have may come, and its column is not to be rounded to nothing.
HARDLY_THERE = 1e-4
#: SVDQuant's α beside 4-bit activations, and beside others, which are rounded finely enough to take
#: more of what is hard for the weight (docs/log.md, 2026-11-29).
_ALPHA_OF_FOUR_BITS, _ALPHA = 0.5, 0.3


def choose_factors(
    weight: Float[Tensor, "out in"], scheme: Scheme, stats: ActivationStats | None
) -> UInt8[Tensor, " in"]:
    """Return the codes of the factors; of 1 for all channels where no others relieve every call.

    Args:
        weight: as it is in the model.
        scheme: what smooths.
        stats: of its inputs.

    Raises:
        CalibrationError: there are no statistics, or they are of another width.
    """
    if stats is None:
        raise CalibrationError(
            "Smoothing needs activation statistics. Collect them with `loraq.collect_stats` and "
            "give them as `stats` (`--stats`), or leave '-s' out of the recipe."
        )
    has_four_bits = scheme.activation_format.bits <= 4
    alpha = _ALPHA_OF_FOUR_BITS if has_four_bits else _ALPHA
    codes = balance_channels(weight, stats, alpha)
    factors = torch.exp2((codes.double() - ONE) / STEPS)
    if has_four_bits and not relieves_calls(weight, scheme, stats, factors):
        return torch.full_like(codes, ONE)
    return codes


def balance_channels(
    weight: Float[Tensor, "out in"], stats: ActivationStats, alpha: float
) -> UInt8[Tensor, " in"]:
    """Return the codes of rms(input channel)^α / rms(weight's column)^(1 − α), 1 in the mean.

    The mean is geometric.

    Raises:
        CalibrationError: the statistics are of another width.
    """
    stats.require_width(weight.shape[1])
    octaves = weight.new_zeros(weight.shape[1], dtype=torch.float64)
    mean_squares = stats.mean_square.to(weight.device), weight.double().square().mean(0)
    for power, mean_square in zip((alpha, alpha - 1), mean_squares, strict=True):
        # Channels that are hardly there must not set the scale of the others.
        least = max(HARDLY_THERE * mean_square.mean().item(), torch.finfo(torch.float64).tiny)
        octaves += power / 2 * mean_square.double().clamp(min=least).log2()
    codes = (octaves - octaves.mean()) * STEPS + ONE
    return codes.round().clamp(0, 255).to(torch.uint8)


def relieves_calls(
    weight: Float[Tensor, "out in"],
    scheme: Scheme,
    stats: ActivationStats,
    factors: Float[Tensor, " in"],
) -> bool:
    """Whether rounding x / s instead of x leaves no more of x Wᵀ in any call that is told apart.

    The values of a block share their rounding error: its power is a share of the block's mean
    square. A rotated channel shares it with all of its Hadamard block. `True` where statistics do
    not tell calls apart.

    Args:
        weight: as it is in the model.
        scheme: says what a block is.
        stats: of its inputs.
        factors: s.
    """
    if stats.call_mean_squares is None:
        return True
    calls, columns = stats.call_mean_squares.to(weight.device), weight.double().square().sum(0)
    fmt, n = scheme.activation_format, weight.shape[1]
    size = (fmt.block_size if isinstance(fmt, BlockFormat) else 1) or n
    size = min(max(size, scheme.rotation), n)

    def left(s: Tensor) -> Tensor:
        """What rounding leaves in each call, up to one factor for all."""
        shares = ((calls.double() / s.square()), (columns * s.square())[None])
        inputs, weights = (F.pad(of, (0, -n % size)).unflatten(1, (-1, size)) for of in shares)
        return (inputs.mean(2) * weights.sum(2)).sum(1)

    return bool((left(factors) <= left(torch.ones_like(factors))).all().item())
