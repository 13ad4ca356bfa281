"""One pass over the activation: to MXFP8 on one exponent a token, and down to the rank space.

Each program takes some tokens with all of their channels, twice: first the largest magnitude, which
the token's exponent follows from, then rounding, storing and multiplying by proj_down. The
rank-space intermediate is rounded to MXFP8 before it leaves, and stored as bf16, which holds every
such value. No atomics; one launch.

A block whose largest magnitude is below 2^-118 is rounded on the scale 2^-126; the reference goes
on to 2^-127.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _mx_scale(largest):
    """OCP MX v1.0, section 6.3, for E4M3: 2^(floor(log2 largest) - 8)."""
    # A token of an infinity saturates, as in the reference: its binade is that of fp32's largest.
    bits = tl.minimum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 0x7F000000)
    return tl.maximum(bits.to(tl.float32, bitcast=True), 2.0**-118) * 2.0**-8


@triton.jit
def _inverse(power_of_two):
    """Exact, as a division on a GPU is not."""
    return (0x7F000000 - power_of_two.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _round_e4m3(y):
    """To nearest, ties to even, saturating: the adder rounds at the step of each binade.

    NaN stays NaN, which minimum and maximum would drop.
    """
    y = tl.maximum(y, -448.0, propagate_nan=tl.PropagateNan.ALL)
    y = tl.minimum(y, 448.0, propagate_nan=tl.PropagateNan.ALL)
    binade = (y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(binade, 2.0**-6) * 1572864.0  # 1.5 * 2^(23 - 3)
    return (y + shift) - shift


@triton.jit
def quant_down_kernel(
    x_ptr,
    down_ptr,
    codes_ptr,
    scale_ptr,
    inner_ptr,
    n_tokens,
    n_in,
    rank,
    HAS_BRANCH: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT32: tl.constexpr,
):
    """X (tokens, in), proj_down (rank, in) -> codes (tokens, in), scale (tokens), inner."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, RANK)
    row_start = rows.to(tl.int64)[:, None] * n_in
    # As bits, magnitudes are in the order of their values with NaN last, which a maximum of floats
    # would drop.
    largest = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, n_in, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = (rows < n_tokens)[:, None] & (k < n_in)[None, :]
        x = tl.load(x_ptr + row_start + k[None, :], there, 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    token_scale = _mx_scale(largest.to(tl.float32, bitcast=True))
    inverse = _inverse(token_scale)
    inner = tl.zeros((BLOCK_M, RANK), tl.float32)
    for start in range(0, n_in, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = (rows < n_tokens)[:, None] & (k < n_in)[None, :]
        x = tl.load(x_ptr + row_start + k[None, :], there, 0.0).to(tl.float32)
        blocks = tl.reshape(x, (BLOCK_M, BLOCK_K // 32, 32))
        scale = _mx_scale(tl.max(tl.abs(blocks), 2))
        values = _round_e4m3(blocks * _inverse(scale)[:, :, None]) * scale[:, :, None]
        values = tl.reshape(values, (BLOCK_M, BLOCK_K))
        tl.store(
            codes_ptr + row_start + k[None, :], (values * inverse[:, None]).to(tl.float8e4nv), there
        )
        if HAS_BRANCH:
            down = tl.load(
                down_ptr + ranks[None, :] * n_in + k[:, None],
                (ranks < rank)[None, :] & (k < n_in)[:, None],
                0.0,
            )
            if DOT32:
                inner = tl.dot(values, down.to(tl.float32), inner, input_precision="ieee")
            else:
                inner = tl.dot(values.to(tl.bfloat16), down, inner)
    # A code need not hold NaN where a cast saturates; the scale makes all of the token NaN.
    token_scale = tl.where(largest > 0x7F800000, float("nan"), token_scale)
    tl.store(scale_ptr + rows, token_scale, rows < n_tokens)
    if HAS_BRANCH:
        blocks = tl.reshape(inner, (BLOCK_M, RANK // 32, 32))
        scale = _mx_scale(tl.max(tl.abs(blocks), 2))
        rounded = _round_e4m3(blocks * _inverse(scale)[:, :, None]) * scale[:, :, None]
        rounded = tl.reshape(rounded, (BLOCK_M, RANK)).to(tl.bfloat16)
        there = (rows < n_tokens)[:, None] & (ranks < rank)[None, :]
        tl.store(inner_ptr + rows[:, None] * rank + ranks[None, :], rounded, there)


def quant_down(x: Tensor, down: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return e4m3 codes (tokens, in), fp32 scales (tokens) and the intermediate (tokens, rank)."""
    (n_tokens, n_in), rank = x.shape, 0 if down is None else len(down)
    codes = torch.empty((n_tokens, n_in), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((n_tokens,), dtype=torch.float32, device=x.device)
    inner = torch.empty((n_tokens, rank), dtype=torch.bfloat16, device=x.device)
    block = 16 if n_tokens <= 1024 else 32
    quant_down_kernel[(triton.cdiv(n_tokens, block),)](
        x.contiguous(),
        down,
        codes,
        scale,
        inner,
        n_tokens,
        n_in,
        rank,
        HAS_BRANCH=down is not None,
        RANK=max(32, triton.next_power_of_2(rank)),
        BLOCK_M=block,
        BLOCK_K=128,
        DOT32=not x.is_cuda,
    )
    return codes, scale, inner
