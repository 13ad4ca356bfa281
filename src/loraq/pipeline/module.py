"""`quantize_weight`, `plan_model` and `quantize_`: one matrix, and a module in place."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraq.checkpoint.pretrained import attach_methods
from loraq.devices import ALL, find_devices
from loraq.errors import RecipeError, SchemeError, unknown
from loraq.layers import (
    LinearLayer,
    bare_model,
    find_stacks,
    linear_layers,
    matrix_of,
    quantized_layers,
    replace_layer,
)
from loraq.methods import METHODS
from loraq.methods.prediction import Prediction
from loraq.options import Seed, Workers, checked
from loraq.packed import LayerSolution
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.kept_numbers import warn_of_kept
from loraq.pipeline.layer import (
    FinishedLayer,
    quantize_layer,
    require_usable,
    solve_layer,
)
from loraq.pipeline.plan import Plan
from loraq.pipeline.progress import ProgressCallback, show_layers
from loraq.pipeline.report import Report
from loraq.pipeline.requirements import Stats, hash_used_stats, open_stats
from loraq.pipeline.sharing import predict_layer, share_budget
from loraq.recipe import Recipe
from loraq.scheme import Scheme
from loraq.stats import ActivationStats


@checked
def quantize_weight(
    weight: Float[Tensor, "out in"],
    recipe: str | Path | Scheme | Recipe,
    *,
    method: str | None = None,
    seed: Seed | None = None,
    name: str = "",
    stats: ActivationStats | None = None,
) -> LayerSolution:
    """Quantize one weight.

    Args:
        weight: full-precision weight, rows are output channels; any float dtype and device.
        recipe: a recipe, a scheme, a name such as "mxfp4-a4+w8a8-r64", or a path to a .toml or
            .json file.
        method: overrides the recipe's method (one of `loraq.methods.METHODS`).
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
    shape = weight.shape[0], weight.shape[1]
    scheme = recipe.scheme_for(name, shape)
    if scheme is None:
        raise RecipeError(f"The recipe skips layer '{name}'. Use another name, or remove the rule.")
    job = LayerJob.of(name, shape, scheme, recipe, is_kept=recipe.keeps(name))
    return solve_layer(job, weight, stats)


@checked
def plan_model(
    model: nn.Module,
    recipe: str | Path | Scheme | Recipe,
    *,
    workers: Workers = 1,
    progress: ProgressCallback | bool = True,
) -> Plan:
    """Return what `quantize_` would do with a module.

    The module may be on the meta device, unless the recipe allocates: then every weight is looked
    at.

    Args:
        model: any module, or a wrapper of one (compiled, DDP); its class selects the rules of its
            families.
        recipe: a recipe, a scheme, a name, or a path to a .toml or .json file.
        workers: layers looked at at a time, if the recipe allocates; the plan does not depend on
            it.
        progress: as for `quantize_`; a function is not called here.

    Raises:
        LayerError: the module itself is a linear layer, or carries adapters or wrapped parts; or
            the recipe allocates, and a layer's
            weights cannot be used: the message names it.
        RecipeError: the recipe cannot be read, or allocates where it cannot.
        SchemeError: a layer cannot be quantized as asked; the message carries its name.
    """
    recipe, model = Recipe.of(recipe), bare_model(model)
    return _share_budget(model, Plan.of_model(model, recipe), recipe, workers, progress)


def _share_budget(
    model: nn.Module, plan: Plan, recipe: Recipe, workers: int, progress: ProgressCallback | bool
) -> Plan:
    layers = _find_layers(model)

    def predict_all(jobs: Sequence[LayerJob]) -> Iterator[tuple[str, Prediction]]:
        if done := quantized_layers(model):
            raise RecipeError(
                f"{len(done)} layers of {type(model).__name__} are quantized already, and sharing "
                "a budget needs the float weights of all. Start from the float model, or use "
                "allocation 'uniform'."
            )
        for job in jobs:
            require_usable(job, _weight_of(layers[job.name]))
        with _pool(workers) as pool:
            yield from pool.map(lambda job: predict_layer(job, _weight_of(layers[job.name])), jobs)

    return share_budget(plan, recipe, predict_all, progress)


def _find_layers(model: nn.Module) -> dict[str, LinearLayer | nn.Parameter]:
    """Return every linear layer of a model, and the parameter of every stack of experts."""
    return {
        **linear_layers(model),
        **{name: model.get_parameter(name) for name in find_stacks(model)},
    }


def _weight_of(layer: LinearLayer | nn.Parameter) -> Tensor:
    return layer if isinstance(layer, Tensor) else matrix_of(layer)


@checked
def quantize_(
    model: nn.Module,
    recipe: str | Path | Scheme | Recipe,
    *,
    stats: Stats | None = None,
    device: str | torch.device | None = None,
    workers: Workers = 1,
    progress: ProgressCallback | bool = True,
) -> Report:
    """Quantize the linear layers of a module, and its stacked experts, in place, one by one.

    Each float weight is freed as soon as its layer is done, so memory peaks at the model plus one
    layer for each worker. The result does not depend on `workers`. A layer that is already
    quantized is left alone, so a run that was interrupted is finished by calling again.

    Args:
        model: any module, or a wrapper of one (compiled, DDP); its class selects the rules of its
            families.
        recipe: a recipe, a scheme, a name, or a path to a .toml or .json file.
        stats: statistics by layer from `collect_stats`, or the file they were saved in; `None`
            needs no data.
        device: where layers are solved, as for `quantize_checkpoint`; `None` solves each where its
            weight is. All that is kept stays where the weight was.
        workers: layers solved at a time. On a CPU each uses one thread, which is the fastest way to
            use cores.
        progress: False for silence, True for a display on stderr, or a function to call after each
            layer.

    Returns:
        The plan and what became of each layer.

    Raises:
        CalibrationError: statistics are missing, do not fit, or are not used. Nothing was changed.
        DeviceError: there is no such device. Nothing was changed.
        LayerError: the module itself is a linear layer, or carries adapters or wrapped parts; or a
            layer failed: the message names it, and the layers before it are quantized.
        RecipeError: the recipe cannot be read, or leaves nothing to quantize.
        SchemeError: a layer cannot be quantized as asked. Nothing was changed.
    """
    model = bare_model(model)
    devices = () if device is None else find_devices(device)
    workers = max(workers, len(devices)) if device == ALL else workers
    recipe, layers = Recipe.of(recipe), _find_layers(model)
    stats, plan = open_stats(stats), Plan.of_model(model, recipe)
    if not plan.has_work and not quantized_layers(model):
        raise RecipeError(
            f"Nothing to quantize: {len(layers)} linear layers were found in "
            f"{type(model).__name__}, and all are kept. `loraq plan` shows why; a rule with "
            "`skip = false` overrides."
        )
    for job in plan.quantized:
        require_usable(job, _weight_of(layers[job.name]))
    warn_of_kept(model, [job.weight_name for job in plan.quantized])
    hashes = hash_used_stats(stats, plan, recipe)
    plan = _share_budget(model, plan, recipe, workers, progress)
    reports = []
    try:
        costs = [job.cost for job in plan.quantized]
        with show_layers(progress, "quantize", costs) as show:
            for finished in _quantize_layers(
                layers, plan.quantized, stats or {}, hashes, devices, workers
            ):
                name, report = finished.report.name, finished.report
                replace_layer(model, name, finished.build_module(layers.pop(name), recipe))
                reports.append(report)
                show(len(reports), len(plan.quantized), name, report.relative_error)
    finally:
        attach_methods(model)
    return Report(recipe, plan, tuple(reports))


def _quantize_layers(
    layers: Mapping[str, LinearLayer | nn.Parameter],
    jobs: Sequence[LayerJob],
    stats: Mapping[str, ActivationStats],
    hashes: Mapping[str, str],
    devices: Sequence[torch.device],
    workers: int,
) -> Iterator[FinishedLayer]:
    """Yield finished layers in order, with at most `workers` of them in flight.

    They take turns on the devices; without any, a layer is solved where its weight is.
    """

    def run(job: LayerJob, index: int) -> FinishedLayer:
        device = devices[index % len(devices)] if devices else None
        sha256 = hashes.get(job.name, "")
        of_layer = stats[job.name] if sha256 else None
        weight = _weight_of(layers[job.name])
        return quantize_layer(job, weight, of_layer, stats_sha256=sha256, device=device)

    with _pool(workers) as pool:
        waiting = [pool.submit(run, job, i) for i, job in enumerate(jobs[:workers])]
        try:
            for i in range(len(jobs)):
                finished = waiting.pop(0).result()
                if i + workers < len(jobs):
                    waiting.append(pool.submit(run, jobs[i + workers], i + workers))
                yield finished
                # The caller has freed the float weight; what is left of the layer goes now too,
                # not after the next one.
                del finished
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Give threads, and restore torch's thread count afterwards.

    With several workers, calls of `fixed_arithmetic` race on it.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(max_workers=workers) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
