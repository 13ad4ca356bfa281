"""Exact rewrites of a layer's input and weight: smoothing of channels, then a Hadamard rotation.

Smoothing divides each input channel by a factor that the weight's column is multiplied by:
`x Wᵀ = (x / s) (W s)ᵀ` (SmoothQuant, arXiv 2211.10438; SVDQuant, arXiv 2411.05007, section 4.2). It
moves what is hard to round from the one to the other. Factors are stored, a byte for each channel;
they need not be exact, because both sides take what is stored.

`x Wᵀ = (x R) (W R)ᵀ` for every orthogonal R. A Hadamard matrix spreads a channel that stands out
over its whole block, which is what 4-bit activations need: a block's scale follows its largest
value (QuaRot, arXiv 2404.00456; ConvRot, arXiv 2512.03673, for diffusion transformers). The
rotation of the weight happens once, that of the input at every call; it stores nothing.

The signs are a quadratic sequence (Golay, Rudin and Shapiro) instead of random ones: they need no
seed and no bytes, and a block of equal values, which a bare Hadamard matrix would gather in one
entry, is spread perfectly evenly when the side is a power of four, because the sequence is then
bent.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, library

#: Codes of smoothing factors in an octave, and the code of the factor 1: factors are from 2^−8 to
#: 2^7.9, in steps of 4 %.
STEPS, ONE = 16, 128
#: Values that are rotated at a time on a CPU, so that their copies in fp32 stay in cache.
_CHUNK_VALUES = 1 << 18


def smooth(
    x: Float[Tensor, "*lead n"], codes: UInt8[Tensor, " n"] | None
) -> Float[Tensor, "*lead n"]:
    """Return x / s in the dtype of x: an input as the smoothed weight takes it.

    Args:
        x: any float dtype; the product is taken in fp32.
        codes: of s, each 2^((code − 128) / 16); `None` changes nothing.
    """
    if codes is None:
        return x
    # One copy in fp32, not two: activations may be larger than the weight.
    factor = torch.exp2((ONE - codes.float()) / STEPS)
    return x.to(torch.float32, copy=True).mul_(factor).to(x.dtype)


def unsmooth(
    x: Float[Tensor, "*lead n"], codes: UInt8[Tensor, " n"] | None
) -> Float[Tensor, "*lead n"]:
    """Return x s: a weight as it is stored, and the inverse of `smooth` up to fp32 rounding."""
    if codes is None:
        return x
    return (x.float() * torch.exp2((codes.float() - ONE) / STEPS)).to(x.dtype)


def rotate(x: Float[Tensor, "*lead n"], side: int) -> Float[Tensor, "*lead n"]:
    """Return x R in the dtype of x.

    Args:
        x: any float dtype; the product is taken in fp32.
        side: power of two; the blocks of R are as large as it and the width n allow (`block_side`).
            0 changes nothing.
    """
    return _rotate(x, side, False) if side else x


def unrotate(x: Float[Tensor, "*lead n"], side: int) -> Float[Tensor, "*lead n"]:
    """Return x Rᵀ: the inverse of `rotate` up to fp32 rounding."""
    return _rotate(x, side, True) if side else x


def unrotate_(x: Float[Tensor, "*lead n"], side: int, at_once: int) -> None:
    """Make x Rᵀ of a contiguous x in its own memory, about `at_once` values at a time."""
    if side:
        _turn(x, side, True, at_once, out=x)


def block_side(n: int, side: int) -> int:
    """Return the side of the blocks on an axis of n: the largest power of two in both."""
    return math.gcd(n, side) if side else 1


@lru_cache(maxsize=32)
def signed_hadamard(side: int, device: torch.device | None = None) -> Float[Tensor, "side side"]:
    """Return diag(signs) H / √side, orthogonal, on a device (`None`: the CPU); H is Sylvester's.

    It is kept on each device: a copy at every call would wait for it, and no CUDA graph holds one.
    """
    index = torch.arange(side, device="cpu")
    # The entry (i, j) of Sylvester's matrix is −1 to the number of bits that i and j share; the
    # sign of row i is −1 to the number of neighbouring pairs of ones in i.
    shared = _parity(index[:, None] & index[None]) ^ _parity(index & (index >> 1))[:, None]
    return ((1 - 2 * shared).float() / math.sqrt(side)).to(device or "cpu")


def _parity(bits: Tensor) -> Tensor:
    for shift in (16, 8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return bits & 1


# Opaque to `torch.compile`, like the rounding that follows it.
@library.custom_op("loraq::rotate", mutates_args=())
def _rotate(x: Tensor, side: int, inverse: bool) -> Tensor:
    at_once = _CHUNK_VALUES if x.device.type == "cpu" else x.numel()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _turn(x, side, inverse, at_once, out=out)
    return out


@_rotate.register_fake
def _(x: Tensor, side: int, inverse: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _turn(x: Tensor, side: int, inverse: bool, at_once: int, *, out: Tensor) -> None:
    """Write x R, or x Rᵀ, a few rows at a time; `out` may be x."""
    n = x.shape[-1]
    matrix = signed_hadamard(block_side(n, side), x.device)
    matrix = matrix.mT if inverse else matrix
    both = x.reshape(-1, n), out.view(-1, n)
    # Parts of equal size: BLAS may add in another order where few rows are left over.
    n_parts = max(1, min(len(both[0]), math.ceil(x.numel() / max(1, at_once))))
    for rows, turned in zip(*(tensor.tensor_split(n_parts) for tensor in both), strict=True):
        blocks = rows.float().unflatten(-1, (-1, len(matrix)))
        turned.copy_((blocks @ matrix).flatten(-2))


def _keep_direction(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
    _, ctx.side, ctx.inverse = inputs


def _rotate_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _rotate(gradient, ctx.side, not ctx.inverse), None, None


_rotate.register_autograd(_rotate_back, setup_context=_keep_direction)
