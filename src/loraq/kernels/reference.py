"""The definition of correct: plain torch, fp32 operands decoded at each call, any device."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraq.kernels.base import Backend, Operands, decode, finish, flatten_tokens, round_activation
from loraq.packed import PackedWeight
from loraq.scheme import Scheme


class Reference(Backend):
    """Decode at each call and multiply in fp32: slow, small, exact by definition."""

    name = "reference"
    keeps_operands = False

    def refusal(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        """Return `None`: every layer runs."""
        return None

    def bound(self, scheme: Scheme, dtype: torch.dtype) -> float:
        """Return 0: it is what others are measured against."""
        return 0.0

    def prepare(self, packed: PackedWeight, scheme: Scheme, dtype: torch.dtype) -> PackedWeight:
        """Return the packed weight."""
        return packed

    def linear(
        self, x: Tensor, operands: PackedWeight, scheme: Scheme, bias: Tensor | None
    ) -> Tensor:
        """Return y (…, out) in the dtype of x (…, in)."""
        dense = decode(operands, torch.float32, scheme.rotation)
        return run(x, dense, scheme, bias, torch.float32)


def run(
    x: Tensor, operands: Operands, scheme: Scheme, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Evaluate the layer's equation on operands of `dtype`."""
    main, proj_up, proj_down = operands
    rows = flatten_tokens(x)  # BLAS adds in another order for other strides
    seen = round_activation(rows, scheme.activation_format, dtype)
    y = linear(seen, main, None if bias is None else bias.to(dtype))  # (tokens, out)
    if scheme.branch is not None and proj_up is not None and proj_down is not None:
        # Rounding costs more than these products, so it is done once where the formats are equal.
        if scheme.branch.activation_format != scheme.activation_format:
            seen = round_activation(rows, scheme.branch.activation_format, dtype)
        inner = linear(seen, proj_down)  # (tokens, rank)
        inner = round_activation(inner, scheme.branch.intermediate_format, dtype)
        y = y + linear(inner, proj_up)
    return finish(y, x, scheme, is_exact=dtype != torch.bfloat16)
