"""The back end of the Triton kernels; Triton itself is imported when a layer first runs.

* MXFP8 activations on e4m3 rows, the operands of `fp8_row`: `quant_down` and `gemm_up`, two
  launches with the branch inside.
* 16-bit activations on packed weights of every block format, nothing decoded: `small_m` for up to
  16 tokens, and the decoding of `low_memory` for more.
"""

from typing import Any

import torch
from torch import Tensor, library

from loraq.formats import CastFormat, QTensor, get_format
from loraq.kernels.base import (
    Backend,
    decode_factors,
    finish,
    flatten_tokens,
    pass_straight_through,
    work_dtype,
)
from loraq.kernels.fp8_row import Fp8Operands, Fp8Row
from loraq.kernels.low_memory import LowMemory
from loraq.kernels.triton.presence import absence
from loraq.packed import PackedWeight
from loraq.scheme import Scheme

_ROUNDED = "mxfp8_e4m3"
#: The most tokens for which a layer is nothing but the reading of its weight.
SMALL_M = 16

_FP8_ROW = Fp8Row()
_LOW_MEMORY = LowMemory()


class TritonRow(Backend):
    """Fused kernels for GPUs with FP8, and for the few tokens of modulation layers."""

    name = "triton"
    keeps_operands = True

    def refusal(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        """Return why a layer (out, in) cannot run here, judged without its values, or `None`."""
        if reason := absence(device):
            return reason
        if _is_weight_only(scheme):
            if not isinstance(scheme.weight_format, CastFormat):
                return None
            return f"it reads packed weights, not '{scheme.weight}'"
        used = {scheme.activation}
        if branch := scheme.branch:
            used |= {branch.activation, branch.intermediate_format.name}
        if used != {_ROUNDED}:
            return (
                f"its activations are {sorted(used)}, and the kernel rounds all of them to "
                f"'{_ROUNDED}'"
            )
        return _FP8_ROW.refusal(scheme, shape, device)

    def bound(self, scheme: Scheme, dtype: torch.dtype) -> float:
        """Return the bound of bf16 operands and of sums in 13 bits."""
        return 2e-2

    def prepare(
        self, packed: PackedWeight, scheme: Scheme, dtype: torch.dtype
    ) -> tuple[PackedWeight, tuple[Tensor, Tensor] | None] | Fp8Operands:
        """Return the operands of `fp8_row`; or the packed weight, and the factors in bf16.

        Raises:
            KernelError: the weight cannot be folded exactly.
        """
        if not _is_weight_only(scheme):
            return _FP8_ROW.prepare(packed, scheme, dtype)
        return packed, decode_factors(packed.branch)

    def linear(self, x: Tensor, operands: Any, scheme: Scheme, bias: Tensor | None) -> Tensor:
        """Return y (…, out) in the dtype of x (…, in)."""
        rows = flatten_tokens(x)
        if isinstance(operands, Fp8Operands):
            codes, scale, factors = operands
            return finish(
                _fp8_branch_linear(rows, codes, scale, list(factors or ()), bias), x, scheme
            )
        packed, factors = operands
        if not 0 < len(rows) <= SMALL_M or (torch.is_grad_enabled() and x.requires_grad):
            return _LOW_MEMORY.linear(x, packed, scheme, bias)
        main = packed.main
        y = _small_m(rows, main.packed, main.scale, main.global_scale, main.format.name)
        return finish(y, x, scheme, factors, bias)


def _is_weight_only(scheme: Scheme) -> bool:
    return isinstance(scheme.activation_format, CastFormat)


@library.custom_op("loraq::triton_fp8_linear", mutates_args=())
def _fp8_branch_linear(
    x: Tensor, codes: Tensor, scale: Tensor, factors: list[Tensor], bias: Tensor | None
) -> Tensor:
    from loraq.kernels.triton.gemm_up import gemm_up
    from loraq.kernels.triton.quant_down import quant_down

    if len(x) == 0:
        return x.new_empty((0, len(codes)), dtype=work_dtype(x.dtype))
    tokens, token_scale, inner = quant_down(x, factors[0] if factors else None)
    branch = (inner, factors[1]) if factors else None
    return gemm_up((tokens, token_scale), (codes, scale), branch, bias, work_dtype(x.dtype))


@_fp8_branch_linear.register_fake
def _(
    x: Tensor, codes: Tensor, scale: Tensor, factors: list[Tensor], bias: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=work_dtype(x.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, factors, bias = inputs
    ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(codes, scale, *factors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    codes, scale, *factors = ctx.saved_tensors
    branch = (factors[0], 1.0, factors[1]) if factors else None
    back = pass_straight_through(gradient, (codes, scale), branch, ctx.dtype)
    bias = None if ctx.bias_dtype is None else gradient.float().sum(0).to(ctx.bias_dtype)
    return back, None, None, [None] * len(factors), bias


_fp8_branch_linear.register_autograd(_backward, setup_context=_save)


@library.custom_op("loraq::triton_small_m", mutates_args=())
def _small_m(
    x: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor | None, name: str
) -> Tensor:
    from loraq.kernels.triton.small_m import small_m

    shape = (len(packed), x.shape[1])
    return small_m(x, QTensor(packed, scale, global_scale, shape, get_format(name)))


@_small_m.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor | None, name: str) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]), dtype=work_dtype(x.dtype))
