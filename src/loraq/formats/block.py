"""A quantized tensor: `QTensor`, what every format promises, and formats with shared block scales.

Blocks run along the last axis, which is always the contraction axis; a last, shorter block is
allowed. A scale always multiplies. Two paths give bit-equal values: `round` returns the decoded
fp32 values at once (what a solver or a fake-quantized activation needs), `quantize` returns packed
bytes (what is stored).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraq.formats.element import ElementFormat, power_of_two_below
from loraq.formats.faults import require_finite
from loraq.formats.packing import pack, packed_width, unpack
from loraq.formats.scale_rules import LARGEST, ScaleFit, ScaleRule, choose_scales, scale_rule
from loraq.formats.scales import E4M3_SCALE, ScaleFormat, safe_divisor, view_bytes

#: Values handled at a time on a CPU, so that all passes over them stay in cache: 1 MiB; half or
#: twice of it is slower.
_CHUNK_VALUES = 1 << 18


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized tensor as it is stored: raw bytes and the format that reads them."""

    #: Packed codes, `uint8`, last axis of `packed_width(n)` bytes.
    packed: Tensor
    #: Raw bytes of the block scales, `uint8`, last axis `n_blocks * bytes of one scale`; `None` for
    #: 16-bit formats.
    scale: Tensor | None
    #: Raw bytes of the fp32 scale(s) above the block scales, `uint8`; `None` unless the format has
    #: one.
    global_scale: Tensor | None
    #: Shape of the tensor that was quantized.
    shape: tuple[int, ...]
    #: The format that made it and reads it.
    format: "Format"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The `uint8` tensors that are stored, by the names of `Format.storage`."""
        named = {"packed": self.packed, "scale": self.scale, "global_scale": self.global_scale}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes and all scales."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def dequantize(self) -> Tensor:
        """Return the fp32 values."""
        return self.format.dequantize(self)

    def decode_rows(self, at_once: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield the fp32 values of a matrix a few rows at a time, and which rows they are."""
        return self.format.decode_rows(self, at_once)

    def decode_into(self, out: Tensor, at_once: int | None = None) -> Tensor:
        """Write the values into a contiguous tensor, a few rows at a time, and return that."""
        rows = out.view(-1, out.shape[-1])
        for part, values in self.decode_rows(at_once):
            rows[part] = values
            del values  # or they are in memory beside the next ones
        return out


@runtime_checkable
class Format(Protocol):
    """How a tensor is stored in few bits."""

    @property
    def name(self) -> str:
        """Name that `get_format` understands."""
        ...

    @property
    def bits(self) -> int:
        """Bits of one code, scales not counted."""
        ...

    @property
    def bits_per_value(self) -> float:
        """Stored bits for each value of a long row, block scales counted."""
        ...

    @property
    def activations(self) -> Mapping[int, str]:
        """Formats of the activations beside a main weight of this format, by their bits.

        They are what a recipe's name means by "-a4" and "-a8".
        """
        ...

    @property
    def rotation(self) -> int:
        """Side of the Hadamard rotation that pays for activations of this format; 0 for none."""
        ...

    def storage(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the `uint8` tensors that hold a tensor of this shape, by name."""
        ...

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the exact bytes of a tensor of this shape, all scales and padding counted."""
        ...

    def round(self, x: Tensor, rule: str | None = None, *, out: Tensor | None = None) -> Tensor:
        """Return the fp32 values that `quantize` would store, in `out` if given."""
        ...

    def quantize(self, x: Tensor, rule: str | None = None) -> QTensor:
        """Return the packed tensor."""
        ...

    def dequantize(self, q: QTensor) -> Tensor:
        """Return the fp32 values of a packed tensor of this format."""
        ...

    def decode_rows(self, q: QTensor, at_once: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield them a few rows at a time, leading axes as one: (rows, n) of each slice.

        A slice has about `at_once` values; `None` is what suits the device.
        """
        ...

    def for_rows(self) -> "Format":
        """Return the variant for dynamic activations, in which no two rows share a scale."""
        ...


@dataclass(frozen=True)
class BlockFormat:
    """An element format, a scale format and a block size."""

    #: Name that `get_format` understands.
    name: str
    #: Format of one value.
    element: ElementFormat
    #: Format of the scale that a block shares.
    scale_format: ScaleFormat
    #: Neighbours on the last axis that share a scale; `None` is the whole row.
    block_size: int | None
    #: Whether this is the variant for dynamic activations; see `for_rows`.
    of_rows: bool = False
    #: Whether an fp32 scale of each column stands above the block scales, as the smoothing of
    #: imported weights does; what is quantized here has ones.
    of_columns: bool = False
    #: Numbers of the scale rules that were fitted to this format.
    fit: ScaleFit = field(default=ScaleFit(), kw_only=True)
    #: Formats of the activations beside a main weight of this format, by their bits.
    activations: Mapping[int, str] = field(default_factory=dict, compare=False, kw_only=True)
    #: Side of the Hadamard rotation that pays for activations of this format; 0 for none.
    rotation: int = field(default=0, kw_only=True)

    @property
    def has_global_scale(self) -> bool:
        """Whether an fp32 scale stands above the block scales (NVFP4)."""
        return self.scale_format is E4M3_SCALE

    @property
    def bits(self) -> int:
        """Bits of one code, scales not counted."""
        return self.element.bits

    @property
    def bits_per_value(self) -> float:
        """Stored bits for each value of a long row, block scales counted."""
        return self.bits + (
            8 * self.scale_format.n_bytes / self.block_size if self.block_size else 0.0
        )

    @property
    def default_rule(self) -> str:
        """Rule used when none is named: the direct one, or "constant" for 4-bit activations."""
        if self.of_rows and not self.has_global_scale:
            return "constant"
        return "floor" if self.scale_format.is_power_of_two else "absmax"

    def scale_rule(self, name: str | None = None) -> ScaleRule:
        """Return a scale rule with the numbers that fit this format; `None` is `default_rule`.

        Raises:
            FormatError: the rule does not exist for this format.
        """
        return scale_rule(name or self.default_rule, self.scale_format, self.element, self.fit)

    def n_blocks(self, n: int) -> int:
        """Return the blocks of a row of `n` values."""
        return -(-n // self.block_size) if self.block_size else 1

    def storage(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the `uint8` tensors that hold a tensor of this shape, by name.

        The names are "packed", "scale" and, where the format has one, "global_scale".
        """
        *leading, n = shape
        shapes: dict[str, tuple[int, ...]] = {
            "packed": (*leading, packed_width(n, self.bits)),
            "scale": (*leading, self.n_blocks(n) * self.scale_format.n_bytes),
        }
        n_above = self._n_above(shape)
        if n_above or self.of_columns:
            shapes["global_scale"] = (4 * (n_above + n * self.of_columns),)
        return shapes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the exact bytes of a tensor of this shape, all scales and padding counted."""
        return sum(math.prod(stored) for stored in self.storage(shape).values())

    def for_rows(self) -> "BlockFormat":
        """Return the variant for dynamic activations.

        No scale is shared by two rows, and blocks of 4 bits take the rule "constant", which costs
        nothing.
        """
        return replace(self, of_rows=True) if self.has_global_scale or self.bits == 4 else self

    def round(self, x: Tensor, rule: str | None = None, *, out: Tensor | None = None) -> Tensor:
        """Return the fp32 values that `quantize` would store; NaN stays NaN, an infinity saturates.

        Args:
            x: any float dtype, any leading shape.
            rule: scale rule; `None` is `default_rule`.
            out: contiguous fp32 tensor of the same shape to write into.

        Raises:
            FormatError: the rule does not exist for this format.
        """
        chosen = self.scale_rule(rule)
        element = chosen.extend(self.element)
        rows = x.reshape(-1, x.shape[-1])  # (rows, n)
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device) if out is None else out
        out_rows = out.view(rows.shape)
        global_scale = self._global_scale(x)
        for part in _row_chunks(rows, rows.shape[-1]):
            blocks = self._blocks(rows[part].float())  # (rows, n_blocks, block_size)
            scale = self._scales(blocks, chosen, _of_rows(global_scale, rows, part))
            values = element.round(blocks / safe_divisor(scale)).mul_(scale)
            out_rows[part] = values.flatten(-2)[..., : rows.shape[-1]]
        return out

    def quantize(
        self, x: Tensor, rule: str | None = None, *, above: Tensor | None = None
    ) -> QTensor:
        """Return the packed tensor; `dequantize` gives exactly what `round` gives.

        Args:
            x: any float dtype, any leading shape.
            rule: scale rule; `None` is `default_rule`.
            above: fp32 scale(s) above the block scales, flat, in place of those that fit x.

        Raises:
            FormatError: a value is NaN or infinite (the message names the index), or the rule does
                not exist.
        """
        chosen = self.scale_rule(rule)
        element = chosen.extend(self.element)
        require_finite(x, self.name)
        rows = x.reshape(-1, x.shape[-1])  # (rows, n)
        n = rows.shape[-1]
        global_scale = self._global_scale(x) if above is None else above
        stored = global_scale
        if self.of_columns:
            ones = torch.ones(n, device=x.device)
            stored = ones if global_scale is None else torch.cat((global_scale, ones))
        packed, scales = [], []
        for part in _row_chunks(rows, rows.shape[-1]):
            blocks = self._blocks(rows[part].float())  # (rows, n_blocks, block_size)
            above = _of_rows(global_scale, rows, part)
            scale = self._scales(blocks, chosen, above)
            codes = element.encode(blocks / safe_divisor(scale))
            packed.append(pack(codes.flatten(-2)[..., :n], self.bits))
            scales.append(self.scale_format.under(above).encode(scale.squeeze(-1)))
        lead = x.shape[:-1]
        return QTensor(
            packed=torch.cat(packed).view(*lead, -1),
            scale=torch.cat(scales).view(*lead, -1),
            global_scale=None if stored is None else stored.view(torch.uint8),
            shape=tuple(x.shape),
            format=self,
        )

    def dequantize(self, q: QTensor) -> Tensor:
        """Return the fp32 values of a packed tensor of this format."""
        return q.decode_into(q.packed.new_empty(q.shape, dtype=torch.float32))

    def decode_rows(self, q: QTensor, at_once: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield them a few rows at a time, leading axes as one; see `Format.decode_rows`."""
        n = q.shape[-1]
        rows = q.packed.reshape(-1, q.packed.shape[-1])
        scale = self.scales(q)
        above: Tensor | None = None
        if self.of_columns:
            assert q.global_scale is not None, "the scales of columns stand there"
            above = view_bytes(q.global_scale, torch.float32)[-n:]
        for part in _row_chunks(rows, n, at_once):
            yield part, self._values(rows[part], scale[part], n, above)

    def _values(self, packed: Tensor, scale: Tensor, n: int, above: Tensor | None) -> Tensor:
        """Return the fp32 values of some rows, and hold nothing that they were made of."""
        blocks = self._blocks(self.element.decode(unpack(packed, n, self.bits)))
        values = blocks.mul_(scale).flatten(-2)[..., :n]
        return values if above is None else values.mul_(above)

    def code_scales(self, q: QTensor) -> Tensor:
        """Return what the codes of every block are multiplied by, for elements that are integers.

        The shape is (rows, n_blocks, 1); an MX integer counts in fractions of its scale.
        """
        assert not self.element.is_float, "codes of floats are no numbers"
        return self.scales(q) * 2.0**-self.element.mantissa_bits

    def scales(self, q: QTensor) -> Tensor:
        """Return the fp32 scale of every block of a packed tensor, the global scale included.

        The shape is (rows, n_blocks, 1). Scales of columns are not in it.
        """
        assert q.scale is not None, "a block format always stores scales"
        n_rows = math.prod(q.shape[:-1])
        scale = self.scale_format.decode(q.scale.reshape(n_rows, -1)).unsqueeze(-1)
        if not self.has_global_scale:
            return scale
        assert q.global_scale is not None, "a global scale is stored"
        above = view_bytes(q.global_scale, torch.float32)[: self._n_above(q.shape)]
        return scale * above.repeat_interleave(n_rows // len(above)).view(-1, 1, 1)

    def _n_above(self, shape: tuple[int, ...]) -> int:
        """Return how many fp32 scales stand above the block scales of a tensor, columns apart."""
        leading = shape[:-1] if self.of_rows else shape[:-2]
        return math.prod(leading) if self.has_global_scale else 0

    def _blocks(self, rows: Tensor) -> Tensor:
        """(rows, n) to (rows, n_blocks, block_size); a shorter last block is filled with zeros."""
        n = rows.shape[-1]
        # A block that is longer than the row is the row: a name may ask for any size.
        size = min(self.block_size or n, n)
        return (pad(rows, (0, -n % size)) if n % size else rows).unflatten(-1, (-1, size))

    def _global_scale(self, x: Tensor) -> Tensor | None:
        """Fp32 scales that bring the largest block scale of a matrix or row to E4M3's top; flat.

        What is stored takes the next power of two, so that every copy of it in 16 bits is the same
        number; it leaves as much error (`benchmarks/quality/global_scale.py`). Those of rows are
        not stored.
        """
        if not self.has_global_scale:
            return None
        dims = (-1,) if self.of_rows or x.dim() == 1 else (-2, -1)
        # Not of |x|, which would be a copy of x.
        largest = torch.maximum(x.amax(dims), -x.amin(dims)).float().flatten().clamp_(max=LARGEST)
        top = largest / (self.element.max * 448.0)
        if not self.of_rows:
            below = power_of_two_below(top)
            # Beyond 2^116 the largest value of a block would not be one of fp32: it saturates.
            top = torch.where(below < top, 2 * below, below).clamp_(max=2.0**116)
        return torch.where(top >= 2.0**-100, top, 1.0)

    def _scales(self, blocks: Tensor, rule: ScaleRule, global_scale: Tensor | None) -> Tensor:
        """Storable fp32 scale of every block, (rows, n_blocks, 1), the global one included."""
        return choose_scales(blocks, rule, self.scale_format, self.element, global_scale)


def _row_chunks(rows: Tensor, n: int, at_once: int | None = None) -> Iterator[slice]:
    """Yield slices of rows that hold n values each."""
    if at_once is None and rows.device.type != "cpu":
        yield slice(None)
        return
    step = max(1, (at_once or _CHUNK_VALUES) // max(1, n))
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)


def _of_rows(global_scale: Tensor | None, rows: Tensor, part: slice) -> Tensor | None:
    """Global scale of each row in `part`, (rows, 1, 1); consecutive rows share one."""
    if global_scale is None:
        return None
    return global_scale.repeat_interleave(len(rows) // len(global_scale))[part].view(-1, 1, 1)
