"""The scale shared by a block: how it is stored.

A scale always multiplies: value = element * scale (* global_scale). Three storages are in use:
E8M0, a bare power of two (OCP MX v1.0, section 5.4); E4M3 under one fp32 scale (NVFP4); bf16 or
fp32 (plain integers and FP8 rows). An NVFP4 block scale may be an e4m3 subnormal, down to 2^-9
under the global one, as the format allows; torchao clamps it to e4m3's smallest normal number,
2^-6, and so rounds blocks below a 28,672th of the largest value to coarser steps.

A block of zeros, or one so small that its scale would be an fp32 subnormal, gets the smallest scale
there is and decodes to zeros; a block too large for the largest scale saturates.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from loraq.formats.element import E4M3, ElementFormat, power_of_two_below

#: Smaller scales would be fp32 subnormals; what has one is stored as zeros.
SMALLEST_SCALE = 2.0**-126


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
        """Return the OCP scale, doubled where the largest value would round past the maximum.

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
            # A block with content keeps a non-zero scale.
            scale = E4M3.round(scale).clamp_(min=2.0**-9)
        return torch.where(scale >= SMALLEST_SCALE, scale, 0.0)

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
        """Return the fp32 scales of raw bytes, the inverse of `encode`; E8M0's code 255 is NaN."""
        if self.is_power_of_two:
            table = _powers_of_two(packed.device)
            return table.index_select(0, packed.reshape(-1).int()).view(packed.shape)
        if self.name == "e4m3":
            return E4M3.decode(packed)
        return view_bytes(packed, torch.bfloat16 if self.name == "bf16" else torch.float32).float()

    def under(self, global_scale: Tensor | None) -> "ScaleFormat | GlobalScaled":
        """Return the same storage for scales that a global scale multiplies, if there is one."""
        return self if global_scale is None else GlobalScaled(self, global_scale)


@dataclass(frozen=True, eq=False)
class GlobalScaled:
    """A storage under an fp32 scale that multiplies all block scales of a matrix or a row.

    Takes and gives the product of both, which is what a block is divided by, so that whoever
    chooses scales need not know whether there is a global one.
    """

    #: Storage of the block scales.
    stored: ScaleFormat
    #: Global scale of each row, never 0, (rows, 1, 1).
    global_scale: Tensor

    def propose(self, abs_max: Tensor, element: ElementFormat, factor: float) -> Tensor:
        """Return the storable scale for blocks of largest magnitude `factor * abs_max`."""
        return self.stored.propose(abs_max / self.global_scale, element, factor) * self.global_scale

    def round(self, scale: Tensor) -> Tensor:
        """Round positive scales to storable ones."""
        return self.stored.round(scale / self.global_scale) * self.global_scale

    def encode(self, scale: Tensor) -> Tensor:
        """Return the bytes of the block scales alone, for the products `(rows, n_blocks)`."""
        return self.stored.encode(scale / self.global_scale.squeeze(-1))


E8M0_SCALE = ScaleFormat("e8m0", 1)
E4M3_SCALE = ScaleFormat("e4m3", 1)
BF16_SCALE = ScaleFormat("bf16", 2)
FP32_SCALE = ScaleFormat("fp32", 4)


def safe_divisor(scale: Tensor) -> Tensor:
    """Return what to divide by for a scale: a zero scale stores zeros whatever it divides."""
    return torch.where(scale == 0, 1.0, scale)


def view_bytes(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Reinterpret raw bytes along the last axis, even if a file map left them at an odd address."""
    # A compiler cannot ask for the address.
    is_traced = torch.compiler.is_compiling()
    if is_traced or packed.storage_offset() % dtype.itemsize or not packed.is_contiguous():
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(dtype)


@lru_cache(maxsize=8)
def _powers_of_two(device: torch.device) -> Tensor:
    """Return what each byte of E8M0 stands for."""
    table = _power_of_two(torch.arange(256, dtype=torch.int32, device="cpu") - 127)
    table[255] = torch.nan
    return table.to(device)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent for int32 exponents from -127 to 127, from the bits because exp2 may round."""
    # 2^-127 is the subnormal 1 << 22.
    return ((exponent + 127) << 23).clamp_(min=1 << 22).view(torch.float32)
