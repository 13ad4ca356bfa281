"""Up to 16 tokens by packed weights of every block format, 16-bit activations.

Modulation and timestep layers run once a step on one vector. Reading the weight is all their time,
so it is read packed and decoded in registers, and multiplied in bf16. The branch is not in here:
with so few tokens it is two tiny products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraq.formats import QTensor
from loraq.kernels.base import work_dtype
from loraq.kernels.triton.decode import decode_tile, layout, pointers, sizes


@triton.jit
def small_m_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    global_ptr,
    y_ptr,
    n_tokens,
    n_out,
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
    DOT32: tl.constexpr,
):
    """X (tokens, in), packed (out, in) -> y (tokens, out)."""
    tokens, columns = tl.arange(0, 16), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = columns < n_out
    sums = tl.zeros((BLOCK_N, 16), tl.float32)
    for start in range(0, n_in, BLOCK_K):
        values = decode_tile(
            packed_ptr,
            scale_ptr,
            global_ptr,
            columns,
            in_columns,
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
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + tokens[None, :] * n_in + k[:, None],
            (tokens < n_tokens)[None, :] & (k < n_in)[:, None],
            0.0,
        )
        if DOT32:
            sums = tl.dot(values, x.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(values.to(tl.bfloat16), x.to(tl.bfloat16), sums)
    there = in_columns[:, None] & (tokens < n_tokens)[None, :]
    tl.store(
        y_ptr + tokens[None, :] * n_out + columns[:, None], sums.to(y_ptr.dtype.element_ty), there
    )


def small_m(x: Tensor, q: QTensor) -> Tensor:
    """Return y (tokens, out) in the dtype of sums of x (tokens, in), for at most 16 tokens.

    Args:
        x: bf16 (other dtypes are multiplied as bf16).
        q: matrix (out, in) in a block format.
    """
    n_tokens, n_out = len(x), q.shape[0]
    y = torch.empty((n_tokens, n_out), dtype=work_dtype(x.dtype), device=x.device)
    small_m_kernel[(triton.cdiv(n_out, 16),)](
        x.contiguous(),
        *pointers(q),
        y,
        n_tokens,
        n_out,
        *sizes(q),
        **layout(q.format),
        BLOCK_N=16,
        BLOCK_K=256,
        DOT32=not x.is_cuda,
        num_warps=4,
    )
    return y
