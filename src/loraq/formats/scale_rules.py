"""The named rules that choose the scale of a block, and the choice itself.

A rule is plain data: which multiples of a block's largest magnitude are tried, and how often the
scale then follows the codes. What is best for a format was fitted to it and stands beside it, in
`loraq.formats.presets`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loraq.errors import FormatError, unknown
from loraq.formats.element import ElementFormat
from loraq.formats.scales import E4M3_SCALE, GlobalScaled, ScaleFormat, safe_divisor

#: Larger magnitudes saturate: a bf16 scale for them could be rounded up until its values overflow
#: fp32.
LARGEST = 0.99 * torch.finfo(torch.float32).max

#: The names of all rules; `rule_names` says which apply to a format.
RuleName = Literal["floor", "absmax", "midmax", "constant", "fitted", "search"]

_SEARCH_GRID = tuple(round(1.0 - 0.05 * i, 2) for i in range(11))


@dataclass(frozen=True)
class ScaleFit:
    """The numbers of the rules "constant" and "fitted" that leave the least error in one format."""

    #: The one factor of "constant", and of "fitted" unless `factors` says otherwise.
    constant: float = 1.0
    #: Factors of "fitted", the solver's rule.
    factors: tuple[float, ...] = ()
    #: Rounds of least squares of "fitted" after that.
    least_squares: int = 0


@dataclass(frozen=True)
class ScaleRule:
    """How the scale of a block follows from its values.

    Each factor `c` proposes the scale that would suit a block whose largest magnitude is `c` times
    the true one: `c < 1` clips the largest values, `c > 1` leaves headroom. With several factors
    the block takes the one with the least squared error. `least_squares` then takes the optimal
    scale for the codes of the best so far, that often.
    """

    #: One of `RuleName`.
    name: str
    #: Proposed multiples of the block's largest magnitude.
    factors: tuple[float, ...] = (1.0,)
    #: Rounds of least squares after that: new scale for the codes, new codes for the scale.
    least_squares: int = 0
    #: Whether a scale may be negative, so that the largest value of a block takes the lowest code
    #: of two's complement, which has no positive twin: one more level where it matters most, for no
    #: bytes.
    signed: bool = False

    @property
    def compares(self) -> bool:
        """Whether blocks are rounded to compare scales, which is more than activations pay for."""
        return len(self.factors) > 1 or self.least_squares > 0

    def extend(self, element: ElementFormat) -> ElementFormat:
        """Return the element with every code that scales of this rule can use."""
        return element.with_lowest() if self.signed else element


def rule_names(scale_format: ScaleFormat) -> tuple[str, ...]:
    """Return the names of the rules that apply to a kind of scale, the direct one first."""
    direct = ("floor", "midmax") if scale_format.is_power_of_two else ("absmax",)
    return (*direct, "constant", "fitted", "search")


def scale_rule(
    name: str, scale_format: ScaleFormat, element: ElementFormat, fit: ScaleFit
) -> ScaleRule:
    """Return a named rule with the numbers that suit the storage, the element and the format.

    * "floor": OCP MX v1.0, section 6.3. Powers of two only; the default for their activations.
    * "absmax": the largest magnitude lands on the element's maximum. Float scales only; their
      activations' default.
    * "midmax": "floor", doubled where the maximum would round past the end of the grid. Powers of
      two only.
    * "constant": the direct rule for a largest magnitude that is a constant times the true one, the
      constant with the least mean squared error for the format, and for 4 to 6-bit integers with
      float scales the sign that puts the largest value on the lowest code: as cheap as the direct
      rule. The default for 4-bit activations.
    * "fitted": the same, for float scales with several constants or least squares; the rule inside
      the solver.
    * "search": every block takes the best of a grid; the default for weights.

    Raises:
        FormatError: the rule is unknown, or does not apply to this kind of scale.
    """
    names = rule_names(scale_format)
    if name not in names:
        raise FormatError(unknown(f"scale rule for {scale_format.name} scales", name, names))
    if name in ("floor", "absmax", "midmax"):
        return ScaleRule(name)
    # A power of two has no sign. INT8 has levels enough, and its libraries want it symmetric.
    signed = not (scale_format.is_power_of_two or element.is_float or element.bits >= 8)
    if name == "fitted" and fit.factors:
        return ScaleRule(name, fit.factors, fit.least_squares, signed)
    if name in ("constant", "fitted"):
        return ScaleRule(name, (fit.constant,), signed=signed)
    if scale_format.is_power_of_two:  # one neighbour is useful; see the fits in `presets`
        return ScaleRule(name, (1.0, 2.0) if element.is_float else (1.0, 0.5))
    if element.is_float and element.bits == 4:  # E2M1 has two good fits: the maximum on 6, or on 4
        return ScaleRule(
            name, tuple(c * f for c in (1.0, 1.5) for f in (1.06, 1.0, 0.94, 0.88)), least_squares=1
        )
    # With a sign, the largest value reaches the lowest code without clipping at this factor.
    grid = (element.max / (element.max + 1), *_SEARCH_GRID) if signed else _SEARCH_GRID
    return ScaleRule(name, grid, least_squares=1, signed=signed)


def choose_scales(
    blocks: Tensor,
    rule: ScaleRule,
    scale_format: ScaleFormat,
    element: ElementFormat,
    global_scale: Tensor | None = None,
) -> Tensor:
    """Return the storable fp32 scale of every block, (rows, n_blocks, 1).

    Args:
        blocks: fp32, (rows, n_blocks, block_size).
        rule: how to choose.
        scale_format: storage of the scales.
        element: format of the values.
        global_scale: scale above those of the blocks, (rows, 1, 1), which the result includes.
    """
    if not rule.signed:
        largest = blocks.abs().amax(-1, keepdim=True)  # (rows, n_blocks, 1), as all that follows
        return _choose_positive(blocks, largest, rule, scale_format, element, global_scale)
    # Two's complement has one level more below zero than above. So every block is turned until its
    # largest value is negative; the sign of the scale turns the decoded values back.
    top, bottom = blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True)
    turn = torch.where(top > -bottom, -1.0, 1.0)
    if rule.compares:
        blocks = blocks * turn
    largest = torch.maximum(top, -bottom)
    scale = _choose_positive(blocks, largest, rule, scale_format, element, global_scale)
    highest = torch.finfo(torch.bfloat16).max / 2 ** (element.bits - 1)
    return scale.clamp_(max=highest) * turn  # times the lowest code it must stay finite


def _choose_positive(
    blocks: Tensor,
    largest: Tensor,
    rule: ScaleRule,
    scale_format: ScaleFormat,
    element: ElementFormat,
    global_scale: Tensor | None,
) -> Tensor:
    abs_max = largest.clamp_(max=LARGEST)
    if rule.name == "midmax":
        return scale_format.propose_midmax(abs_max, element)
    storage: ScaleFormat | GlobalScaled = scale_format.under(global_scale)
    element = rule.extend(element)
    proposals = (storage.propose(abs_max, element, factor) for factor in rule.factors)
    # The first proposal is the fallback: it stays where the gains of a huge block overflow, because
    # a comparison with NaN is false.
    best = next(proposals)
    if not rule.compares:
        return best
    best_gain, optimum = _measure(blocks, element, best)
    for scale in proposals:
        gain, its_optimum = _measure(blocks, element, scale)
        better = gain > best_gain
        best = torch.where(better, scale, best)
        best_gain = torch.where(better, gain, best_gain)
        optimum = torch.where(better, its_optimum, optimum)
    # Codes and scale in turn: the best scale for the codes, then new codes for that scale. It is
    # taken unseen, because but for the rounding of the scale neither half can raise the error. Only
    # E4M3, whose neighbours are up to an eighth apart, is so coarse that the rounded optimum may
    # lose.
    for i in range(rule.least_squares):
        if i:
            best_gain, optimum = _measure(blocks, element, best)
        scale = storage.round(optimum)
        if scale_format is E4M3_SCALE:
            better = _measure(blocks, element, scale)[0] > best_gain
        else:
            better = scale.isfinite()
        best = torch.where(better, scale, best)
    return best


def _measure(blocks: Tensor, element: ElementFormat, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a scale gains, and the best scale for its codes; (rows, n_blocks, 1) both.

    With codes v for a block x, the error is |x − s v|² = |x|² − s (2 x·v − s |v|²). So the second
    term is the squared error that the scale saves against storing zeros, |x|² need not be summed,
    and s = x·v / |v|² is where it is largest.
    """
    values = element.round(blocks / safe_divisor(scale))  # (rows, n_blocks, block_size)
    norm = (values * values).sum(-1, keepdim=True)
    overlap = values.mul_(blocks).sum(-1, keepdim=True)
    return scale * (2 * overlap - scale * norm), overlap / norm.clamp(min=2.0**-100)
