"""The job of one layer, the same for every driver: solve, name failures, report, build a module."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from loraq.errors import LayerError, layer_failure
from loraq.formats.faults import find_fault
from loraq.layers import LinearLayer, quantized_class
from loraq.nn import QuantizedLayer
from loraq.packed import LayerSolution, PackedWeight
from loraq.pipeline.arithmetic import fixed_arithmetic
from loraq.pipeline.plan import LayerJob
from loraq.pipeline.report import LayerReport
from loraq.recipe import Recipe
from loraq.safetensors.header import DTYPE_NAMES
from loraq.stats import ActivationStats


@dataclass(frozen=True, eq=False)
class FinishedLayer:
    """A layer that is solved: its bytes, and what to say of them."""

    packed: PackedWeight
    report: LayerReport

    def build_module(self, old: LinearLayer | QuantizedLayer, recipe: Recipe) -> QuantizedLayer:
        """Return what takes the place of a linear layer: its kind and its bias, the new weight."""
        kind = quantized_class(old)
        module = kind.from_packed(self.packed, old.bias, dtype=old.weight.dtype)
        module.record = {**self.report.record(), "recipe": recipe.to_dict()}
        return module


def quantize_layer(
    job: LayerJob, weight: Tensor, stats: ActivationStats | None = None, *, stats_sha256: str = ""
) -> FinishedLayer:
    """Solve one layer and report on it.

    Args:
        job: what the plan says of it.
        weight: (out, in), any float dtype.
        stats: of its inputs, for the methods that use them.
        stats_sha256: hash of the statistics, for the report.

    Raises:
        LayerError: the layer failed; the message names it.
    """
    try:
        solution = solve_layer(job, weight, stats)
    except Exception as error:
        raise layer_failure(job.name, error) from error
    report = LayerReport(
        name=job.name,
        shape=job.shape,
        scheme=job.scheme,
        relative_error=solution.relative_error,
        sqnr_db=solution.sqnr_db,
        bits_per_weight=solution.bits_per_weight,
        nbytes=solution.nbytes,
        seconds=solution.seconds,
        source_sha256=hash_tensor(weight),
        source_dtype=DTYPE_NAMES[weight.dtype],
        stats_sha256=stats_sha256,
        output_error=solution.metrics.get("output_error"),
        kept=job.is_kept,
    )
    return FinishedLayer(solution.packed, report)


def solve_layer(
    job: LayerJob, weight: Tensor, stats: ActivationStats | None = None
) -> LayerSolution:
    """Return one layer's solution: pure, and the same bytes whoever runs it."""
    with torch.no_grad(), fixed_arithmetic(weight.device):
        return job.method.solve(weight, job.scheme, seed=job.seed, stats=stats)


def require_usable(name: str, layer: LinearLayer) -> None:
    """Raise `LayerError` unless a layer's weights are there, and numbers that can be quantized."""
    if layer.weight.is_meta:
        raise LayerError(
            f"Layer '{name}' has no weights (it is on the meta device). Load the model first."
        )
    if not layer.weight.is_floating_point() or layer.weight.dtype.itemsize < 2:
        raise LayerError(
            f"Layer '{name}' has weights of {layer.weight.dtype}. Float weights of 16 bits or more "
            "are required."
        )
    if fault := find_fault(layer.weight):
        raise LayerError(f"Layer '{name}' cannot be quantized: {fault}")


def hash_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in row-major order."""
    raw = tensor.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(memoryview(raw.numpy().data)).hexdigest()
