"""`quantize_weight` and `quantize_`: the same pure layer job for one matrix and for every layer of a module."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraq.checkpoint.pretrained import attach_save_pretrained
from loraq.errors import FormatError, LayerError, RecipeError, SchemeError, unknown
from loraq.formats.block import require_finite
from loraq.layers import (
    LinearLayer,
    linear_layers,
    matrix_of,
    quantized_class,
    quantized_layers,
    replace_layer,
)
from loraq.methods import layer_seed
from loraq.methods.prediction import Prediction
from loraq.nn import QuantizedLinear
from loraq.packed import LayerSolution
from loraq.pipeline.plan import LayerPlan, Plan
from loraq.pipeline.progress import ProgressCallback, progress_bar
from loraq.pipeline.sharing import allocated, collected, predicted_layer, sharing_layers
from loraq.pipeline.stats import Stats, hashes_of_used, opened
from loraq.pipeline.workers import one_thread
from loraq.recipe import METHODS, Recipe
from loraq.scheme import Scheme
from loraq.stats import ActivationStats


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer; plain data, stored in the manifest."""

    name: str
    #: (out, in).
    shape: tuple[int, int]
    scheme: Scheme
    #: ‖W − Ŵ‖_F / ‖W‖_F.
    relative_error: float
    sqnr_db: float
    bits_per_weight: float
    #: Bytes stored for the weight.
    nbytes: int
    #: Wall time of the solver.
    seconds: float
    #: SHA-256 of the float weight's bytes, in its own dtype.
    source_sha256: str
    #: SHA-256 of the statistics that were used; empty for none.
    stats_sha256: str = ""
    #: The same ratio of the layer's outputs, activations not rounded, by the statistics; `None`
    #: without any.
    output_error: float | None = None

    def record(self) -> dict[str, float | int | str]:
        """Return what a checkpoint keeps of this besides shape and scheme: plain data, the same for every run."""
        names = (
            "relative_error",
            "output_error",
            "bits_per_weight",
            "nbytes",
            "source_sha256",
            "stats_sha256",
        )
        return {name: value for name in names if (value := getattr(self, name)) not in ("", None)}


@dataclass(frozen=True)
class Report:
    """What became of a model."""

    recipe: Recipe
    plan: Plan
    layers: tuple[LayerReport, ...]
    #: How many of them an interrupted run had finished before.
    kept: int = 0

    @property
    def mean_relative_error(self) -> float:
        """Mean of the layers' relative errors."""
        return sum(layer.relative_error for layer in self.layers) / max(1, len(self.layers))

    @property
    def mean_output_error(self) -> float | None:
        """Mean of the output errors of the layers that statistics made; `None` if there are none."""
        known = [layer.output_error for layer in self.layers if layer.output_error is not None]
        return sum(known) / len(known) if known else None


def quantize_weight(
    weight: Float[Tensor, "out in"],
    recipe: str | Path | Scheme | Recipe,
    *,
    method: str | None = None,
    seed: int | None = None,
    name: str = "",
    stats: ActivationStats | None = None,
) -> LayerSolution:
    """Quantize one weight.

    Args:
        weight: full-precision weight, rows are output channels; any float dtype and device.
        recipe: a recipe, a scheme, a name such as "mxfp4-a4+w8a8-r64", or a path to a .toml or
        .json file.
        method: overrides the recipe's method ("loraq", "svdquant", "lqer", "rtn", "gptq", "qera").
        seed: overrides the recipe's seed.
        name: name of the layer: selects the recipe's rules, and goes into the seed.
        stats: of the layer's inputs, for the methods that use them.

    Returns:
        The solution: `.reconstruct()`, `.relative_error`, `.sqnr_db`, `.bits_per_weight`,
        `.nbytes`, `.seconds`.

    Raises:
        CalibrationError: the method needs statistics, or they are not of this layer.
        FormatError: a weight is NaN or infinite.
        RecipeError: the recipe cannot be read, or skips this layer.
        SchemeError: the scheme does not fit the weight.
    """
    recipe = Recipe.of(recipe)
    if method is not None:
        if method not in METHODS:
            raise RecipeError(unknown("method", method, METHODS))
        recipe = replace(recipe, method=method)
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    if weight.dim() != 2:
        raise SchemeError(
            f"Weight has shape {tuple(weight.shape)}. A matrix (out, in) is required."
        )
    scheme = recipe.scheme_for(name, (weight.shape[0], weight.shape[1]))
    if scheme is None:
        raise RecipeError(f"The recipe skips layer '{name}'. Use another name, or remove the rule.")
    return solve_layer(weight, recipe, scheme, name, stats)


def plan_model(
    model: nn.Module,
    recipe: str | Path | Scheme | Recipe,
    *,
    workers: int = 1,
    progress: ProgressCallback | bool = True,
) -> Plan:
    """Return what `quantize_` would do with a module.

    The module may be on the meta device, unless the recipe allocates: then every weight is looked
    at.

    Args:
        model: any module; its class name selects the rules of its families.
        recipe: a recipe, a scheme, a name, or a path to a .toml or .json file.
        workers: layers looked at at a time, if the recipe allocates; the plan does not depend on
        it.
        progress: as for `quantize_`; a function is not called here.

    Raises:
        LayerError: the module itself is a linear layer; or the recipe allocates, and a layer's
            weights cannot be used: the message names it.
        RecipeError: the recipe cannot be read, or allocates where it cannot.
        SchemeError: a layer cannot be quantized as asked; the message carries its name.
    """
    recipe = Recipe.of(recipe)
    return _allocated(model, Plan.of_model(model, recipe), recipe, workers, progress)


def _allocated(
    model: nn.Module, plan: Plan, recipe: Recipe, workers: int, progress: ProgressCallback | bool
) -> Plan:
    """Return the plan that a recipe's allocation makes of a module's weights."""
    if not (sharing := sharing_layers(plan, recipe)):
        return plan
    if done := quantized_layers(model):
        raise RecipeError(
            f"{len(done)} layers of {type(model).__name__} are quantized already, and sharing a "
            f"budget needs the float "
            "weights of all. Start from the float model, or use allocation 'uniform'."
        )
    layers = linear_layers(model)
    for layer in sharing:
        require_usable(layer.name, layers[layer.name])

    def predict(layer: LayerPlan) -> tuple[str, Prediction]:
        return layer.name, predicted_layer(layer, matrix_of(layers[layer.name]), recipe)

    with _pool(max(1, workers)) as pool:
        return allocated(plan, collected(pool.map(predict, sharing), sharing, progress))


def quantize_(
    model: nn.Module,
    recipe: str | Path | Scheme | Recipe,
    *,
    stats: Stats | None = None,
    workers: int = 1,
    progress: ProgressCallback | bool = True,
) -> Report:
    """Quantize the linear layers of a module in place, layer by layer.

    Each float weight is freed as soon as its layer is done, so memory peaks at the model plus one
    layer for each worker. The result does not depend on `workers`. A layer that is already
    quantized is left alone, so a run that was interrupted is finished by calling again.

    Args:
        model: any module; its class name selects the rules of its families.
        recipe: a recipe, a scheme, a name, or a path to a .toml or .json file.
        stats: statistics by layer from `collect_stats`, or the file they were saved in; `None`
        needs no data.
        workers: layers solved at a time. On a CPU each uses one thread, which is the fastest way to
        use cores.
        progress: False for silence, True for a display on stderr, or a function to call after each
        layer.

    Returns:
        The plan and what became of each layer.

    Raises:
        CalibrationError: statistics are missing, do not fit, or are not used. Nothing was changed.
        LayerError: the module itself is a linear layer; or a layer failed: the message names it,
            and the layers before it are quantized.
        RecipeError: the recipe cannot be read, or leaves nothing to quantize.
        SchemeError: a layer cannot be quantized as asked. Nothing was changed.
    """
    recipe = Recipe.of(recipe)
    stats, plan, layers = opened(stats), Plan.of_model(model, recipe), linear_layers(model)
    if not plan.quantized and not quantized_layers(model):
        raise RecipeError(
            f"Nothing to quantize: {len(layers)} linear layers were found in "
            f"{type(model).__name__}, and all are "
            "skipped. `loraq plan` shows why; a rule with `skip = false` overrides."
        )
    for job in plan.quantized:
        require_usable(job.name, layers[job.name])
    hashes = hashes_of_used(stats, plan, recipe)
    plan = _allocated(model, plan, recipe, workers, progress)
    reports: list[LayerReport] = []
    attach_save_pretrained(model)
    with shown_progress(progress) as show:

        def solve(job: LayerPlan) -> LayerSolution:
            assert job.scheme is not None
            of_layer = stats[job.name] if stats is not None and job.name in hashes else None
            return solve_layer(matrix_of(layers[job.name]), recipe, job.scheme, job.name, of_layer)

        for job, future in _solved(plan.quantized, solve, max(1, workers)):
            layer = layers.pop(job.name)
            used = hashes.get(job.name, "")
            quantized, report = quantized_layer(
                layer, job.name, matrix_of(layer), future.result(), recipe, stats_sha256=used
            )
            replace_layer(model, job.name, quantized)
            del layer  # frees its float weight now, not after the next layer
            reports.append(report)
            show(len(reports), len(plan.quantized), job.name, report.relative_error)
    return Report(recipe, plan, tuple(reports))


def _solved(
    jobs: tuple[LayerPlan, ...], solve: Callable[[LayerPlan], LayerSolution], workers: int
) -> Iterator[tuple[LayerPlan, "Future[LayerSolution]"]]:
    """Yield finished jobs in order, with at most `workers` of them in flight."""

    def run(job: LayerPlan) -> LayerSolution:
        try:
            return solve(job)
        except Exception as error:
            raise LayerError(f"Layer '{job.name}' failed: {error}") from error

    with _pool(workers) as pool:
        waiting = [(job, pool.submit(run, job)) for job in jobs[:workers]]
        try:
            for i in range(len(jobs)):
                job, future = waiting.pop(0)
                future.result()
                if i + workers < len(jobs):
                    waiting.append((jobs[i + workers], pool.submit(run, jobs[i + workers])))
                yield job, future
        finally:
            for _, future in waiting:
                future.cancel()


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that leave nothing behind: with several, `one_thread` races for what new threads of torch start with."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(max_workers=workers) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def solve_layer(
    weight: Tensor, recipe: Recipe, scheme: Scheme, name: str, stats: ActivationStats | None = None
) -> LayerSolution:
    """Return one layer's solution: pure, and the same bytes whoever runs it."""
    with torch.no_grad(), one_thread() if weight.device.type == "cpu" else nullcontext():
        return recipe.solver(scheme).solve(
            weight, scheme, seed=layer_seed(recipe.seed, name), stats=stats
        )


def require_usable(name: str, layer: LinearLayer) -> None:
    """Raise `LayerError` unless a layer's weights are there, float, and finite."""
    if layer.weight.is_meta:
        raise LayerError(
            f"Layer '{name}' has no weights (it is on the meta device). Load the model first."
        )
    if not layer.weight.is_floating_point() or layer.weight.dtype.itemsize < 2:
        raise LayerError(
            f"Layer '{name}' has weights of {layer.weight.dtype}. Float weights of 16 bits or more "
            f"are required."
        )
    try:
        require_finite(layer.weight, "any format")
    except FormatError as error:
        raise LayerError(f"Layer '{name}': {error}") from error


def quantized_layer(
    layer: nn.Module,
    name: str,
    weight: Tensor,
    solution: LayerSolution,
    recipe: Recipe,
    *,
    stats_sha256: str = "",
) -> tuple[QuantizedLinear, LayerReport]:
    """Return what takes the place of `layer`, called `name`, now that its float weight (out, in) is solved."""
    report = report_layer(name, weight, solution, stats_sha256)
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    quantized = quantized_class(layer).from_packed(solution.packed, bias)
    quantized.record = {**report.record(), "recipe": recipe.to_dict()}
    return quantized, report


def report_layer(
    name: str, weight: Tensor, solution: LayerSolution, stats_sha256: str = ""
) -> LayerReport:
    """Return what became of one layer; `stats_sha256` is the hash of the statistics that were used."""
    return LayerReport(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        scheme=solution.packed.scheme,
        relative_error=solution.relative_error,
        sqnr_db=solution.sqnr_db,
        bits_per_weight=solution.bits_per_weight,
        nbytes=solution.nbytes,
        seconds=solution.seconds,
        source_sha256=tensor_sha256(weight),
        stats_sha256=stats_sha256,
        output_error=solution.metrics.get("output_error"),
    )


def tensor_sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in row-major order."""
    raw = tensor.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(memoryview(raw.numpy().data)).hexdigest()


@contextmanager
def shown_progress(progress: ProgressCallback | bool) -> Iterator[ProgressCallback]:
    """Turn the argument `progress` of everything here into a function to call after each layer."""
    if callable(progress):
        yield progress
    elif progress:
        with progress_bar("quantize") as show:
            yield show
    else:
        yield lambda *_: None
