"""The definition of correct: plain torch, fp32 operands decoded at each call, fp32 accumulation, any device."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraq.formats import QTensor
from loraq.kernels.base import Operands, Stored, decode, rounded
from loraq.scheme import LowRankBranch, Scheme


class Reference:
    """Decode at each call and multiply in fp32: slow, small, exact by definition."""

    name: ClassVar[str] = "reference"
    keeps_operands: ClassVar[bool] = False

    def refusal(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        """Return `None`: every layer runs."""
        return None

    def bound(self, scheme: Scheme, dtype: torch.dtype) -> float:
        """Return 0: it is what others are measured against."""
        return 0.0

    def prepare(
        self, weight: QTensor, branch: LowRankBranch | None, scheme: Scheme, dtype: torch.dtype
    ) -> Stored:
        """Return the stored tensors."""
        return Stored(weight, branch)

    def linear(self, x: Tensor, operands: Stored, scheme: Scheme, bias: Tensor | None) -> Tensor:
        """Return y (…, out) in the dtype of x (…, in)."""
        return run(x, decode(*operands, torch.float32), scheme, bias, torch.float32)


def run(
    x: Tensor, operands: Operands, scheme: Scheme, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Evaluate the layer's equation on operands of `dtype`."""
    weight, proj_up, proj_down = operands
    rows = x.reshape(-1, x.shape[-1])  # BLAS adds in another order for other strides
    seen = rounded(rows, scheme.activation_format, dtype)
    y = linear(seen, weight, None if bias is None else bias.to(dtype))
    if scheme.branch is not None and proj_up is not None and proj_down is not None:
        if (
            scheme.branch.activation_format != scheme.activation_format
        ):  # rounding costs more than these products
            seen = rounded(rows, scheme.branch.activation_format, dtype)
        inner = linear(seen, proj_down)
        y = y + linear(rounded(inner, scheme.branch.intermediate_format, dtype), proj_up)
    return y.to(x.dtype).view(*x.shape[:-1], len(weight))
