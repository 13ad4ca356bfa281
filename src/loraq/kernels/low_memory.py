"""Matrix products on weights that are decoded at each call: nothing but the packed bytes is kept.

One decoded weight is in memory while a layer runs, in memory that the layers of a model share. It
is decoded, and rotated back, a few rows at a time: what that takes beside it is less than half as
much. A training step decodes it once more for the gradient instead of keeping it.

On a GPU one kernel of Triton decodes, adds the branch and rotates back, where it was seen to be
right. Elsewhere 4-bit codes are decoded two or four at a time through a table, several times faster
than one code at a time.

No activation is rounded, unless it is to be simulated, as in `resident`. For many tokens the branch
is added to the weight, for few it runs beside it, whichever takes fewer multiplications.
"""

import math
import threading
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, library

from loraq.formats import BlockFormat, QTensor, get_format
from loraq.formats.scales import view_bytes
from loraq.kernels.base import (
    Backend,
    Operands,
    decode,
    decode_one,
    flatten_tokens,
    work_dtype,
)
from loraq.kernels.reference import run
from loraq.kernels.resident import Resident, merge
from loraq.kernels.triton import fused
from loraq.packed import PackedWeight
from loraq.scheme import Branch, Scheme
from loraq.transforms import unrotate, unrotate_

#: Decoded values handled at a time by each thread, so that the passes over them stay in cache.
_CHUNK_VALUES = 1 << 18
#: The same on other devices, where each pass over them is a launch.
_CHUNK_VALUES_ELSEWHERE = 1 << 22
#: Fewer values at a time would take longer, and hardly less memory.
_FEWEST_VALUES = 1 << 16
#: Parts in which a matrix is decoded on a CPU, at least. A value takes up to 10 bytes on its way,
#: so one of 12 parts takes less than half of a decoded bf16 matrix; it takes 2 where 4-bit codes
#: are looked up straight into the result.
_PARTS, _PARTS_IN_PLACE = 12, 4


class LowMemory(Backend):
    """Multiply in the input's dtype with weights that are decoded for each call."""

    name = "low_memory"
    keeps_operands = False

    def as_run(self, scheme: Scheme) -> Scheme:
        """Return the scheme without any rounding of activations."""
        return scheme.weight_only()

    def refusal(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        """Return `None`: every layer runs."""
        return None

    def bound(self, scheme: Scheme, dtype: torch.dtype) -> float:
        """Return that of `resident`."""
        return Resident().bound(scheme, dtype)

    def prepare(self, packed: PackedWeight, scheme: Scheme, dtype: torch.dtype) -> PackedWeight:
        """Return the packed weight."""
        return packed

    def linear(
        self, x: Tensor, operands: PackedWeight, scheme: Scheme, bias: Tensor | None
    ) -> Tensor:
        """Return y (…, out) in the dtype of x (…, in)."""
        if scheme.is_weight_only:
            operands = replace(operands, smooth_factor=None)  # x is smoothed already
            tensors, stored = list(operands.tensors.values()), operands.scheme
            rotation = stored.rotation if scheme.rotation == 0 else 0
            return _packed_linear(x, tensors, write_scheme(stored, rotation), bias)
        dtype = work_dtype(x.dtype)
        return run(x, decode_by_table(operands, dtype, scheme.rotation), scheme, bias, dtype)


def write_scheme(scheme: Scheme, rotation: int) -> str:
    """Return formats, rank and rotation as one string, which operators can take."""
    factor, rank = (scheme.branch.weight, scheme.branch.rank) if scheme.branch else ("", 0)
    return f"{scheme.weight} {factor} {rank} {rotation}"


@lru_cache(maxsize=1024)
def _read_scheme(text: str) -> Scheme:
    """Return the weight-only scheme that `write_scheme` has written."""
    main, factor, rank, rotation = text.split(" ")
    branch = Branch(int(rank), factor) if factor else None
    return Scheme(main, branch=branch, rotation=int(rotation))


def _decode(
    tensors: list[Tensor], scheme: Scheme, n_in: int, dtype: torch.dtype, *, merged: bool
) -> Operands:
    """Return the dense matrices, rotated back; `merged` with the branch in the main one."""
    shape = len(tensors[0]), n_in
    stored = dict(zip(scheme.storage(shape), tensors, strict=True))
    packed = PackedWeight.from_tensors(stored, scheme, shape)
    if fused.takes(packed, work_dtype(dtype)):
        return fused.decode(packed, work_dtype(dtype), merged=merged)

    def one(q: QTensor, dtype: torch.dtype, side: int) -> Tensor:
        # On other devices torch's allocator gives the next layer what the last one has freed.
        shares = q is packed.main and q.packed.device.type == "cpu"
        out = _shared.take(q.shape, dtype) if shares else q.packed.new_empty(q.shape, dtype=dtype)
        if _has_table(q):
            _look_up(q, out)
        else:
            q.decode_into(out, _at_once(out, _PARTS))
        unrotate_(out, side, _at_once(out, _PARTS))
        return out

    operands = decode(packed, work_dtype(dtype), 0, one)
    return merge(operands) if merged else operands


def _at_once(out: Tensor, n_parts: int) -> int:
    """Return how many values of a decoded matrix to handle at a time, on a CPU in `n_parts`."""
    if out.device.type != "cpu":
        return _CHUNK_VALUES_ELSEWHERE
    # Fewer and longer passes for more threads: at the end of each one all wait for the last.
    fitting = _CHUNK_VALUES * torch.get_num_threads()
    return min(fitting, max(_FEWEST_VALUES, out.numel() // n_parts))


class _Shared(threading.local):
    """Memory for a decoded weight on the CPU, which the layers that a thread runs share.

    The system gives large pieces of memory page by page, which takes longer than to decode.
    """

    def __init__(self) -> None:
        self.kept: dict[torch.dtype, Tensor] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory for a matrix, with anything in it; what was taken before is overwritten."""
        n = math.prod(shape)
        kept = self.kept.get(dtype)
        if kept is None or kept.numel() < n:
            with torch.inference_mode(False):  # or no other mode could write into it
                kept = self.kept[dtype] = torch.empty(n, dtype=dtype, device="cpu")
        return kept[:n].view(shape)


_shared = _Shared()


# One opaque operator: a compiler would keep decoded weights, and trace again for other numbers of
# tokens; autograd would keep the decoded weight of every layer.
@library.custom_op("loraq::packed_linear", mutates_args=())
def _packed_linear(x: Tensor, tensors: list[Tensor], scheme: str, bias: Tensor | None) -> Tensor:
    """Return x (Qw(R) + U D)ᵀ + b, the matrices rotated back first.

    Args:
        x: (…, in).
        tensors: those of `PackedWeight.tensors`, in their order; the first has a row for each
            output channel.
        scheme: by `write_scheme`; its rotation is that of the stored matrices, and not of x.
        bias: (out).
    """
    read = _read_scheme(scheme)
    n_out, n_in = len(tensors[0]), x.shape[-1]
    merged = len(flatten_tokens(x)) * (n_out + n_in) >= n_out * n_in  # both times the rank
    operands = _decode(tensors, read, n_in, x.dtype, merged=merged)
    return run(x, operands, read, bias, work_dtype(x.dtype))


@_packed_linear.register_fake
def _(x: Tensor, tensors: list[Tensor], scheme: str, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(tensors[0])))


def save_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the stored bytes for a gradient, and no decoded weight."""
    x, tensors, ctx.scheme, bias = inputs
    ctx.n_in, ctx.dtype = x.shape[-1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*tensors)


def packed_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Return the gradients of x and bias; the derivative of rounding counts as 1."""
    tensors = list(ctx.saved_tensors)
    back = _packed_linear_back(gradient, tensors, ctx.scheme, ctx.n_in, ctx.dtype)
    bias = None
    if ctx.bias_dtype is not None:
        bias = flatten_tokens(gradient).float().sum(0).to(ctx.bias_dtype)
    return back, [None] * len(tensors), None, bias


@library.custom_op("loraq::packed_linear_back", mutates_args=())
def _packed_linear_back(
    gradient: Tensor, tensors: list[Tensor], scheme: str, n_in: int, dtype: torch.dtype
) -> Tensor:
    dense, _, _ = _decode(tensors, _read_scheme(scheme), n_in, dtype, merged=True)
    return (gradient.to(dense.dtype) @ dense).to(dtype)


@_packed_linear_back.register_fake
def _(
    gradient: Tensor, tensors: list[Tensor], scheme: str, n_in: int, dtype: torch.dtype
) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], n_in), dtype=dtype)


_packed_linear.register_autograd(packed_backward, setup_context=save_packed)


def decode_by_table(
    packed: PackedWeight, dtype: torch.dtype, rotation: int | None = None
) -> Operands:
    """Return what `decode` returns, sooner for 4-bit tensors."""
    return decode(packed, dtype, rotation, _decode_pairs)


def _decode_pairs(q: QTensor, dtype: torch.dtype, side: int) -> Tensor:
    """Return what `decode_one` does, by operators that a compiler can trace."""
    if not _has_table(q):
        return decode_one(q, dtype, side)
    stored = q.packed, q.scale, q.global_scale
    return unrotate(_dequantize_pairs(*stored, q.format.name, q.shape[-1], dtype), side)


def _has_table(q: QTensor) -> bool:
    """Whether `_look_up` decodes a tensor."""
    fmt = q.format
    return fmt.bits == 4 and isinstance(fmt, BlockFormat) and not (fmt.of_rows or fmt.of_columns)


# Opaque, as `loraq::dequantize` is, so that a compiled model keeps no decoded weight as a constant.
@library.custom_op("loraq::dequantize_pairs", mutates_args=())
def _dequantize_pairs(
    packed: Tensor,
    scale: Tensor | None,
    global_scale: Tensor | None,
    name: str,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    out = packed.new_empty((*packed.shape[:-1], n), dtype=dtype)
    return _look_up(QTensor(packed, scale, global_scale, out.shape, get_format(name)), out)


@_dequantize_pairs.register_fake
def _(
    packed: Tensor,
    scale: Tensor | None,
    global_scale: Tensor | None,
    name: str,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], n), dtype=dtype)


def _look_up(q: QTensor, out: Tensor) -> Tensor:
    """Decode a tensor of 4-bit codes into another, and return that."""
    packed, fmt, n, dtype = q.packed, q.format, q.shape[-1], out.dtype
    assert isinstance(fmt, BlockFormat)
    assert q.scale is not None
    factor = fmt.scale_format.decode(q.scale)
    if q.global_scale is not None:
        factor = factor * view_bytes(q.global_scale, torch.float32)
    # A product of a 4-bit value and a scale of 8 significant bits is exact in fp32, so rounding it
    # to bf16 at once is what rounding a decoded fp32 weight is. Longer scales multiply in fp32.
    exact = dtype == torch.bfloat16 and fmt.scale_format.n_bytes < 4 and q.global_scale is None
    work = dtype if exact and n % 4 == 0 else torch.float32
    table, factor = _table(fmt.name, work, packed.device), factor.to(work)
    size = fmt.block_size or n
    whole = n % size == 0 and n % 2 == 0
    direct = whole and dtype == work
    step = max(1, _at_once(out, _PARTS_IN_PLACE if direct else _PARTS) // n)
    # Rows of another dtype, or longer than those of the result, are made beside it.
    beside = (0, 0) if direct else (min(step, len(packed)), 2 * packed.shape[-1])
    buffer = out.new_empty(beside, dtype=work)
    for start in range(0, len(packed), step):
        part = slice(start, start + step)
        codes = packed[part]
        values = out[part] if direct else buffer[: len(codes)]
        torch.index_select(table, 0, _places_of(codes, work), out=values.view(torch.int64).view(-1))
        if whole:
            values.view(len(values), -1, size).mul_(factor[part].unsqueeze(-1))
        else:
            values = values[:, :n].mul_(factor[part].repeat_interleave(size, -1)[:, :n])
        if not direct:
            out[part] = values
    return out


@lru_cache(maxsize=32)
def _table(name: str, work: torch.dtype, device: torch.device) -> Tensor:
    """Return two or four values as one integer for each byte or pair of bytes.

    A single look-up then moves 8 bytes of values.
    """
    fmt = get_format(name)
    assert isinstance(fmt, BlockFormat)
    n_codes = 8 // work.itemsize
    packed, grid = torch.arange(16**n_codes, device="cpu"), fmt.element.grid().to(work)
    values = torch.stack([grid[packed >> 4 * i & 15] for i in range(n_codes)], -1)
    return values.view(torch.int64).flatten().to(device)


def _places_of(codes: Tensor, work: torch.dtype) -> Tensor:
    """Return packed bytes (rows, bytes of a row) as places in the table of a dtype, in one row."""
    if work.itemsize == 4:
        return codes.flatten().int()
    pairs = codes.contiguous()
    if pairs.storage_offset() % 2:
        pairs = pairs.clone()
    return pairs.view(torch.int16).flatten().int().bitwise_and_(0xFFFF)
