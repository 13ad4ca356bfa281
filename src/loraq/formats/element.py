"""One scalar: how a single value of at most 8 bits is rounded, encoded and decoded.

A float element is a sign, `exponent_bits` and `mantissa_bits` with gradual underflow, as in the OCP
Microscaling (MX) specification v1.0, section 5.3, and the OCP 8-bit floating point specification
(OFP8). An integer element is two's complement with `mantissa_bits` binary digits after the point;
its range is symmetric, the most negative code is not produced (MX v1.0, section 5.3.4 allows it to
be left out), unless block scales carry a sign (`with_lowest`).

Rounding is to nearest, ties to even, and saturates: there is no way to produce an infinity or a NaN
from a finite value. A negative float that rounds to zero keeps its sign; integers have a single
zero.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

#: Exponent field of an fp32 number; keeping only these bits leaves 2^floor(log2 |x|), or 0 for a
#: subnormal.
FP32_EXPONENT_BITS = 0x7F800000


def power_of_two_below(x: Tensor) -> Tensor:
    """Return 2^floor(log2 |x|) of fp32 values.

    It is 0 for zeros and fp32 subnormals, and inf for infinities and NaN.
    """
    return (x.view(torch.int32) & FP32_EXPONENT_BITS).view(torch.float32)


@dataclass(frozen=True)
class ElementFormat:
    """A scalar number format, described by data alone."""

    #: Name in the field's notation, for example "e2m1" or "int4".
    name: str
    #: Bits of one code, 4 to 8.
    bits: int
    #: Bits of the exponent field; 0 means a two's complement integer.
    exponent_bits: int
    #: Fraction bits of a float; binary digits after the point of an integer.
    mantissa_bits: int
    #: Largest finite value.
    max: float
    #: Smallest value; `None` is −max.
    lowest: float | None = None

    @property
    def is_float(self) -> bool:
        """Whether a code has an exponent field."""
        return self.exponent_bits > 0

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest value's binade: MX's `emax`, 0 for MX integers."""
        return math.frexp(self.max)[1] - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal float; subnormals share its step."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def overflow_midpoint(self) -> float:
        """Where a value would round away from `max` if the grid went on: half a step above."""
        step = (
            2.0 ** (self.max_exponent - self.mantissa_bits)
            if self.is_float
            else 2.0**-self.mantissa_bits
        )
        return self.max + step / 2

    def with_lowest(self) -> "ElementFormat":
        """Return the integer that also uses the lowest code of two's complement, below −max."""
        return replace(self, lowest=-self.max - 2.0**-self.mantissa_bits)

    def round(self, x: Tensor) -> Tensor:
        """Round fp32 values to the nearest representable value, ties to even, saturating.

        NaN stays NaN; an infinity saturates to `max`. The result is fp32.
        """
        # Adding and subtracting 1.5 * 2^(23 - mantissa_bits) * binade makes the fp32 adder round at
        # the format's own step. An integer has one binade, [1, 2), for all its values.
        y = x.clamp(-self.max if self.lowest is None else self.lowest, self.max)
        shift = 1.5 * 2.0 ** (23 - self.mantissa_bits)
        if not self.is_float:
            return y.add_(shift).sub_(shift)
        # The clamp keeps subnormals on the step of the smallest normal binade; the sum loses the
        # sign of a zero.
        binade = power_of_two_below(y).clamp_(min=2.0**self.min_exponent)
        return y.add_(binade, alpha=shift).sub_(binade, alpha=shift).copysign_(x)

    def encode(self, x: Tensor) -> Tensor:
        """Round fp32 values and return their codes, one `uint8` each, in the low `bits` bits."""
        rounded = self.round(x)
        if not self.is_float:
            return (
                (rounded * 2.0**self.mantissa_bits)
                .to(torch.int32)
                .bitwise_and_(2**self.bits - 1)
                .to(torch.uint8)
            )
        magnitude = rounded.abs()
        binade = power_of_two_below(magnitude).clamp_(min=2.0**self.min_exponent)
        exponent = (binade.view(torch.int32) >> 23) - 127
        # The significand of a normal value carries its hidden bit, which adds exactly one to the
        # exponent field; a subnormal has no hidden bit and its field is 0. So both follow from one
        # sum.
        significand = (magnitude / binade * 2.0**self.mantissa_bits).to(torch.int32)
        code = ((exponent - self.min_exponent) << self.mantissa_bits) + significand
        return (code | (x.signbit().to(torch.int32) << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the fp32 value of every code; a code that is not a number gives NaN or ∞."""
        return (
            _decode_table(self, codes.device)
            .index_select(0, codes.reshape(-1).int())
            .view(codes.shape)
        )

    def grid(self) -> Tensor:
        """Return the value of each of the `2**bits` codes, in the order of the codes, as fp32."""
        codes = torch.arange(2**self.bits, device="cpu")
        if not self.is_float:
            signed = torch.where(codes >= 2 ** (self.bits - 1), codes - 2**self.bits, codes)
            return signed.float() * 2.0**-self.mantissa_bits
        field = (codes >> self.mantissa_bits) & (2**self.exponent_bits - 1)
        fraction = (codes & (2**self.mantissa_bits - 1)).double() * 2.0**-self.mantissa_bits
        normal = field > 0
        exponent = torch.where(normal, field - 1, 0) + self.min_exponent
        magnitude = (normal + fraction) * torch.pow(2.0, exponent.double())
        if self.exponent_bits == 5:  # E5M2 is IEEE-like: the top exponent holds infinity and NaN
            top = field == 2**self.exponent_bits - 1
            magnitude = torch.where(top, torch.where(fraction > 0, torch.nan, torch.inf), magnitude)
        elif self.bits == 8:  # E4M3 has one NaN a sign and no infinity
            magnitude = torch.where((codes & 0x7F) == 0x7F, torch.nan, magnitude)
        negative = (codes >> (self.bits - 1)).bool()
        return torch.where(negative, -magnitude, magnitude).float()


@lru_cache(maxsize=64)
def _decode_table(element: ElementFormat, device: torch.device) -> Tensor:
    return element.grid().to(device)


E2M1 = ElementFormat("e2m1", bits=4, exponent_bits=2, mantissa_bits=1, max=6.0)
E2M3 = ElementFormat("e2m3", bits=6, exponent_bits=2, mantissa_bits=3, max=7.5)
E3M2 = ElementFormat("e3m2", bits=6, exponent_bits=3, mantissa_bits=2, max=28.0)
E4M3 = ElementFormat("e4m3", bits=8, exponent_bits=4, mantissa_bits=3, max=448.0)
E5M2 = ElementFormat("e5m2", bits=8, exponent_bits=5, mantissa_bits=2, max=57344.0)


def integer(bits: int) -> ElementFormat:
    """Plain symmetric integer: values -(2^(bits-1) - 1) to 2^(bits-1) - 1."""
    return ElementFormat(
        f"int{bits}", bits, exponent_bits=0, mantissa_bits=0, max=2.0 ** (bits - 1) - 1
    )


def mx_integer(bits: int) -> ElementFormat:
    """MX integer: `bits - 2` digits after the point, so that |x| < 2 (MX v1.0, 5.3.4)."""
    fraction_bits = bits - 2
    largest = (2.0 ** (bits - 1) - 1) * 2.0**-fraction_bits
    return ElementFormat(
        f"mxint{bits}", bits, exponent_bits=0, mantissa_bits=fraction_bits, max=largest
    )
