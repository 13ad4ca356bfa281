"""Up to 16 tokens by packed MXFP4 or MXINT4 weights, 16-bit activations.

Modulation and timestep layers run once a step on one vector. Reading the weight is all their time,
so it is read packed and decoded in registers; a decoded value fits bf16 exactly. The branch is not
in here: with so few tokens it is two tiny products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraq.kernels.base import work_dtype


@triton.jit
def small_m_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    y_ptr,
    n_tokens,
    n_out,
    n_in,
    INTEGER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT32: tl.constexpr,
):
    """X (tokens, in), packed (out, in / 2), scale (out, in / 32) -> y (tokens, out)."""
    tokens, columns = tl.arange(0, 16), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_bytes, n_blocks = n_in // 2, n_in // 32
    sums = tl.zeros((BLOCK_N, 16), tl.float32)
    for start in range(0, n_in, BLOCK_K):
        k, byte = start + tl.arange(0, BLOCK_K), start // 2 + tl.arange(0, BLOCK_K // 2)
        block = start // 32 + tl.arange(0, BLOCK_K // 32)
        in_columns = (columns < n_out)[:, None]
        packed = tl.load(
            packed_ptr + columns.to(tl.int64)[:, None] * n_bytes + byte[None, :],
            in_columns & (byte < n_bytes)[None, :],
            0,
        ).to(tl.int32)
        codes = tl.interleave(packed & 15, packed >> 4)
        if INTEGER:
            values = ((codes ^ 8) - 8).to(tl.float32) * 0.25
        else:
            # E2M1 in the exponent and top fraction bit of fp32: 2^126 times the value, the
            # subnormal included.
            bits = ((codes & 8) << 28) | ((codes & 7) << 22)
            values = bits.to(tl.float32, bitcast=True) * 2.0**63 * 2.0**63
        exponent = tl.load(
            scale_ptr + columns[:, None] * n_blocks + block[None, :],
            in_columns & (block < n_blocks)[None, :],
            0,
        ).to(tl.int32)
        scale = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
        values = tl.reshape(values, (BLOCK_N, BLOCK_K // 32, 32)) * scale[:, :, None]
        values = tl.reshape(values, (BLOCK_N, BLOCK_K))
        x = tl.load(
            x_ptr + tokens[None, :] * n_in + k[:, None],
            (tokens < n_tokens)[None, :] & (k < n_in)[:, None],
            0.0,
        )
        if DOT32:
            sums = tl.dot(values, x.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(values.to(tl.bfloat16), x.to(tl.bfloat16), sums)
    there = (columns < n_out)[:, None] & (tokens < n_tokens)[None, :]
    tl.store(
        y_ptr + tokens[None, :] * n_out + columns[:, None], sums.to(y_ptr.dtype.element_ty), there
    )


def small_m(x: Tensor, packed: Tensor, scale: Tensor, *, integer: bool) -> Tensor:
    """Return y (tokens, out) in the dtype of sums of x (tokens, in), for at most 16 tokens.

    Args:
        x: bf16 (other dtypes are multiplied as bf16).
        packed: codes of MXFP4, or of MXINT4.
        scale: E8M0 bytes.
        integer: whether the codes are MXINT4.
    """
    (n_tokens, n_in), n_out = x.shape, len(packed)
    y = torch.empty((n_tokens, n_out), dtype=work_dtype(x.dtype), device=x.device)
    small_m_kernel[(triton.cdiv(n_out, 16),)](
        x.contiguous(),
        packed,
        scale,
        y,
        n_tokens,
        n_out,
        n_in,
        INTEGER=integer,
        BLOCK_N=16,
        BLOCK_K=256,
        DOT32=not x.is_cuda,
        num_warps=4,
    )
    return y
