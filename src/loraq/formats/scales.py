"""The scale shared by a block: how it is stored, and the named rules that choose it.

A scale always multiplies: value = element * scale (* global_scale). Three storages are in use:
E8M0, a bare power of two (OCP MX v1.0, section 5.4); E4M3 under one fp32 scale (NVFP4); bf16 or
fp32 (plain integers and FP8 rows).

A block of zeros, or one so small that its scale would be an fp32 subnormal, gets the smallest scale
there is and decodes to zeros; a block too large for the largest scale saturates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraq.errors import FormatError, unknown
from loraq.formats.element import E4M3, ElementFormat, power_of_two_below

_SMALLEST_NORMAL = 2.0**-126


@dataclass(frozen=True)
class ScaleRule:
    """How the scale of a block follows from its values.

    Each factor `c` proposes the scale that would suit a block whose largest magnitude is `c` times
    the true one: `c < 1` clips the largest values, `c > 1` leaves headroom. With several factors
    the block takes the one with the least squared error. `least_squares` then takes the optimal
    scale for the codes of the best so far, that often.
    """

    #: Name, one of "floor", "absmax", "midmax", "constant", "fitted", "search".
    name: str
    #: Proposed multiples of the block's largest magnitude.
    factors: tuple[float, ...] = (1.0,)
    #: Rounds of least squares after that: new scale for the codes, new codes for the scale.
    least_squares: int = 0
    #: Whether a scale may be negative, so that the largest value of a block takes the lowest code
    #: of two's complement, which has no positive twin: one more level where it matters most, for no
    #: bytes.
    signed: bool = False


@dataclass(frozen=True)
class ScaleFormat:
    """Storage of one block scale.

    All scales are kept as raw bytes, so that no loader casts them.
    """

    #: "e8m0", "e4m3", "bf16" or "fp32".
    name: str
    #: Bytes of one scale.
    n_bytes: int

    @property
    def is_power_of_two(self) -> bool:
        """Whether only powers of two can be stored."""
        return self.name == "e8m0"

    def propose(self, abs_max: Tensor, element: ElementFormat, factor: float) -> Tensor:
        """Return the storable fp32 scale for blocks of largest magnitude `factor * abs_max`."""
        if self.is_power_of_two:
            # OCP MX v1.0, section 6.3: 2^(floor(log2 max) - emax); saturates inside fp32.
            binade = power_of_two_below(abs_max * factor)
            exponent = (binade.view(torch.int32) >> 23) - 127 - element.max_exponent
            return _power_of_two(exponent.clamp_(-127, 127 - element.max_exponent))
        return self.round(abs_max * (factor / element.max))

    def propose_midmax(self, abs_max: Tensor, element: ElementFormat) -> Tensor:
        """Return the OCP scale, doubled where the largest value would otherwise round past the element's maximum.

        Only for powers of two. This is the rule "midmax" of ROCm/tensorcast.
        """
        scale = self.propose(abs_max, element, 1.0)
        exponent = (power_of_two_below(scale).view(torch.int32) >> 23) - 127
        return _power_of_two(
            (exponent + (abs_max / scale > element.overflow_midpoint)).clamp_(
                max=127 - element.max_exponent
            )
        )

    def round(self, scale: Tensor) -> Tensor:
        """Round positive fp32 scales to storable ones, never to a subnormal fp32 number."""
        if self.name == "bf16":
            scale = scale.bfloat16().float()
        elif self.name == "e4m3":
            scale = E4M3.round(scale).clamp_(
                min=2.0**-9
            )  # a block with content keeps a non-zero scale
        return torch.where(scale >= _SMALLEST_NORMAL, scale, 0.0)

    def encode(self, scale: Tensor) -> Tensor:
        """Return the bytes of storable scales, `(…, n * n_bytes)` for `(…, n)`."""
        if self.is_power_of_two:
            return (power_of_two_below(scale).view(torch.int32) >> 23).to(torch.uint8)
        if self.name == "e4m3":
            return E4M3.encode(scale)
        return (
            scale.to(torch.bfloat16 if self.name == "bf16" else torch.float32)
            .contiguous()
            .view(torch.uint8)
        )

    def decode(self, packed: Tensor) -> Tensor:
        """Return the fp32 scales of raw bytes; the inverse of `encode`. The E8M0 code 255 is NaN."""
        if self.is_power_of_two:
            return torch.where(
                packed == 255, torch.nan, _power_of_two(packed.to(torch.int32) - 127)
            )
        if self.name == "e4m3":
            return E4M3.decode(packed)
        return view_bytes(packed, torch.bfloat16 if self.name == "bf16" else torch.float32).float()


E8M0_SCALE = ScaleFormat("e8m0", 1)
E4M3_SCALE = ScaleFormat("e4m3", 1)
BF16_SCALE = ScaleFormat("bf16", 2)
FP32_SCALE = ScaleFormat("fp32", 4)


def view_bytes(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Reinterpret raw bytes along the last axis, also when a file map left them at an odd address."""
    if packed.storage_offset() % dtype.itemsize or not packed.is_contiguous():
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(dtype)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent for int32 exponents from -127 to 127, built from the bits because exp2 may round."""
    return (
        ((exponent + 127) << 23).clamp_(min=1 << 22).view(torch.float32)
    )  # 2^-127 is the subnormal 1 << 22


# Factors with the least error, measured by `benchmarks/quality/scale_rules.py`. A power-of-two scale has
# one useful neighbour: integers gain from clipping, floats from headroom, because only floats have
# finer small steps.
_FITTED_POWER_OF_TWO = {
    "mxint4": 0.85,
    "mxint6": 0.95,
    "mxint8": 0.99,
    "e2m1": 1.10,
    "e2m3": 1.02,
    "e3m2": 1.14,
    "e4m3": 1.14,
    "e5m2": 1.14,
}
# For int4 the factor 1.0 is left out on purpose: alone it would help, but in the solver's loop the
# block maximum then sets the scale again, every step moves it, and the annealing does not cool
# (docs/log.md).
_FITTED_FLOAT = {
    "int4": ((0.78,), 3),
    "int5": ((0.95, 0.87), 1),
    "int6": ((0.98, 0.9), 1),
    "e2m1": ((1.0, 0.93, 1.42), 1),
}
#: For activations, whose tails are heavier than those of weights: 0.9 would be best for a Gaussian.
_CONSTANT_FLOAT = {"int4": 0.92}
_SEARCH_GRID = tuple(round(1.0 - 0.05 * i, 2) for i in range(11))


def scale_rule(name: str, scale_format: ScaleFormat, element: ElementFormat) -> ScaleRule:
    """Return a named rule with the numbers that fit the storage and the element.

    * "floor": OCP MX v1.0, section 6.3. Powers of two only; the default for their activations.
    * "absmax": the largest magnitude lands on the element's maximum. Float scales only; their
      activations' default.
    * "midmax": "floor", doubled where the maximum would round past the end of the grid. Powers of
      two only.
    * "constant": the direct rule for a largest magnitude that is a constant times the true one, the
      constant with the least mean squared error for the element: as cheap as the direct rule. The
      default for 4-bit activations.
    * "fitted": the same, for float scales with several constants or least squares; the rule inside
      the solver.
    * "search": every block takes the best of a grid; the default for weights.

    Raises:
        FormatError: the rule is unknown, or does not apply to this kind of scale.
    """
    direct = ("floor", "midmax") if scale_format.is_power_of_two else ("absmax",)
    legal = (*direct, "constant", "fitted", "search")
    if name not in legal:
        raise FormatError(unknown(f"scale rule for {scale_format.name} scales", name, legal))
    if name in ("floor", "absmax", "midmax"):
        return ScaleRule(name)
    if scale_format.is_power_of_two:
        if name != "search":
            return ScaleRule(name, (_FITTED_POWER_OF_TWO.get(element.name, 1.0),))
        return ScaleRule(name, (1.0, 2.0) if element.is_float else (1.0, 0.5))
    if name == "constant":
        return ScaleRule(name, (_CONSTANT_FLOAT.get(element.name, 1.0),))
    signed = (
        not element.is_float and element.bits < 8
    )  # INT8 has levels enough, and its libraries want it symmetric
    if name == "fitted":
        factors = _FITTED_FLOAT.get(element.name)
        return ScaleRule(name, *factors, signed=signed) if factors else ScaleRule(name)
    if element.is_float and element.bits == 4:  # E2M1 has two good fits: the maximum on 6, or on 4
        return ScaleRule(
            name, tuple(c * f for c in (1.0, 1.5) for f in (1.06, 1.0, 0.94, 0.88)), least_squares=1
        )
    # With a sign, the largest value reaches the lowest code without clipping at this factor.
    grid = (element.max / (element.max + 1), *_SEARCH_GRID) if signed else _SEARCH_GRID
    return ScaleRule(name, grid, least_squares=1, signed=signed)
