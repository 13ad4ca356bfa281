"""Blocks of ggml: 32 values along the row, element i and i + 16 in one byte.

Q4_0   18 bytes   fp16 d | 16 bytes: (c[i] + 8) | (c[i+16] + 8) << 4           d · c
Q5_0   22 bytes   fp16 d | u32, bit i: upper bit of c[i] + 16 | 16 bytes: low halves as above
Q8_0   34 bytes   fp16 d | 32 bytes: c                                          d · c
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Values of a block.
BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types."""

    name: str
    #: Its number in a GGUF file.
    number: int
    #: What `general.file_type` says of a file that is mostly of it.
    file_type: int
    #: Bytes of a block.
    nbytes: int
    #: Bytes behind the scale, of signed codes (out, blocks, 32) in int32.
    pack: Callable[[Tensor], Tensor]
    #: The codes again, of the bytes behind the scale (out, blocks, bytes).
    unpack: Callable[[Tensor], Tensor]

    def row_bytes(self, n: int) -> int:
        """Return the bytes of a row of n values."""
        return n // BLOCK * self.nbytes

    def encode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return the bytes of a matrix (out, bytes).

        Args:
            codes: signed, int32, (out, in).
            scale: fp32, (out, blocks).
        """
        d = scale.half().unsqueeze(-1).contiguous().view(torch.uint8)
        return torch.cat((d, self.pack(codes.unflatten(-1, (-1, BLOCK)))), -1).flatten(-2)

    def decode(self, raw: Tensor) -> Tensor:
        """Return the values of `encode` in fp32, as ggml computes them."""
        blocks = raw.unflatten(-1, (-1, self.nbytes))
        d = blocks[..., :2].contiguous().view(torch.float16).float()
        return (d * self.unpack(blocks[..., 2:]).float()).flatten(-2)


def _halves(codes: Tensor) -> Tensor:
    """Return nibbles (…, 32) as bytes (…, 16): element i low, element i + 16 high."""
    return (codes[..., :16] | codes[..., 16:] << 4).to(torch.uint8)


def _split(raw: Tensor) -> Tensor:
    return torch.cat((raw & 15, raw >> 4), -1).int()


def _pack_q5(codes: Tensor) -> Tensor:
    unsigned = codes + 16
    bits = (unsigned >> 4).unflatten(-1, (4, 8)) << torch.arange(8)
    return torch.cat((bits.sum(-1).to(torch.uint8), _halves(unsigned & 15)), -1)


def _unpack_q5(raw: Tensor) -> Tensor:
    upper = (raw[..., :4, None] >> torch.arange(8)) & 1
    return (_split(raw[..., 4:]) | upper.flatten(-2).int() << 4) - 16


Q4_0 = BlockType("Q4_0", 2, 2, 18, lambda c: _halves(c + 8), lambda raw: _split(raw) - 8)
Q5_0 = BlockType("Q5_0", 6, 8, 22, _pack_q5, _unpack_q5)
Q8_0 = BlockType(
    "Q8_0",
    8,
    7,
    34,
    lambda c: c.to(torch.int8).view(torch.uint8),
    lambda raw: raw.contiguous().view(torch.int8),
)
