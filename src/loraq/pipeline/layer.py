"""The job of one layer, the same for every driver: solve, name failures, report, build a module."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from loraq.devices import kind_of
from loraq.errors import LayerError, layer_failure
from loraq.experts import QuantizedExperts
from loraq.formats.faults import find_fault
from loraq.layers import LinearLayer, quantized_class
from loraq.methods.fits import Prepared
from loraq.nn import QuantizedLayer
from loraq.packed import LayerSolution, PackedStack, PackedWeight
from loraq.pipeline.arithmetic import fixed_arithmetic
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.report import LayerReport
from loraq.recipe import Recipe
from loraq.safetensors.header import DTYPE_NAMES
from loraq.safetensors.layout import tensor_bytes
from loraq.safetensors.reader import TensorReader
from loraq.stats import ActivationStats
from loraq.transforms import ONE


@dataclass(frozen=True, eq=False)
class FinishedLayer:
    """A layer that is solved: its bytes, and what to say of them."""

    packed: PackedWeight | PackedStack
    report: LayerReport
    #: Whether the model has a stack of experts as (experts, in, out).
    transposed: bool = False

    def build_module(
        self, old: LinearLayer | QuantizedLayer | Tensor, recipe: Recipe
    ) -> QuantizedLayer:
        """Return what takes the place of a layer: its kind and its bias, the new weight.

        Args:
            old: the layer, or the parameter that holds a stack of experts.
            recipe: what asked for it, for the record.
        """
        module: QuantizedLayer
        if isinstance(self.packed, PackedStack):
            assert isinstance(old, Tensor), "a stack is a parameter"
            module = QuantizedExperts.from_stack(
                self.packed, transposed=self.transposed, dtype=old.dtype
            )
        else:
            assert not isinstance(old, Tensor), "a linear layer is a module"
            kind = quantized_class(old)
            module = kind.from_packed(self.packed, old.bias, dtype=old.weight.dtype)
        module.record = {**self.report.record(), "recipe": recipe.to_dict()}
        return module


def quantize_layer(
    job: LayerJob,
    weight: Tensor | Iterable[Tensor],
    stats: ActivationStats | None = None,
    *,
    stats_sha256: str = "",
    prefix: str = "",
    device: torch.device | None = None,
) -> FinishedLayer:
    """Solve one layer and report on it; of a stack of experts, one after the other.

    Args:
        job: what the plan says of it.
        weight: (out, in), any float dtype; of a stack the matrix of each expert, as the model
            holds them.
        stats: of its inputs, for the methods that use them.
        stats_sha256: hash of the statistics, for the report.
        prefix: what stands before the layer's name in messages and in the report.
        device: where it is solved; what is returned is where the weight is. `None` solves it there.

    Raises:
        LayerError: the layer failed; the message names it, and the expert.
    """
    digest, dtype, kind, solutions = hashlib.sha256(), "", "", list[LayerSolution]()
    for part, matrix, stored in matrices_of(job, weight):
        home = matrix.device
        try:
            prepared = prepare_layer(part, matrix.to(device or home), stats)
            digest.update(tensor_bytes(stored))
            dtype, kind = DTYPE_NAMES[stored.dtype], kind_of(device or home)
            del matrix, stored  # what was read for this layer alone is freed before it is solved
            solution = solve_layer(part, prepared, stats)
            solutions.append(replace(solution, packed=solution.packed.to(home)))
        except Exception as error:
            raise layer_failure(prefix + part.name, error) from error
        del prepared
    packed = (
        PackedStack.of([solution.packed for solution in solutions])
        if job.is_stack
        else solutions[0].packed
    )
    relative_error = root_mean_square([solution.relative_error for solution in solutions])
    codes = solutions[0].packed.smooth_factor
    report = LayerReport(
        name=prefix + job.name,
        shape=job.shape,
        scheme=job.scheme,
        relative_error=relative_error,
        sqnr_db=-20 * math.log10(relative_error) if relative_error > 0 else math.inf,
        bits_per_weight=packed.bits_per_weight,
        nbytes=packed.nbytes,
        seconds=sum(solution.seconds for solution in solutions),
        source_sha256=digest.hexdigest(),
        source_dtype=dtype,
        stats_sha256=stats_sha256,
        output_error=None if job.is_stack else solutions[0].metrics.get("output_error"),
        metrics={} if job.is_stack else solutions[0].metrics,
        kept=job.is_kept,
        unsmoothed=codes is not None and bool((codes == ONE).all()),
        device=kind,
    )
    return FinishedLayer(packed, report, job.transposed)


def matrices_of(
    job: LayerJob, weight: Tensor | Iterable[Tensor]
) -> Iterator[tuple[LayerJob, Tensor, Tensor]]:
    """Iterate over the matrices of a layer: a stack of experts has several.

    Args:
        job: of the layer.
        weight: (out, in); of a stack, or from a file, the matrices as the model holds them.

    Yields:
        The job of the matrix alone, the matrix (out, in), and as the model holds it.
    """
    stored = weight if job.is_stack or not isinstance(weight, Tensor) else [weight]

    def name(index: int, matrix: Tensor) -> tuple[LayerJob, Tensor, Tensor]:
        part = job.of_expert(index) if job.is_stack else job
        # Contiguous: sums must not depend on how the matrix lies in memory.
        return part, matrix.t().contiguous() if job.transposed else matrix, matrix

    return map(name, count(), stored)  # which holds no matrix that its caller has let go


def read_matrices(reader: TensorReader, job: LayerJob) -> Iterator[Tensor]:
    """Read the matrices of a layer one by one, as the model holds them."""
    if job.is_stack:
        for index in range(job.shape[0]):
            yield reader.read_slice(job.weight_name, index)
    else:
        yield reader.read(job.weight_name).view(job.matrix)  # a 1×1 convolution is a matrix too


def root_mean_square(errors: list[float]) -> float:
    """Return the root of the mean square of errors; that of a single one as it is."""
    if len(errors) == 1:
        return errors[0]
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def solve_layer(
    job: LayerJob, weight: Tensor | Prepared, stats: ActivationStats | None = None
) -> LayerSolution:
    """Return one layer's solution: pure, and the same bytes whoever runs it."""
    device = (weight.weight if isinstance(weight, Prepared) else weight).device
    with torch.no_grad(), fixed_arithmetic(device):
        return job.method.solve(weight, job.scheme, seed=job.seed, stats=stats)


def prepare_layer(job: LayerJob, weight: Tensor, stats: ActivationStats | None = None) -> Prepared:
    """Return a weight as `solve_layer` takes it, which needs the weight itself no longer."""
    with torch.no_grad(), fixed_arithmetic(weight.device):
        return job.method.prepare(weight, job.scheme, stats)


def require_usable(job: LayerJob, weight: Tensor) -> None:
    """Raise `LayerError` unless a layer's weights are there, and numbers that can be quantized."""
    name = job.name
    if weight.is_meta:
        raise LayerError(
            f"Layer '{name}' has no weights (it is on the meta device). Load the model first."
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise LayerError(
            f"Layer '{name}' has weights of {weight.dtype}. Float weights of 16 bits or more "
            "are required."
        )
    for part, _, matrix in matrices_of(job, weight):
        if fault := find_fault(matrix):
            raise LayerError(f"Layer '{part.name}' cannot be quantized: {fault}")


def hash_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()
