"""The contract of all methods, and the pieces that every one of them needs.

A method is a frozen dataclass: its fields are its settings, `solve` is its only job. It sees one matrix, never a
module, a file or a model's name.
"""

import hashlib
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.errors import FormatError, SchemeError
from loraq.formats import QTensor
from loraq.formats.block import require_finite
from loraq.scheme import Branch, LayerSolution, LowRankBranch, Scheme
from loraq.transforms import rotate


@runtime_checkable
class Method(Protocol):
    """One weight in, one `LayerSolution` out."""

    def solve(self, weight: Float[Tensor, "out in"], scheme: Scheme, *, seed: int = 0) -> LayerSolution:
        """Return the quantized form of a weight.

        The same weight, scheme, seed and device give the same bytes.

        Args:
            weight: full-precision weight, rows are output channels; any float dtype.
            scheme: formats and rank.
            seed: of everything random inside; see `layer_seed`.

        Raises:
            FormatError: a weight is NaN or infinite.
            SchemeError: the scheme does not fit the weight or the method.
        """
        ...


def layer_seed(seed: int, name: str) -> int:
    """Return the seed of one layer, from the recipe's seed and the layer's name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def prepare(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return the weight as contiguous fp32, rotated as the scheme says, after the checks that every method makes."""
    scheme.check(tuple(weight.shape))
    if weight.is_meta or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        kind = "on the meta device" if weight.is_meta else f"of {weight.dtype}"
        raise FormatError(
            f"Cannot quantize to '{scheme.weight}': the weight is {kind}. Loaded float weights of 16 bits or more are "
            "required."
        )
    require_finite(weight, scheme.weight)
    return rotate(weight.detach().float(), scheme.rotation).contiguous()


def require_branch(scheme: Scheme, method: str) -> Branch:
    """Return the scheme's branch, or raise `SchemeError` for a method that is nothing without one."""
    if scheme.branch is None:
        raise SchemeError(
            f"Method '{method}' fits a low-rank branch, but the scheme has none. Add a branch, or use 'rtn'."
        )
    return scheme.branch


def quantize_branch(up: Tensor, down: Tensor, branch: Branch, rule: str | None) -> LowRankBranch:
    """Return both factors in the branch's format."""
    return LowRankBranch(
        proj_up=branch.weight_format.quantize(up, rule), proj_down=branch.weight_format.quantize(down, rule)
    )


def relative_error(weight: Tensor, residual: QTensor, branch: LowRankBranch | None) -> float:
    """Return ‖W − Ŵ‖_F / ‖W‖_F of what is stored; the absolute error if W is zero."""
    error = weight - residual.dequantize()
    if branch is not None:
        error -= branch.reconstruct()
    return frobenius(error).item() / (frobenius(weight).item() or 1.0)


def frobenius(matrix: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix in double precision, in which squares of fp32 numbers always fit."""
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64)
