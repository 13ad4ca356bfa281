"""Bits of codes as other programs order them, and permutations of whole tensors.

Ours: two's complement or E2M1 in nibbles, element 2j in the low half of byte j
(`formats/packing.py`). What a target reads is decoded here by its own rules, not by ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: The values of E2M1 by their codes, as the OCP Microscaling specification lists them.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def offset_codes(packed: Tensor) -> Tensor:
    """Return signed nibbles as unsigned ones, 8 added to each: the upper bit of both flips."""
    return packed ^ 0x88


def high_first(packed: Tensor) -> Tensor:
    """Return bytes with element 2j in the high half of byte j."""
    return (packed & 15) << 4 | packed >> 4


def split_low_first(packed: Tensor) -> Tensor:
    """Return the nibbles of bytes as int32, the low one of each byte first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).int()


def split_high_first(packed: Tensor) -> Tensor:
    """Return the nibbles of bytes as int32, the high one of each byte first."""
    return torch.stack((packed >> 4, packed & 15), -1).flatten(-2).int()


def join_low_first(codes: Tensor) -> Tensor:
    """Return bytes of pairs of nibbles (uint8), the first of each in the low half."""
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def e2m1_values(codes: Tensor) -> Tensor:
    """Return what E2M1 codes stand for, in fp32."""
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=codes.device)
    return table[codes.long()]


def signed_values(codes: Tensor) -> Tensor:
    """Return what two's complement nibbles stand for, in fp32."""
    return torch.where(codes >= 8, codes - 16, codes).float()


def per_block(values: Tensor, scale: Tensor) -> Tensor:
    """Return values (out, in) times their block scales (out, blocks), in fp32."""
    blocks = values.unflatten(-1, (scale.shape[-1], -1))
    return (blocks * scale.float().unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class Tiling:
    """A permutation of a tensor's values: how its axes are cut, and in which order they are laid.

    `sizes` cut the tensor in row-major order, `order` names the axes of the cut from the slowest
    to the fastest of the result.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def lay(self, values: Tensor) -> Tensor:
        """Return the values in the order of the target, flat."""
        return values.reshape(self.sizes).permute(self.order).reshape(-1)

    def gather(self, laid: Tensor) -> Tensor:
        """Return the values of `lay` in their own order, flat."""
        cut = laid.reshape([self.sizes[axis] for axis in self.order])
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return cut.permute(back).reshape(-1)
