"""The back end of the Triton kernels; Triton itself is imported when a layer first runs.

* MXFP8 activations on e4m3 rows, the operands of `fp8_row`: `triton_quant_down` and
  `triton_gemm_up`, two launches with the branch inside.
* 16-bit activations on packed MXFP4 or MXINT4, nothing decoded: `triton_small_m` for up to 16
  tokens, and the decoding of `low_memory` for more.
"""

import os
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, library

from loraq.formats import CastFormat, QTensor
from loraq.kernels.base import Stored, decode_factors, side_path
from loraq.kernels.fp8_row import Fp8Operands, Fp8Row
from loraq.kernels.resident import Resident
from loraq.scheme import LowRankBranch, Scheme

_ROUNDED = "mxfp8_e4m3"
_PACKED = ("mxfp4", "mxint4")
#: The most tokens for which a layer is nothing but the reading of its weight.
SMALL_M = 16

_FP8_ROW = Fp8Row()
_LOW_MEMORY = Resident("low_memory", keeps_operands=False)


class TritonRow:
    """Fused kernels for GPUs with FP8, and for the few tokens of modulation layers."""

    name: ClassVar[str] = "triton"
    keeps_operands: ClassVar[bool] = True

    def refusal(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        """Return why a layer (out, in) cannot run here, judged without its values; `None` if it can."""
        if find_spec("triton") is None:
            return 'triton is not installed (pip install "loraq[triton]")'
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton compiles for GPUs; on a CPU it needs its interpreter (TRITON_INTERPRET=1), which is for tests"
        if _is_weight_only(scheme):
            if scheme.weight not in _PACKED or shape[1] % 32:
                return f"with 16-bit activations it reads {_PACKED} in whole blocks, not '{scheme.weight}' of {shape[1]}"
            return None
        branch = scheme.branch
        used = {scheme.activation} | (
            {branch.activation, branch.intermediate_format.name} if branch else set()
        )
        if used != {_ROUNDED}:
            return f"its activations are {sorted(used)}, and the kernel rounds all of them to '{_ROUNDED}'"
        return _FP8_ROW.refusal(scheme, shape, device)

    def bound(self, scheme: Scheme, dtype: torch.dtype) -> float:
        """Return the bound of bf16 operands and of sums in 13 bits."""
        return 2e-2

    def prepare(
        self, weight: QTensor, branch: LowRankBranch | None, scheme: Scheme, dtype: torch.dtype
    ) -> tuple[Stored, tuple[Tensor, Tensor] | None] | Fp8Operands:
        """Return the operands of `fp8_row`; or the packed weight, and the factors in bf16.

        Raises:
            KernelError: the weight cannot be folded exactly.
        """
        if not _is_weight_only(scheme):
            return _FP8_ROW.prepare(weight, branch, scheme, dtype)
        return Stored(weight, branch), decode_factors(branch) if branch else None

    def linear(self, x: Tensor, operands: Any, scheme: Scheme, bias: Tensor | None) -> Tensor:
        """Return y (…, out) in the dtype of x (…, in)."""
        rows = x.reshape(-1, x.shape[-1])
        if isinstance(operands, Fp8Operands):
            y = _fp8_branch_linear(
                rows, operands.codes, operands.scale, list(operands.factors or ()), bias
            )
            return y.view(*x.shape[:-1], len(operands.codes))
        stored, factors = operands
        if not 0 < len(rows) <= SMALL_M or (torch.is_grad_enabled() and x.requires_grad):
            return _LOW_MEMORY.linear(x, stored, scheme, bias)
        weight = stored.weight
        y = _small_m(rows, weight.packed, weight.scale, weight.format.name == "mxint4")
        if factors is not None:
            y = y + side_path(rows, factors, scheme)
        if bias is not None:
            y = y + bias
        return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _is_weight_only(scheme: Scheme) -> bool:
    return isinstance(scheme.activation_format, CastFormat)


@library.custom_op("loraq::triton_fp8_linear", mutates_args=())
def _fp8_branch_linear(
    x: Tensor, codes: Tensor, scale: Tensor, factors: list[Tensor], bias: Tensor | None
) -> Tensor:
    from loraq.kernels.triton_gemm_up import gemm_up
    from loraq.kernels.triton_quant_down import quant_down

    if len(x) == 0:
        return x.new_empty((0, len(codes)))
    tokens, token_scale, inner = quant_down(x, factors[0] if factors else None)
    branch = (inner, factors[1]) if factors else None
    return gemm_up((tokens, token_scale), (codes, scale), branch, bias, x.dtype)


@_fp8_branch_linear.register_fake
def _(
    x: Tensor, codes: Tensor, scale: Tensor, factors: list[Tensor], bias: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, factors, bias = inputs
    ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(codes, scale, *factors)


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Count the derivative of rounding as 1, as the rounding operator does."""
    codes, scale, *factors = ctx.saved_tensors
    towards = gradient.float()
    back = (towards * scale) @ codes.float()
    if factors:
        back += (towards @ factors[1].float()) @ factors[0].float()
    bias = None if ctx.bias_dtype is None else towards.sum(0).to(ctx.bias_dtype)
    return back.to(ctx.dtype), None, None, [None] * len(factors), bias


_fp8_branch_linear.register_autograd(_straight_through, setup_context=_save)


@library.custom_op("loraq::triton_small_m", mutates_args=())
def _small_m(x: Tensor, packed: Tensor, scale: Tensor, integer: bool) -> Tensor:
    from loraq.kernels.triton_small_m import small_m

    return small_m(x, packed, scale, integer=integer)


@_small_m.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, integer: bool) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))
