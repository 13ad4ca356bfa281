"""The main FP8 product with the up-projection in the same accumulator.

The codes of activation and weight are multiplied as e4m3; the scales of the row and of the column
and the bias are applied once to the sums, and then proj_up is multiplied into the same registers in
bf16. Programs run over the output tiles in groups, so that the weight stays in the cache. Long sums
(`sums_fast` says which) are moved to fp32 after every block: Hopper's FP8 sums have 13 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraq.kernels.fp8_row import sums_fast


@triton.jit
def gemm_up_kernel(
    codes_ptr,
    scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    inner_ptr,
    up_ptr,
    bias_ptr,
    y_ptr,
    n_tokens,
    n_out,
    n_in,
    rank,
    HAS_BRANCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
    PROMOTE: tl.constexpr,
    DOT32: tl.constexpr,
):
    """Codes (tokens, in) x weight (out, in) + inner (tokens, rank) x up (out, rank) -> y."""
    tiles_m, tiles_n = tl.cdiv(n_tokens, BLOCK_M), tl.cdiv(n_out, BLOCK_N)
    tile = tl.program_id(0)
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    rows = (first + tile % (GROUP * tiles_n) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile % (GROUP * tiles_n) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = (rows < n_tokens)[:, None], (columns < n_out)[None, :]
    k = tl.arange(0, BLOCK_K)
    # Past the edge the first rows are read again: a mask in the loop would cost registers.
    left = codes_ptr + (rows % n_tokens).to(tl.int64)[:, None] * n_in + k[None, :]
    right = weight_ptr + (columns % n_out).to(tl.int64)[None, :] * n_in + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_in, BLOCK_K):
        if WHOLE_K:
            a, b = tl.load(left), tl.load(right)
        else:
            a = tl.load(left, (k < n_in - start)[None, :], 0.0)
            b = tl.load(right, (k < n_in - start)[:, None], 0.0)
        left += BLOCK_K
        right += BLOCK_K
        if DOT32:
            sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
        elif PROMOTE:
            sums = tl.dot(a, b, sums, max_num_imprecise_acc=BLOCK_K)
        else:
            sums = tl.dot(a, b, sums)
    sums *= tl.load(scale_ptr + rows, rows < n_tokens, 0.0)[:, None]
    sums *= tl.load(weight_scale_ptr + columns, columns < n_out, 0.0)[None, :]
    if HAS_BRANCH:
        ranks = tl.arange(0, RANK)
        p = tl.load(
            inner_ptr + rows[:, None] * rank + ranks[None, :],
            in_rows & (ranks < rank)[None, :],
            0.0,
        )
        u = tl.load(
            up_ptr + columns[None, :] * rank + ranks[:, None],
            in_columns & (ranks < rank)[:, None],
            0.0,
        )
        if DOT32:
            sums = tl.dot(p.to(tl.float32), u.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(p, u, sums)
    if HAS_BIAS:  # last: before the branch it would make 128 x 256 tiles spill
        sums += tl.load(bias_ptr + columns, columns < n_out, 0.0).to(tl.float32)[None, :]
    y = y_ptr + rows.to(tl.int64)[:, None] * n_out + columns[None, :]
    tl.store(y, sums.to(y_ptr.dtype.element_ty), in_rows & in_columns)


def gemm_up(
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    branch: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return y (tokens, out) of `dtype`.

    Args:
        left: codes (tokens, in) and scales (tokens,) of the activation.
        right: codes (out, in) and scales (out,) of the weight.
        branch: the intermediate (tokens, rank) and proj_up (out, rank) in bf16.
        bias: (out,), or `None`.
        dtype: of the output.
    """
    (n_tokens, n_in), n_out = left[0].shape, len(right[0])
    inner, up = branch or (None, None)
    rank = 0 if up is None else up.shape[1]
    y = torch.empty((n_tokens, n_out), dtype=dtype, device=left[0].device)
    # Promotion needs a second set of sums, and 128 x 256 tiles would spill them.
    promote = not sums_fast(n_in)
    # Blackwell would spill as well.
    hopper = y.is_cuda and torch.cuda.get_device_capability(y.device)[0] == 9
    wide = hopper and not promote and n_out >= 2048 and n_tokens >= 1024
    block_m, block_n = (128, 256) if wide else (128, 128)
    gemm_up_kernel[(triton.cdiv(n_tokens, block_m) * triton.cdiv(n_out, block_n),)](
        *left,
        *right,
        inner,
        up,
        bias,
        y,
        n_tokens,
        n_out,
        n_in,
        rank,
        HAS_BRANCH=up is not None,
        HAS_BIAS=bias is not None,
        RANK=max(32, triton.next_power_of_2(rank)),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=128,
        GROUP=8,
        WHOLE_K=n_in % 128 == 0,
        PROMOTE=promote,
        DOT32=not y.is_cuda,
        num_warps=8,
        num_stages=3,
    )
    return y
