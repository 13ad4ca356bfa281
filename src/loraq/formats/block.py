"""A quantized tensor: formats with shared block scales, plain 16-bit formats, and `QTensor`, what both produce.

Blocks run along the last axis, which is always the contraction axis; a last, shorter block is
allowed. A scale always multiplies. Two paths give bit-equal values: `round` returns the decoded
fp32 values at once (what a solver or a fake-quantized activation needs), `quantize` returns packed
bytes (what is stored).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraq.errors import FormatError
from loraq.formats.element import ElementFormat
from loraq.formats.packing import pack, packed_width, unpack
from loraq.formats.scales import E4M3_SCALE, ScaleFormat, ScaleRule, scale_rule, view_bytes

#: Values handled at a time on a CPU, so that all passes over them stay in cache: 1 MiB; half or
#: twice of it is slower.
_CHUNK_VALUES = 1 << 18

#: Larger magnitudes saturate: a bf16 scale for them could be rounded up until its values overflow
#: fp32.
_LARGEST = 0.99 * torch.finfo(torch.float32).max


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

    def storage(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the `uint8` tensors that hold a tensor of this shape, by name ("packed", "scale")."""
        ...

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the exact bytes that a tensor of this shape takes, all scales and padding counted."""
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

    def for_rows(self) -> "Format":
        """Return the variant in which no scale is shared by two rows: what dynamic activations need."""
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
        """Rule used when none is named: the direct one of the scale format; for 4-bit activations "constant"."""
        if self.of_rows and not self.has_global_scale:
            return "constant"
        return "floor" if self.scale_format.is_power_of_two else "absmax"

    def n_blocks(self, n: int) -> int:
        """Return the blocks of a row of `n` values."""
        return -(-n // self.block_size) if self.block_size else 1

    def storage(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the `uint8` tensors that hold a tensor of this shape, by name ("packed", "scale")."""
        *leading, n = shape
        shapes: dict[str, tuple[int, ...]] = {
            "packed": (*leading, packed_width(n, self.bits)),
            "scale": (*leading, self.n_blocks(n) * self.scale_format.n_bytes),
        }
        if self.has_global_scale:
            shapes["global_scale"] = (4 * math.prod(leading if self.of_rows else leading[:-1]),)
        return shapes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the exact bytes that a tensor of this shape takes, all scales and padding counted."""
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
        chosen = scale_rule(rule or self.default_rule, self.scale_format, self.element)
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device) if out is None else out
        out_rows = out.view(rows.shape)
        global_scale = self._global_scale(x)
        for part in _row_chunks(rows):
            blocks = self._blocks(rows[part].float())
            scale = self._choose_scale(blocks, chosen, _of_rows(global_scale, rows, part))
            values = self._element(chosen).round(blocks / _safe(scale)).mul_(scale)
            out_rows[part] = values.flatten(-2)[..., : rows.shape[-1]]
        return out

    def quantize(self, x: Tensor, rule: str | None = None) -> QTensor:
        """Return the packed tensor; `dequantize` gives exactly what `round` gives.

        Raises:
            FormatError: a value is NaN or infinite (the message names the place), or the rule does
            not exist.
        """
        chosen = scale_rule(rule or self.default_rule, self.scale_format, self.element)
        require_finite(x, self.name)
        rows = x.reshape(-1, x.shape[-1])
        n = rows.shape[-1]
        global_scale = self._global_scale(x)
        packed, scales = [], []
        for part in _row_chunks(rows):
            blocks = self._blocks(rows[part].float())
            above = _of_rows(global_scale, rows, part)
            scale = self._choose_scale(blocks, chosen, above)
            codes = self._element(chosen).encode(blocks / _safe(scale))
            packed.append(pack(codes.flatten(-2)[..., :n], self.bits))
            scales.append(
                self.scale_format.encode(
                    (scale if above is None else scale / _safe(above)).squeeze(-1)
                )
            )
        lead = x.shape[:-1]
        return QTensor(
            packed=torch.cat(packed).view(*lead, -1),
            scale=torch.cat(scales).view(*lead, -1),
            global_scale=None if global_scale is None else global_scale.view(torch.uint8),
            shape=tuple(x.shape),
            format=self,
        )

    def dequantize(self, q: QTensor) -> Tensor:
        """Return the fp32 values of a packed tensor of this format."""
        n = q.shape[-1]
        rows = q.packed.reshape(-1, q.packed.shape[-1])
        scale = self.scales(q)
        out = torch.empty((rows.shape[0], n), dtype=torch.float32, device=rows.device)
        for part in _row_chunks(out):
            values = self._blocks(self.element.decode(unpack(rows[part], n, self.bits)))
            out[part] = values.mul_(scale[part]).flatten(-2)[..., :n]
        return out.view(q.shape)

    def scales(self, q: QTensor) -> Tensor:
        """Return the fp32 scale of every block of a packed tensor, (rows, n_blocks, 1), the global scale included."""
        assert q.scale is not None, "a block format always stores scales"
        n_rows = math.prod(q.shape[:-1])
        scale = self.scale_format.decode(q.scale.reshape(n_rows, -1)).unsqueeze(-1)
        if q.global_scale is None:
            return scale
        above = view_bytes(q.global_scale, torch.float32)
        return scale * above.repeat_interleave(n_rows // len(above)).view(-1, 1, 1)

    def _blocks(self, rows: Tensor) -> Tensor:
        """(rows, n) to (rows, n_blocks, block_size); a shorter last block is filled with zeros."""
        n = rows.shape[-1]
        size = self.block_size or n
        return (pad(rows, (0, -n % size)) if n % size else rows).unflatten(-1, (-1, size))

    def _global_scale(self, x: Tensor) -> Tensor | None:
        """Fp32 scales that bring the largest block scale of a matrix, or of a row, to the top of E4M3; flat."""
        if not self.has_global_scale:
            return None
        dims = (-1,) if self.of_rows or x.dim() == 1 else (-2, -1)
        largest = x.float().abs().amax(dims).flatten().clamp_(max=_LARGEST)
        top = largest / (self.element.max * 448.0)
        return torch.where(top >= 2.0**-100, top, 1.0)

    def _choose_scale(self, blocks: Tensor, rule: ScaleRule, above: Tensor | None) -> Tensor:
        """Storable fp32 scale of every block, (rows, n_blocks, 1), `above` (the global scale) multiplied in."""
        if (
            rule.signed
        ):  # turned so that the largest value is negative, where there is one level more
            turn = torch.where(
                blocks.amax(-1, keepdim=True) > -blocks.amin(-1, keepdim=True), -1.0, 1.0
            )
            highest = torch.finfo(torch.bfloat16).max / 2 ** (
                self.bits - 1
            )  # the lowest code stays finite
            return self._positive_scale(blocks * turn, rule, above).clamp_(max=highest) * turn
        return self._positive_scale(blocks, rule, above)

    def _element(self, rule: ScaleRule) -> ElementFormat:
        """The element with the codes that a rule's scales can use."""
        return self.element.with_lowest() if rule.signed else self.element

    def _positive_scale(self, blocks: Tensor, rule: ScaleRule, above: Tensor | None) -> Tensor:
        abs_max = blocks.abs().amax(-1, keepdim=True).clamp_(max=_LARGEST)
        if above is not None:
            abs_max = abs_max / above
        if rule.name == "midmax":
            return self.scale_format.propose_midmax(abs_max, self.element)
        element = self._element(rule)
        proposals = (self.scale_format.propose(abs_max, element, factor) for factor in rule.factors)
        if len(rule.factors) == 1 and not rule.least_squares:
            best = next(proposals)
            return best if above is None else best * above
        best = next(proposals)  # kept where the gains of a huge block overflow
        best_gain, optimum = self._gain(blocks, element, best if above is None else best * above)
        for scale in proposals:
            gain, its_optimum = self._gain(
                blocks, element, scale if above is None else scale * above
            )
            better = gain > best_gain
            best = torch.where(better, scale, best)
            best_gain = torch.where(better, gain, best_gain)
            optimum = torch.where(better, its_optimum, optimum)
        for i in range(rule.least_squares):
            if i:
                best_gain, optimum = self._gain(
                    blocks, element, best if above is None else best * above
                )
            scale = self.scale_format.round(optimum if above is None else optimum / above)
            if self.scale_format is E4M3_SCALE:  # so coarse that the rounded optimum may lose
                better = (
                    self._gain(blocks, element, scale if above is None else scale * above)[0]
                    > best_gain
                )
            else:
                better = scale.isfinite()
            best = torch.where(better, scale, best)
        return best if above is None else best * above

    def _gain(self, blocks: Tensor, element: ElementFormat, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error a scale saves against storing zeros, and the best scale for its codes."""
        values = element.round(blocks / _safe(scale))
        norm = (values * values).sum(-1, keepdim=True)
        overlap = values.mul_(blocks).sum(-1, keepdim=True)
        return scale * (2 * overlap - scale * norm), overlap / norm.clamp(min=2.0**-100)


@dataclass(frozen=True)
class CastFormat:
    """A plain 16-bit floating point format; as an activation format it means: leave the activation as it is."""

    #: "bf16" or "fp16".
    name: str
    #: The torch dtype of the same numbers.
    dtype: torch.dtype
    bits: int = 16
    bits_per_value: float = 16.0

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


def require_finite(x: Tensor, what: str) -> None:
    """Raise `FormatError` that names the first value that is NaN or infinite."""
    finite = x.isfinite()
    if finite.all():
        return
    place = tuple(int(i) for i in (~finite).nonzero()[0])
    raise FormatError(
        f"Cannot quantize to '{what}': the value at {place} is {x[place].item()}, and "
        f"{int((~finite).sum())} of {x.numel()} values are not finite. Every value must be a "
        f"finite number. Repair the source file."
    )


def _row_chunks(rows: Tensor) -> Iterator[slice]:
    if rows.device.type != "cpu":
        yield slice(None)
        return
    step = max(1, _CHUNK_VALUES // max(1, rows.shape[-1]))
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)


def _of_rows(global_scale: Tensor | None, rows: Tensor, part: slice) -> Tensor | None:
    """Global scale of each row in `part`, (rows, 1, 1); consecutive rows share one."""
    if global_scale is None:
        return None
    return global_scale.repeat_interleave(len(rows) // len(global_scale))[part].view(-1, 1, 1)


def _safe(scale: Tensor) -> Tensor:
    """Divisor for a scale: a zero scale stores zeros whatever it divides."""
    return torch.where(scale == 0, 1.0, scale)
