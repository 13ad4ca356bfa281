"""Packed weights of every block format as floats, in one pass: bytes in, rounded values out.

`decode_tile` is the part that other kernels share. It follows the reference step by step, in fp32
(element, times scale, times what is above it), so its values are the reference's, bit for bit. The
kernel adds the branch and rotates back before it rounds once: nothing but the finished matrix is
written.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraq.formats import BlockFormat, QTensor
from loraq.formats.packing import packed_width
from loraq.formats.scales import view_bytes
from loraq.transforms import block_side, signed_hadamard

#: Columns of a tile. Sides of a rotation are at most this, and at least what a product takes.
BLOCK_K = 128
SMALLEST_SIDE = 16


@triton.jit
def _float_value(codes, BITS: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """A float element's codes as fp32: fields moved to their places, subnormals included."""
    magnitude = codes & (2 ** (BITS - 1) - 1)
    bits = ((codes >> (BITS - 1)) << 31) | (magnitude << (23 - MANTISSA))
    # From fp32's bias, 127, to the element's; one factor of 2^126 would be flushed by some.
    value = bits.to(tl.float32, bitcast=True) * 2.0**63 * 2.0 ** (65 - 2 ** (EXPONENT - 1))
    if BITS == 8:
        if EXPONENT == 5:  # IEEE-like
            value = tl.where(magnitude == 0x7C, value * float("inf"), value)
            value = tl.where(magnitude > 0x7C, float("nan"), value)
        else:
            value = tl.where(magnitude == 0x7F, float("nan"), value)
    return value


@triton.jit
def _scale_value(raw, SCALE: tl.constexpr):
    """Stored scales as fp32."""
    if SCALE == "e8m0":
        exponent = raw.to(tl.int32)
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        value = tl.where(exponent == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    elif SCALE == "e4m3":
        value = _float_value(raw.to(tl.int32), 8, 4, 3)
    else:
        value = raw.to(tl.float32)
    return value


@triton.jit
def decode_tile(
    packed_ptr,
    scale_ptr,
    global_ptr,
    rows,
    in_rows,
    start,
    n_in,
    n_bytes,
    n_blocks,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return fp32 values (BLOCK_N, BLOCK_K), 0 past the edges.

    They are those of `rows`, where `in_rows`, in the columns from `start`, a multiple of BLOCK_K.
    """
    line = packed_ptr + rows.to(tl.int64)[:, None] * n_bytes
    k = start + tl.arange(0, BLOCK_K)
    if BITS == 4:
        byte = start // 2 + tl.arange(0, BLOCK_K // 2)
        there = in_rows[:, None] & (byte < n_bytes)[None, :]
        pairs = tl.load(line + byte[None, :], there, 0).to(tl.int32)
        codes = tl.interleave(pairs & 15, pairs >> 4)
    elif BITS == 8:
        there = in_rows[:, None] & (k < n_bytes)[None, :]
        codes = tl.load(line + k[None, :], there, 0).to(tl.int32)
    else:  # a code may lie across two bytes
        byte = k * BITS // 8
        there = in_rows[:, None] & (byte < n_bytes)[None, :]
        low = tl.load(line + byte[None, :], there, 0).to(tl.int32)
        there = in_rows[:, None] & (byte + 1 < n_bytes)[None, :]
        high = tl.load(line + byte[None, :] + 1, there, 0).to(tl.int32)
        codes = ((low | (high << 8)) >> (k * BITS % 8)[None, :]) & (2**BITS - 1)
    if EXPONENT == 0:
        codes = (codes ^ (1 << (BITS - 1))) - (1 << (BITS - 1))
        values = codes.to(tl.float32) * 2.0 ** (0 - MANTISSA)
    else:
        values = _float_value(codes, BITS, EXPONENT, MANTISSA)
    above = 1.0
    if HAS_GLOBAL:
        above = tl.load(global_ptr)
    scales = scale_ptr + rows.to(tl.int64)[:, None] * n_blocks
    if BLOCK == 0:  # one scale a row
        scale = _scale_value(tl.load(scales, in_rows[:, None], 0), SCALE)
        values *= scale * above
    elif BLOCK_K % BLOCK == 0 and BLOCK & (BLOCK - 1) == 0:
        block = start // BLOCK + tl.arange(0, BLOCK_K // BLOCK)
        there = in_rows[:, None] & (block < n_blocks)[None, :]
        scale = _scale_value(tl.load(scales + block[None, :], there, 0), SCALE) * above
        values = tl.reshape(values, (BLOCK_N, BLOCK_K // BLOCK, BLOCK)) * scale[:, :, None]
        values = tl.reshape(values, (BLOCK_N, BLOCK_K))
    else:
        there = in_rows[:, None] & (k < n_in)[None, :]
        scale = _scale_value(tl.load(scales + (k // BLOCK)[None, :], there, 0), SCALE)
        values *= scale * above
    return values


@triton.jit
def decode_kernel(
    packed_ptr,
    scale_ptr,
    global_ptr,
    up_ptr,
    down_ptr,
    rotation_ptr,
    out_ptr,
    n_out,
    n_in,
    n_bytes,
    n_blocks,
    rank,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT32: tl.constexpr,
):
    """Packed (out, in) -> (values + up (out, rank) x down (rank, in)) x rotation, (out, in)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_K
    k, in_rows = start + tl.arange(0, BLOCK_K), rows < n_out
    values = decode_tile(
        packed_ptr,
        scale_ptr,
        global_ptr,
        rows,
        in_rows,
        start,
        n_in,
        n_bytes,
        n_blocks,
        BITS,
        EXPONENT,
        MANTISSA,
        SCALE,
        BLOCK,
        HAS_GLOBAL,
        BLOCK_N,
        BLOCK_K,
    )
    if HAS_BRANCH:
        for first in range(0, rank, BLOCK_R):
            ranks = first + tl.arange(0, BLOCK_R)
            there = in_rows[:, None] & (ranks < rank)[None, :]
            up = tl.load(up_ptr + rows[:, None] * rank + ranks[None, :], there, 0.0)
            there = (ranks < rank)[:, None] & (k < n_in)[None, :]
            down = tl.load(down_ptr + ranks[:, None] * n_in + k[None, :], there, 0.0)
            if DOT32:
                up, down = up.to(tl.float32), down.to(tl.float32)
                values = tl.dot(up, down, values, input_precision="ieee")
            else:
                values = tl.dot(up, down, values)
    if SIDE:
        side = tl.arange(0, SIDE)
        rotation = tl.load(rotation_ptr + side[None, :] * SIDE + side[:, None])  # Rᵀ
        blocks = tl.reshape(values, (BLOCK_N * BLOCK_K // SIDE, SIDE))
        blocks = tl.dot(blocks, rotation, input_precision="ieee")
        values = tl.reshape(blocks, (BLOCK_N, BLOCK_K))
    out = out_ptr + rows.to(tl.int64)[:, None] * n_in + k[None, :]
    tl.store(out, values.to(out_ptr.dtype.element_ty), in_rows[:, None] & (k < n_in)[None, :])


def decode(
    q: QTensor, dtype: torch.dtype, branch: tuple[Tensor, Tensor] | None = None, rotation: int = 0
) -> Tensor:
    """Return (values + up x down) rotated back, rounded once to `dtype`; (out, in).

    Args:
        q: a matrix in a block format.
        dtype: bf16 or fp32.
        branch: proj_up (out, rank) and proj_down (rank, in) of `dtype`.
        rotation: side of the rotation that is undone; 0 for none.
    """
    n_out, n_in = q.shape
    up, down = (factor.contiguous() for factor in branch) if branch else (None, None)
    side = block_side(n_in, rotation)
    device = q.packed.device
    # Triton's interpreter cuts off what does not fit bf16, so there torch rounds.
    written = dtype if device.type == "cuda" else torch.float32
    out = torch.empty((n_out, n_in), dtype=written, device=device)
    block_n = 32
    decode_kernel[(triton.cdiv(n_out, block_n), triton.cdiv(n_in, BLOCK_K))](
        *pointers(q),
        up,
        down,
        signed_hadamard(side, device) if rotation else None,
        out,
        n_out,
        *sizes(q),
        0 if up is None else up.shape[1],
        **layout(q.format),
        HAS_BRANCH=up is not None,
        SIDE=side if rotation else 0,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        BLOCK_R=32,
        DOT32=dtype == torch.float32 or not out.is_cuda,
        num_warps=4,
    )
    return out.to(dtype)


def pointers(q: QTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the packed codes, the scales in their own dtype, and what is above them."""
    assert isinstance(q.format, BlockFormat)
    assert q.scale is not None
    wide = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(q.format.scale_format.name)
    scale = q.scale.contiguous() if wide is None else view_bytes(q.scale, wide)
    above = None if q.global_scale is None else view_bytes(q.global_scale, torch.float32)
    return q.packed.contiguous(), scale, above


def sizes(q: QTensor) -> tuple[int, int, int]:
    """Return values, bytes and blocks of a row."""
    assert isinstance(q.format, BlockFormat)
    n = q.shape[-1]
    return n, packed_width(n, q.format.bits), q.format.n_blocks(n)


def layout(fmt: Any) -> dict[str, Any]:
    """Return what a kernel is compiled for: how a block format stores its values."""
    return {
        "BITS": fmt.bits,
        "EXPONENT": fmt.element.exponent_bits,
        "MANTISSA": fmt.element.mantissa_bits,
        "SCALE": fmt.scale_format.name,
        "BLOCK": fmt.block_size or 0,
        "HAS_GLOBAL": fmt.has_global_scale,
    }
