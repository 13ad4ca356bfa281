"""Matrices in INT8 with one scale a row: their encoding, and the product of packed ones.

On a CPU with AVX-512 VNNI a weight is packed: laid out once as oneDNN multiplies it. That product
is up to twice as fast as `torch._int_mm`, as exact, and writes the sums times the channel's scale
itself (docs/log.md).
"""

import os
import platform
from typing import NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from loraq.formats import BlockFormat, Format, QTensor
from loraq.formats.scale_rules import LARGEST
from loraq.formats.scales import SMALLEST_SCALE, view_bytes
from loraq.kernels.base import decode_one
from loraq.linalg import relative_error

#: Values encoded at a time on a CPU: in fp32 they fit the cache of one core.
_CHUNK_VALUES = 2**18
TOP = 127.0
#: Adding it rounds a small fp32 number to an integer, half to even, and leaves that integer in the
#: low bits.
_ROUNDER = 1.5 * 2.0**23
#: What a packed product wants added to the codes of the tokens: VNNI multiplies unsigned by signed
#: bytes only.
UNSIGNED = 128
#: Least limits of oneDNN under which its product is fast and exact; without a limit the CPU
#: decides.
_FAST_LIMITS = ("AVX512_CORE_", "AVX10", "ALL", "DEFAULT")


class Rows(NamedTuple):
    """A matrix in INT8 with one scale a row."""

    #: (rows, n), INT8; opaque if it is packed.
    codes: Tensor
    #: (rows,), fp32; multiplies.
    scale: Tensor


def rows_of(q: QTensor) -> tuple[Rows, float]:
    """Return INT8 rows of a stored matrix, and their relative error: 0 where they are the same."""
    if is_int8_row(q.format):
        return codes_of(q), 0.0
    dense = decode_one(q, torch.float32)
    largest = dense.abs().amax(-1)
    # The finest power of two that still leaves the largest value inside INT8: exact if any power of
    # two is.
    fine = torch.exp2(torch.ceil(torch.log2(largest / TOP))).clamp_(min=SMALLEST_SCALE)
    wide = (largest / TOP).clamp_(min=SMALLEST_SCALE)
    codes = dense / fine[:, None]
    fits = (codes == codes.round()).all(-1)
    scale = torch.where(fits, fine, wide)
    codes = (dense / scale[:, None]).round_().clamp_(-TOP, TOP)
    # In double precision: squares of small weights leave fp32, and a loss would look like none.
    lost = relative_error(dense, codes * scale[:, None])
    return Rows(codes.to(torch.int8), scale), lost


def codes_of(q: QTensor) -> Rows:
    """Return the bytes of an `int8` matrix as they are: no copy."""
    assert q.scale is not None
    return Rows(q.packed.view(torch.int8), view_bytes(q.scale, torch.float32).view(-1))


def is_int8_row(fmt: Format) -> bool:
    """Whether a format is plain INT8 with one scale a row."""
    return isinstance(fmt, BlockFormat) and fmt.element.name == "int8" and fmt.block_size is None


def can_pack(device: torch.device) -> bool:
    """Whether oneDNN multiplies packed INT8 fast and exactly.

    Without VNNI it is slow, or saturates sums. Before torch 2.11 no operator of ours may be given
    packed matrices, which have no storage.
    """
    if TorchVersion(torch.__version__) < "2.11":
        return False
    has_operator = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.onednn, "qlinear_prepack"
    )
    return device.type == "cpu" and has_operator and has_vnni()


def has_vnni() -> bool:
    """Whether this CPU adds products of bytes in 32 bits, and oneDNN is let use that."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    return torch.cpu._is_vnni_supported() and limit.upper().startswith(_FAST_LIMITS)


def saturates(device: torch.device) -> bool:
    """Whether `torch._int_mm` adds products of bytes in 16 bits.

    oneDNN has it do so on x86 CPUs without VNNI.
    """
    return (
        device.type == "cpu"
        and platform.machine().lower() in ("x86_64", "amd64")
        and not has_vnni()
    )


def pack_rows(rows: Rows) -> Rows:
    """Return rows in the layout of oneDNN's product; `codes.to_dense().t()` gives them back."""
    return Rows(torch.ops.onednn.qlinear_prepack(rows.codes, None), rows.scale)


def encode_rows(x: Tensor, offset: int = 0) -> Rows:
    """Return codes and scales of the format `int8`, bit for bit, in fewer passes.

    With the offset 128 the codes are unsigned.
    """
    n_tokens, n = x.shape
    parts = parts_of(n_tokens, max(1, _CHUNK_VALUES // n if x.device.type == "cpu" else n_tokens))
    scale = torch.empty((n_tokens, 1), dtype=torch.float32, device=x.device)
    for part in parts:
        largest_magnitude(x[part], out=scale[part])
    scale.clamp_(max=LARGEST).mul_(1.0 / TOP)
    scale.masked_fill_(scale < SMALLEST_SCALE, 0.0)
    divisor, rounder = scale.masked_fill(scale == 0, 1.0), scale.new_full((n,), _ROUNDER + offset)
    codes = torch.empty(x.shape, dtype=torch.uint8 if offset else torch.int8, device=x.device)
    for part in parts:
        # One pass divides, and then rounds by adding. Only infinities and values near the largest
        # need the clamp.
        values = x[part].to(torch.float32, copy=True)
        torch.addcdiv(rounder, values, divisor[part], out=values)
        values.clamp_(_ROUNDER + offset - TOP, _ROUNDER + offset + TOP)
        codes[part].copy_(values.view(torch.int32))  # keeps the low byte
    return Rows(codes, scale.view(-1))


def largest_magnitude(x: Tensor, out: Tensor) -> None:
    """Write the largest magnitude of every row, NaN if there is one in it."""
    if x.dtype.itemsize == 2:
        # Without the sign, the bits of floats are in the order of their values, NaN last.
        out.copy_(x.view(torch.int16).bitwise_and(0x7FFF).amax(-1, keepdim=True).view(x.dtype))
    else:
        out.copy_(x.abs().amax(-1, keepdim=True))


def parts_of(n_tokens: int, step: int) -> list[slice]:
    """Return slices of at most `step` tokens that cover all of them."""
    return [slice(start, min(start + step, n_tokens)) for start in range(0, n_tokens, step)]


def packed_product(
    tokens: Tensor, rows: Rows, dtype: torch.dtype, added_to: Tensor | None = None
) -> Tensor:
    """Return the product with unsigned codes (tokens, n) times the rows' scales.

    Or add it to a tensor in place, and return that.
    """
    given = (
        tokens,
        1.0,
        UNSIGNED,
        rows.codes,
        rows.scale,
        torch.zeros_like(rows.scale, dtype=torch.int64),
    )
    product = torch.ops.onednn.qlinear_pointwise
    if added_to is None:
        return product.default(*given, None, 1.0, 0, dtype, "none", [], "")
    return product.binary(*given, added_to, None, 1.0, 0, dtype, 1.0, 0, "sum", 1.0, "none", [], "")
