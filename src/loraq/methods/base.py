"""The contract of all methods, and the pieces that every one of them needs.

A method is a frozen dataclass: its fields are its settings, `solve` is its only job. It sees one
matrix, never a module, a file or a model's name.
"""

import hashlib
import math
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.errors import CalibrationError, FormatError, SchemeError
from loraq.formats import QTensor
from loraq.formats.block import require_finite
from loraq.packed import LayerSolution, LowRankBranch
from loraq.scheme import Branch, Scheme
from loraq.stats import ActivationStats
from loraq.transforms import rotate


@runtime_checkable
class Method(Protocol):
    """One weight in, one `LayerSolution` out."""

    #: What becomes of statistics that are given: "required", "optional" or "ignored".
    use_of_stats: ClassVar[str]

    @property
    def needs_full_moment(self) -> bool:
        """Whether statistics of mean squares alone do not do."""
        ...

    def solve(
        self,
        weight: Float[Tensor, "out in"],
        scheme: Scheme,
        *,
        seed: int = 0,
        stats: ActivationStats | None = None,
    ) -> LayerSolution:
        """Return the quantized form of a weight.

        The same weight, scheme, seed, statistics and device give the same bytes.

        Args:
            weight: full-precision weight, rows are output channels; any float dtype.
            scheme: formats and rank.
            seed: of everything random inside; see `layer_seed`.
            stats: of the layer's inputs as the float model sees them; no method needs them but
                those whose `use_of_stats` is "required".

        Raises:
            CalibrationError: statistics are missing, or are not of this layer.
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
            f"Cannot quantize to '{scheme.weight}': the weight is {kind}. Loaded float weights of "
            f"16 bits or more are "
            "required."
        )
    require_finite(weight, scheme.weight)
    return rotate(weight.detach().float(), scheme.rotation).contiguous()


def prepare_stats(stats: ActivationStats, weight: Tensor, scheme: Scheme) -> ActivationStats:
    """Return statistics as the prepared weight sees its inputs: rotated as the scheme says, on the weight's device.

    Raises:
        CalibrationError: they are of a layer of another width.
    """
    if stats.width != weight.shape[1]:
        raise CalibrationError(
            f"The statistics are of {stats.width} input channels, the weight has "
            f"{weight.shape[1]}. Those of the same "
            "layer are required."
        )
    return stats.to(weight.device).rotated(scheme.rotation)


def require_stats(stats: ActivationStats | None, method: str) -> ActivationStats:
    """Return statistics, or raise `CalibrationError` for a method that is nothing without them."""
    if stats is None:
        raise CalibrationError(
            f"Method '{method}' needs activation statistics. Collect them with "
            f"`loraq.collect_stats` and give them "
            "as `stats` (`--stats`), or use a method without data, such as 'loraq'."
        )
    return stats


def full_moment(stats: ActivationStats, method: str) -> Float[Tensor, "in in"]:
    """Return E[x xᵀ], or raise `CalibrationError` if only its diagonal was collected."""
    if not stats.is_full:
        raise CalibrationError(
            f"Method '{method}' needs full second moments, and the statistics have mean squares "
            f"only. Collect them "
            "with `second_moment=True` (`loraq stats` without `--mean-squares`)."
        )
    return stats.second_moment


def require_branch(scheme: Scheme, method: str) -> Branch:
    """Return the scheme's branch, or raise `SchemeError` for a method that is nothing without one."""
    if scheme.branch is None:
        raise SchemeError(
            f"Method '{method}' fits a low-rank branch, but the scheme has none. Add a branch, or "
            f"use 'rtn'."
        )
    return scheme.branch


def quantize_branch(up: Tensor, down: Tensor, branch: Branch, rule: str | None) -> LowRankBranch:
    """Return both factors in the branch's format."""
    return LowRankBranch(
        proj_up=branch.weight_format.quantize(up, rule),
        proj_down=branch.weight_format.quantize(down, rule),
    )


def relative_error(weight: Tensor, residual: QTensor, branch: LowRankBranch | None) -> float:
    """Return ‖W − Ŵ‖_F / ‖W‖_F of what is stored; the absolute error if W is zero."""
    error = weight - residual.dequantize()
    if branch is not None:
        error -= branch.reconstruct()
    return frobenius(error).item() / (frobenius(weight).item() or 1.0)


def output_error(
    weight: Tensor, residual: QTensor, branch: LowRankBranch | None, stats: ActivationStats
) -> float:
    """Return √(E‖x (W − Ŵ)ᵀ‖² / E‖x Wᵀ‖²) of what is stored, for inputs of these statistics, not rounded.

    With mean squares alone it is that of uncorrelated channels.
    """
    error = weight - residual.dequantize()
    if branch is not None:
        error -= branch.reconstruct()
    return math.sqrt(_output_energy(error, stats) / (_output_energy(weight, stats) or 1.0))


def _output_energy(matrix: Tensor, stats: ActivationStats) -> float:
    moment = stats.second_moment.double()
    matrix = matrix.double()
    seen = matrix @ moment if stats.is_full else matrix * moment
    return max(0.0, (seen * matrix).sum().item())


def frobenius(matrix: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix in double precision, in which squares of fp32 numbers always fit."""
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64)


def energy(matrix: Tensor) -> Tensor:
    """Return the squared Frobenius norm of each matrix, summed in fp32 within a row unless that leaves fp32's range."""
    energy = torch.linalg.vector_norm(matrix, dim=-1).double().square().sum(-1)
    safe = ((energy > 1e-24) & (energy < 1e60)).all()
    return energy if safe else frobenius(matrix).square()
