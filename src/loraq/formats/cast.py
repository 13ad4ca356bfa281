"""Plain 16-bit floating point formats, which have no scales."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraq.formats.block import QTensor
from loraq.formats.faults import require_finite
from loraq.formats.scales import view_bytes


@dataclass(frozen=True)
class CastFormat:
    """A plain 16-bit floating point format; as an activation format: leave the input as it is."""

    #: "bf16" or "fp16".
    name: str
    #: The torch dtype of the same numbers.
    dtype: torch.dtype
    bits: int = 16
    bits_per_value: float = 16.0
    #: None: a main weight has at most 8 bits.
    activations: Mapping[int, str] = field(default_factory=dict, compare=False)
    #: None: what is not rounded gains nothing.
    rotation: int = 0

    def storage(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of the `uint8` tensor that holds a tensor of this shape."""
        return {"packed": (*shape[:-1], 2 * shape[-1])}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that a tensor of this shape takes."""
        return 2 * math.prod(shape)

    def for_rows(self) -> "CastFormat":
        """Return itself: no scale is shared."""
        return self

    def round(self, x: Tensor, rule: str | None = None, *, out: Tensor | None = None) -> Tensor:
        """Return the values after a cast, as fp32; saturates at the largest finite value."""
        limit = torch.finfo(self.dtype).max
        cast = x.float().clamp(-limit, limit).to(self.dtype)
        return cast.float() if out is None else out.copy_(cast)

    def quantize(self, x: Tensor, rule: str | None = None) -> QTensor:
        """Return the 16-bit values as raw bytes.

        Raises:
            FormatError: a value is NaN or infinite.
        """
        require_finite(x, self.name)
        packed = self.round(x).to(self.dtype).contiguous().view(torch.uint8)
        return QTensor(packed, None, None, tuple(x.shape), self)

    def dequantize(self, q: QTensor) -> Tensor:
        """Return the fp32 values of a packed tensor of this format."""
        return view_bytes(q.packed, self.dtype).float()

    def decode_rows(self, q: QTensor, at_once: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield them all at once: they have no main weight's size."""
        yield slice(None), self.dequantize(q).view(-1, q.shape[-1])
