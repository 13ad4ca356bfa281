"""Plain matrix products on decoded weights that are kept: the speed of `nn.Linear`, and its memory.

It takes the memory of the decoded weight (2 bytes a value for bf16 inputs, 4 for the others) beside
the packed bytes, and runs everywhere.

No activation is rounded, unless it is to be simulated: a product in 16 bits gains nothing from
that. So the branch is a part of the weight, and so is the rotation: (Qw(R) + U D) Rᵀ is one matrix,
and the layer costs what `nn.Linear` costs.
"""

import torch
from torch import Tensor

from loraq.kernels.base import Backend, Operands, decode, work_dtype
from loraq.kernels.reference import run
from loraq.packed import PackedWeight
from loraq.scheme import Scheme


class Resident(Backend):
    """Multiply in the input's dtype with decoded weights that are kept."""

    name = "resident"
    keeps_operands = True

    def as_run(self, scheme: Scheme) -> Scheme:
        """Return the scheme without any rounding of activations."""
        return scheme.weight_only()

    def refusal(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        """Return `None`: every layer runs."""
        return None

    def bound(self, scheme: Scheme, dtype: torch.dtype) -> float:
        """Return what BLAS's order of sums does in fp32, and what rounding to 8 bits does in bf16.

        A sum in another order may also round to the next fp16 number (2⁻¹¹), which few of them do.
        """
        return {torch.float16: 1e-4, torch.bfloat16: 2e-2}.get(dtype, 1e-5)

    def prepare(self, packed: PackedWeight, scheme: Scheme, dtype: torch.dtype) -> Operands:
        """Return the decoded weights; where no activation is rounded, as one matrix."""
        operands = decode(packed, work_dtype(dtype), scheme.rotation)
        return merge(operands) if scheme.is_weight_only else operands

    def linear(self, x: Tensor, operands: Operands, scheme: Scheme, bias: Tensor | None) -> Tensor:
        """Return y (…, out) in the dtype of x (…, in)."""
        return run(x, operands, scheme, bias, work_dtype(x.dtype))


def merge(operands: Operands) -> Operands:
    """Add the branch to the main weight, whose memory is used for the sum."""
    main, up, down = operands
    if up is None or down is None:
        return operands
    return Operands(main.addmm_(up, down), None, None)
