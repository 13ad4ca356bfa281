"""A main product on block-scaled matrix units, with the up-projection in the same accumulator.

For GPUs whose tensor cores apply E8M0 scales of 32 values themselves (NVIDIA sm_100, AMD gfx950):
MXFP8 activations by MXFP4 weights as they are stored, no folding. Tests compile and interpret it;
it becomes a part of the `triton` back end once it was measured on such a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def mx_gemm_up_kernel(
    codes_ptr,
    scale_ptr,
    packed_ptr,
    weight_scale_ptr,
    inner_ptr,
    up_ptr,
    y_ptr,
    n_tokens,
    n_out,
    n_in,
    rank,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT32: tl.constexpr,
):
    """Compute y (tokens, out).

    Of codes (tokens, in) in e4m3, scale (tokens, in / 32), packed (out, in / 2) in e2m1,
    weight_scale (out, in / 32), inner (tokens, rank) and up (out, rank).
    """
    tiles_n = tl.cdiv(n_out, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = (rows < n_tokens)[:, None], (columns < n_out)[:, None]
    k, byte, block = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // 32)
    n_blocks, n_bytes = n_in // 32, n_in // 2
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(n_in, BLOCK_K)):
        at_k, at_byte, at_block = (
            step * BLOCK_K + k,
            step * (BLOCK_K // 2) + byte,
            step * (BLOCK_K // 32) + block,
        )
        a = tl.load(
            codes_ptr + rows[:, None] * n_in + at_k[None, :], in_rows & (at_k < n_in)[None, :], 0.0
        )
        a_scale = tl.load(
            scale_ptr + rows[:, None] * n_blocks + at_block[None, :],
            in_rows & (at_block < n_blocks)[None, :],
            0,
        )
        w = tl.load(
            packed_ptr + columns[None, :] * n_bytes + at_byte[:, None],
            (columns < n_out)[None, :] & (at_byte < n_bytes)[:, None],
            0,
        )
        w_scale = tl.load(
            weight_scale_ptr + columns[:, None] * n_blocks + at_block[None, :],
            in_columns & (at_block < n_blocks)[None, :],
            0,
        )
        sums = tl.dot_scaled(a, a_scale, "e4m3", w, w_scale, "e2m1", sums)
    ranks = tl.arange(0, RANK)
    p = tl.load(
        inner_ptr + rows[:, None] * rank + ranks[None, :], in_rows & (ranks < rank)[None, :], 0.0
    )
    u = tl.load(
        up_ptr + columns[None, :] * rank + ranks[:, None],
        (columns < n_out)[None, :] & (ranks < rank)[:, None],
        0.0,
    )
    if DOT32:
        sums = tl.dot(p.to(tl.float32), u.to(tl.float32), sums, input_precision="ieee")
    else:
        sums = tl.dot(p, u, sums)
    there = in_rows & (columns < n_out)[None, :]
    tl.store(
        y_ptr + rows[:, None] * n_out + columns[None, :], sums.to(y_ptr.dtype.element_ty), there
    )
