"""INT8 rows: one scale for each output channel and each token, exact integer products.

For layers whose activations are plain INT8 (`int8`, one scale a token). The activation's codes are
then the operand itself, and `torch._int_mm` multiplies and adds without any rounding. A main weight
whose values fit INT8 rows is taken over exactly: `int8` always, the MX formats where the block
scales of a row are close together. Another weight is encoded anew, with a bound, if that is
allowed. A branch in `int8` projects down in integers, on the codes that the main product uses, and
up in the dtype of the input, added to the main product in place. Any other branch runs in bf16,
which holds every value of up to 8 bits.

On a CPU with AVX-512 VNNI the operands are packed (`int8_matrix`), and sums are written in bf16 for
inputs in bf16, else in fp32. The branch, divided by the token's scale, then comes first, the
product is added to it in place, and one last pass multiplies by that scale and adds the bias.

CPUs with VNNI multiply INT8 several times as fast as bf16, those with AMX units up to twice as fast
(docs/log.md), and NVIDIA GPUs before Hopper have no FP8.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.nn.functional import pad

from loraq.errors import KernelError
from loraq.formats import BlockFormat, Format
from loraq.formats.scales import SMALLEST_SCALE
from loraq.kernels.base import (
    Backend,
    decode_factors,
    decode_one,
    finish,
    flatten_tokens,
    pass_straight_through,
    work_dtype,
)
from loraq.kernels.int8_matrix import (
    TOP,
    UNSIGNED,
    Rows,
    can_pack,
    codes_of,
    encode_rows,
    is_int8_row,
    largest_magnitude,
    pack_rows,
    packed_product,
    parts_of,
    rows_of,
    saturates,
)
from loraq.packed import PackedWeight
from loraq.scheme import Scheme

#: Tokens encoded and multiplied at a time on a CPU: the passes over the sums find them in cache,
#: the product is efficient, and a large batch takes no more memory beside its output than a small
#: one.
_CHUNK_TOKENS = 256
_CHUNK_TOKENS_PACKED = 1024


class Int8Operands(NamedTuple):
    """What `int8_row` keeps."""

    #: The main weight.
    weight: Rows
    #: proj_down in INT8 and proj_up (out, rank) in the dtype of the sums, if the branch is in
    #: integers.
    branch: tuple[Rows, Tensor] | None
    #: proj_down and proj_up in bf16, if it is not.
    factors: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Int8Row(Backend):
    """Integer matrix products on INT8 rows."""

    #: Name for `get_backend`.
    name: str = "int8_row"
    #: Largest relative error of a main weight that is encoded anew; 0 takes only weights that fit
    #: exactly.
    weight_error: float = 3e-2
    #: Whether the layer keeps INT8 rows beside its stored bytes; else only weights that are stored
    #: as such rows are taken, and read where they are.
    keeps_operands: bool = True

    def refusal(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        """Return why a layer (out, in) cannot run here, judged without its values, or `None`."""
        if not is_int8_row(scheme.activation_format):
            kind = "INT8 with one scale a token ('int8')"
            return f"its activations are '{scheme.activation}', not {kind}"
        if not self.keeps_operands and not is_int8_row(scheme.weight_format):
            return f"'{scheme.weight}' is not stored as INT8 rows, and a copy would take memory"
        if not self.weight_error and not _may_fit(scheme.weight_format):
            return f"'{scheme.weight}' does not fit INT8 rows exactly"
        if device.type not in ("cpu", "cuda", "meta"):
            return f"INT8 matrix products are known on 'cpu' and 'cuda', not on '{device.type}'"
        if saturates(device):
            return "sums of INT8 products overflow on an x86 CPU without AVX-512 VNNI"
        sizes = (*shape, scheme.branch.rank) if scheme.branch and _in_integers(scheme) else shape
        if device.type == "cuda" and any(size % 8 for size in sizes):
            return f"its sizes {sizes} are not all multiples of 8"
        return None

    def bound(self, scheme: Scheme, dtype: torch.dtype) -> float:
        """Return the bound of exact operands, or that of a weight which is encoded anew."""
        if self.weight_error and not is_int8_row(scheme.weight_format):
            return 4e-2
        if dtype == torch.float32 and (scheme.branch is None or _in_integers(scheme)):
            return 1e-4  # sums are exact; a code of the intermediate may flip at a tie
        return 2e-2

    def prepare(self, packed: PackedWeight, scheme: Scheme, dtype: torch.dtype) -> Int8Operands:
        """Return INT8 rows.

        Raises:
            KernelError: the weight loses more than `weight_error` in INT8 rows.
        """
        rows, error = rows_of(packed.main)
        # Where nothing is lost the limit is not read: a compiler that is told that sizes vary would
        # take it for one of them, and begin anew.
        if error and error > self.weight_error:
            raise KernelError(
                f"INT8 rows change the weight in '{packed.scheme.weight}' by {error:.4f} of its "
                f"norm, and at most {self.weight_error} is allowed: its block scales differ too "
                "much within a row. Use the back end 'resident'."
            )
        packs = self.keeps_operands and can_pack(rows.codes.device)
        rows = pack_rows(rows) if packs else rows
        if packed.branch is None:
            return Int8Operands(rows, None, None)
        if not _in_integers(scheme):
            return Int8Operands(rows, None, decode_factors(packed.branch))
        down = codes_of(packed.branch.proj_down)
        up = decode_one(packed.branch.proj_up, work_dtype(dtype))
        return Int8Operands(rows, (pack_rows(down) if packs else down, up), None)

    def linear(
        self, x: Tensor, operands: Int8Operands, scheme: Scheme, bias: Tensor | None
    ) -> Tensor:
        """Return y (…, out) in the dtype of x (…, in)."""
        (codes, scale), branch, factors = operands
        rows = flatten_tokens(x)
        if branch is None:
            y = _int8_linear(rows, [codes], [scale], None, bias)
        else:
            down, up = branch
            y = _int8_linear(rows, [codes, down.codes], [scale, down.scale], up, bias)
        return finish(y, x, scheme, factors)  # the bias is in


def _may_fit(fmt: Format) -> bool:
    return is_int8_row(fmt) or (isinstance(fmt, BlockFormat) and fmt.scale_format.is_power_of_two)


def _in_integers(scheme: Scheme) -> bool:
    branch = scheme.branch
    if branch is None:
        return False
    return all(
        is_int8_row(f)
        for f in (branch.weight_format, branch.activation_format, branch.intermediate_format)
    )


def _packed_linear(
    x: Tensor, weight: Rows, down: Rows | None, up: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return the layer's output on packed operands, y = (main + branch) · token's scale + bias.

    The token's scale comes last: until then all is divided by it, which keeps the branch small
    enough for the dtype of the sums, and leaves one pass over y in place of three.
    """
    dtype = work_dtype(x.dtype)
    y = x.new_empty((len(x), len(weight.scale)), dtype=dtype)
    shift = x.new_zeros(1, dtype=dtype) if bias is None else bias.to(dtype)
    for part in parts_of(len(x), _CHUNK_TOKENS_PACKED):
        tokens, scale = encode_rows(x[part], UNSIGNED)  # (tokens, in), (tokens)
        if down is None or up is None:
            sums = packed_product(tokens, weight, dtype)
        else:
            # The branch comes first, so that oneDNN adds the main product to it as it writes.
            latent = _round_latent(packed_product(tokens, down, torch.float32))
            sums = packed_product(tokens, weight, dtype, added_to=latent.to(dtype) @ up.t())
        torch.addcmul(shift, sums, scale.to(dtype)[:, None], out=y[part])
    return y


def _round_latent(latent: Tensor) -> Tensor:
    """Put an intermediate on the grid of `int8`, in place.

    It is still divided by the token's scale, hence small.
    """
    scale = latent.new_empty((len(latent), 1))
    largest_magnitude(latent, out=scale)
    scale.mul_(1.0 / TOP).clamp_(min=SMALLEST_SCALE)
    return latent.div_(scale).round_().mul_(scale)


# One opaque operator: a compiler would unroll its chunks and trace again for every number of
# tokens. `codes` and `scales` are those of the main weight, then of proj_down if the branch is in
# integers.
@library.custom_op("loraq::int8_linear", mutates_args=())
def _int8_linear(
    x: Tensor, codes: list[Tensor], scales: list[Tensor], up: Tensor | None, bias: Tensor | None
) -> Tensor:
    n_tokens, dtype = len(x), work_dtype(x.dtype)
    if n_tokens == 0:
        return x.new_empty((0, len(scales[0])), dtype=dtype)
    if codes[0].is_mkldnn:
        weight, *down = map(Rows, codes, scales)
        return _packed_linear(x, weight, down[0] if down else None, up, bias)
    if x.is_cuda and n_tokens < 32:  # the CUDA product wants at least 17 rows
        padded = pad(x, (0, 0, 0, 32 - n_tokens))
        return _int8_linear(padded, codes, scales, up, bias)[:n_tokens].clone()
    y = x.new_empty((n_tokens, len(scales[0])), dtype=dtype)
    inner = y.new_empty((n_tokens, 0 if up is None else up.shape[1]))  # (tokens, rank)
    shift = torch.zeros(1, device=x.device) if bias is None else bias.float()
    # A part's int32 sums are scaled while they are in the cache; the up-projection is one product
    # for all tokens, added to y in place.
    for part in parts_of(n_tokens, _CHUNK_TOKENS if x.device.type == "cpu" else n_tokens):
        tokens, token_scale = encode_rows(x[part])  # (tokens, in), (tokens)
        scale = token_scale[:, None]
        y[part] = (torch._int_mm(tokens, codes[0].t()) * scales[0]).mul_(scale).add_(shift)
        if up is not None:
            latent = torch._int_mm(tokens, codes[1].t()) * scales[1]
            inner[part] = _round_latent(latent).mul_(scale)
    return y if up is None else y.addmm_(inner, up.t())


@_int8_linear.register_fake
def _(
    x: Tensor, codes: list[Tensor], scales: list[Tensor], up: Tensor | None, bias: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], scales[0].shape[0]), dtype=work_dtype(x.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, up, bias = inputs
    ctx.n_in, ctx.dtype = x.shape[1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*codes, *scales, up)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    *saved, up = ctx.saved_tensors
    codes, scales = saved[: len(saved) // 2], saved[len(saved) // 2 :]
    back = _int8_linear_back(gradient, codes, scales, up, ctx.n_in, ctx.dtype)
    bias = None if ctx.bias_dtype is None else gradient.float().sum(0).to(ctx.bias_dtype)
    nothing = [None] * len(codes)
    return back, nothing, nothing, None, bias


# Opaque as well: whether codes are packed is seen on the tensors themselves, not on a compiler's
# stand-ins.
@library.custom_op("loraq::int8_linear_back", mutates_args=())
def _int8_linear_back(
    gradient: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    up: Tensor | None,
    n_in: int,
    dtype: torch.dtype,
) -> Tensor:
    codes = [code.to_dense().t() if code.is_mkldnn else code for code in codes]
    branch = None if up is None else (codes[1], scales[1], up)
    return pass_straight_through(gradient, (codes[0], scales[0]), branch, dtype)


@_int8_linear_back.register_fake
def _(
    gradient: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    up: Tensor | None,
    n_in: int,
    dtype: torch.dtype,
) -> Tensor:
    return gradient.new_empty((gradient.shape[0], n_in), dtype=dtype)


_int8_linear.register_autograd(_backward, setup_context=_save)
