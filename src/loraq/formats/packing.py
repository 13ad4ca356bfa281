"""Bytes and codes.

`bits`-wide codes are stored back to back along the last axis, the first value in the low bits.
Two 4-bit codes make a byte (the first one is the low nibble), four 6-bit codes make three bytes,
eight 5-bit codes make five. Every row starts on a whole byte: a row of n codes takes ceil(n * bits
/ 8) bytes, and the unused high bits of its last byte are zero. This order is documented here and
nowhere else.
"""

from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad


def packed_width(n: int, bits: int) -> int:
    """Return the bytes that a row of `n` codes takes."""
    return (n * bits + 7) // 8


def _overlaps(bits: int) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Return codes and bytes of a group, and every (code, byte, shift) that overlap.

    The shift is that of the code inside the byte.
    """
    codes = 8 // gcd(8, bits)
    n_bytes = codes * bits // 8
    pairs = [
        (code, byte, code * bits - byte * 8)
        for code in range(codes)
        for byte in range(n_bytes)
        if code * bits < byte * 8 + 8 and code * bits + bits > byte * 8
    ]
    return codes, n_bytes, pairs


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `uint8` codes along the last axis; see the module text for the order."""
    n = codes.shape[-1]
    if bits == 8:
        return codes.contiguous()
    group, n_bytes, pairs = _overlaps(bits)
    grouped = pad(codes, (0, -n % group)).unflatten(-1, (-1, group))
    packed = torch.zeros((*grouped.shape[:-1], n_bytes), dtype=torch.uint8, device=codes.device)
    for code, byte, shift in pairs:
        column = grouped[..., code]
        packed[..., byte] |= column << shift if shift >= 0 else column >> -shift
    return packed.flatten(-2)[..., : packed_width(n, bits)].contiguous()


def unpack(packed: Tensor, n: int, bits: int) -> Tensor:
    """Return the `n` codes of every row, one `uint8` each; the inverse of `pack`."""
    if bits == 8:
        return packed
    group, n_bytes, pairs = _overlaps(bits)
    grouped = pad(packed, (0, -packed.shape[-1] % n_bytes)).unflatten(-1, (-1, n_bytes))
    codes = torch.empty((*grouped.shape[:-1], group), dtype=torch.uint8, device=packed.device)
    for code, byte, shift in pairs:
        column = grouped[..., byte]
        if shift >= 0:  # the byte that it begins in comes first
            codes[..., code] = column >> shift
        else:
            codes[..., code] |= column << -shift
    return codes.flatten(-2)[..., :n].bitwise_and(2**bits - 1)
