"""Weights decoded once and kept: the default wherever nothing faster is exact.

Memory is that of the decoded weight (2 bytes a value for bf16 inputs, 4 for the others) on top of the packed bytes.
"""

from typing import ClassVar

import torch
from torch import Tensor

from loraq.kernels.base import Operands
from loraq.kernels.reference import run
from loraq.scheme import Scheme


class Resident:
    """Decode once, then multiply in the input's dtype; fp16 inputs compute in fp32, which CPUs do far faster."""

    name: ClassVar[str] = "resident"
    # fp32 differs from the reference only by what BLAS does; bf16 rounds operands, sums and output to 8 bits.
    tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
    keeps_operands: ClassVar[bool] = True

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return bf16 for bf16 inputs, else fp32."""
        return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

    def linear(self, x: Tensor, operands: Operands, scheme: Scheme, bias: Tensor | None) -> Tensor:
        """Return y (…, out) in the dtype of x (…, in)."""
        return run(x, operands, scheme, bias, operands.weight.dtype)
