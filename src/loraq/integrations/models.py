"""`quantize_` and `quantize`: what is in memory, be it a model or a whole pipeline of diffusers."""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from loraq.checkpoint.model_index import choose_names
from loraq.errors import LoraqError
from loraq.integrations.card import attach_card
from loraq.integrations.dtypes import cast_saved, require_float_dtype, take_kept_dtypes
from loraq.integrations.marking import mark_quantized
from loraq.kernels import resolve_backend
from loraq.layers import bare_model, set_backend
from loraq.options import Rank, Workers, checked
from loraq.pipeline import module
from loraq.pipeline.plan import Plan
from loraq.pipeline.progress import ProgressCallback
from loraq.pipeline.report import Report
from loraq.pipeline.requirements import Stats, StatsByComponent, only_stats, split_stats
from loraq.recipe import Recipe
from loraq.scheme import Scheme

_LOGGER = logging.getLogger("loraq")


@overload
def quantize_(
    model: nn.Module,
    recipe: str | Path | Scheme | Recipe = "default",
    *,
    effort: str | None = None,
    budget: str | float | None = None,
    rank: Rank | None = None,
    keep: str | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    stats: Stats | None = None,
    components: None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    workers: Workers = 1,
    progress: ProgressCallback | bool = True,
) -> Report: ...


@overload
def quantize_(
    model: Any,
    recipe: str | Path | Scheme | Recipe = "default",
    *,
    effort: str | None = None,
    budget: str | float | None = None,
    rank: Rank | None = None,
    keep: str | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    stats: Stats | StatsByComponent | None = None,
    components: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    workers: Workers = 1,
    progress: ProgressCallback | bool = True,
) -> Report | dict[str, Report]: ...


@checked
def quantize_(  # noqa: PLR0913 - the five that adjust the recipe are what people ask for by name
    model: Any,
    recipe: str | Path | Scheme | Recipe = "default",
    *,
    effort: str | None = None,
    budget: str | float | None = None,
    rank: Rank | None = None,
    keep: str | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    stats: Stats | StatsByComponent | None = None,
    components: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    workers: Workers = 1,
    progress: ProgressCallback | bool = True,
) -> Report | dict[str, Report]:
    """Quantize the linear layers of a module in place, layer by layer; or a pipeline's denoisers.

    Each float weight is freed as soon as its layer is done, so memory peaks at the model plus one
    layer for each worker. The result does not depend on `workers`. A layer that is already
    quantized is left alone, so a run that was interrupted is finished by calling again.
    Afterwards a model of diffusers is in the state in which `from_pretrained` leaves a quantized
    one. Of a pipeline, every transformer and U-Net is quantized, or the components that are named;
    a warning of the logger `loraq` says which were left.

    Args:
        model: any module, a wrapper of one (`torch.compile`, DDP), or a pipeline of diffusers. Its
            class selects the rules of its families.
        recipe: a recipe, a scheme, a name, or a path to a .toml or .json file.
        effort: how long the method works, in place of the recipe's.
        budget: storage of a layer, such as "5.25" (bits per weight), for a recipe without a rank.
        rank: of every layer's branch, in place of the recipe's.
        keep: how layers are stored that the model's class keeps: "int8" or "float".
        modules_to_not_convert: modules that stay as they are, as for `Recipe.adjusted`.
        stats: statistics by layer from `collect_stats`, or the file they were saved in; of several
            components a mapping of these by component. `None` needs no data.
        components: what of a pipeline is quantized: names, or "all" for denoisers and text
            encoders; `None` takes its denoisers.
        device: where layers are solved, as for `quantize_checkpoint`; `None` solves each where its
            weight is. All that is kept stays where the weight was.
        backend: how the layers run, as for `loraq.load`; `None` leaves it to each layer.
        dtype: of what stays float, cast once all layers are quantized, as for `loraq.load`; `None`
            leaves it as it is.
        workers: layers solved at a time. On a CPU each uses one thread, which is the fastest way to
            use cores.
        progress: False for silence, True for a display on stderr, or a function to call after each
            layer.

    Returns:
        The plan and what became of each layer; of a pipeline, by the names of its components.

    Raises:
        CalibrationError: statistics are missing, do not fit, or are not used. Nothing was changed.
        DeviceError: there is no such device. Nothing was changed.
        KernelError: there is no such back end (nothing was changed), or it cannot run a layer.
        LayerError: the module itself is a linear layer, or carries adapters or wrapped parts; or a
            layer failed: the message names it, and the layers before it are quantized.
        LoraqError: it is neither a module nor a pipeline, or a pipeline without a denoiser or
            without a component of this name; or the dtype is none of floats.
        RecipeError: the recipe cannot be read, contradicts an argument, or leaves nothing to
            quantize.
        SchemeError: a layer cannot be quantized as asked. Nothing was changed.
    """
    recipe = Recipe.of(recipe).adjusted(
        effort=effort,
        budget=budget,
        rank=rank,
        keep=keep,
        modules_to_not_convert=modules_to_not_convert,
    )
    if backend is not None:
        resolve_backend(backend)  # an unknown one is refused before long work
    require_float_dtype(dtype)
    if isinstance(model, nn.Module):
        if components is not None:
            raise LoraqError(
                f"{type(model).__name__} is one model and has no components to choose from. Leave "
                "`components` out, or give the pipeline."
            )
        try:
            report = module.quantize_(
                model,
                recipe,
                stats=only_stats(stats),
                device=device,
                workers=workers,
                progress=progress,
            )
            if backend is not None:
                set_backend(model, backend)
            if dtype is not None:
                cast_saved(bare_model(model), dtype)
                take_kept_dtypes(bare_model(model))
            return report
        finally:
            mark_quantized(model)
            attach_card(model)
    chosen, left = _split_pipeline(model, components)
    of_each = split_stats(stats, list(chosen))
    for component in chosen.values():
        Plan.of_model(component, recipe)  # what cannot be done is refused before the first is
    reports = {
        name: quantize_(
            component,
            recipe,
            stats=of_each.get(name),
            device=device,
            backend=backend,
            dtype=dtype,
            workers=workers,
            progress=progress,
        )
        for name, component in chosen.items()
    }
    if left:
        _LOGGER.warning(
            "Quantized %s of %s. Left as they were: %s.",
            ", ".join(chosen),
            type(model).__name__,
            ", ".join(f"{name} ({type(part).__name__})" for name, part in left.items()),
        )
    return reports


def _split_pipeline(
    pipeline: Any, asked: str | Sequence[str] | None
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the models of a pipeline that are quantized by their names, and the others."""
    components = getattr(pipeline, "components", None)
    if not isinstance(components, Mapping):
        raise LoraqError(
            f"Cannot quantize a {type(pipeline).__name__}. Give a module or a pipeline of "
            "diffusers; for files, use `loraq.quantize_checkpoint` or `loraq quantize`."
        )
    models = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    classes = {name: type(bare_model(part)) for name, part in models.items()}
    kinds = {
        name: (kind.__module__.partition(".")[0], kind.__name__) for name, kind in classes.items()
    }
    chosen = choose_names(kinds, asked)
    return (
        {name: models[name] for name in chosen},
        {name: part for name, part in models.items() if name not in chosen},
    )


@checked
def quantize(  # noqa: PLR0913 - as `quantize_`
    model: nn.Module,
    recipe: str | Path | Scheme | Recipe = "default",
    *,
    effort: str | None = None,
    budget: str | float | None = None,
    rank: Rank | None = None,
    keep: str | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    stats: Stats | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    workers: Workers = 1,
    progress: ProgressCallback | bool = True,
) -> nn.Module:
    """Return a quantized copy of a module, which stays as it is.

    The copy never holds the float weights of the layers that are quantized; `quantize_` needs less
    still, because it frees them. Of a wrapper, the copy is one of the model inside.

    Args:
        model: as for `quantize_`, but no pipeline.
        recipe: as for `quantize_`, like all others.
        effort: how long the method works.
        budget: storage of a layer.
        rank: of every layer's branch.
        keep: how layers are stored that the model's class keeps.
        modules_to_not_convert: modules that stay as they are.
        stats: statistics by layer.
        device: where layers are solved.
        backend: how the layers run.
        dtype: of what stays float.
        workers: layers solved at a time.
        progress: what is shown.

    Raises:
        LoraqError: as for `quantize_`, or it is no module.
    """
    if not isinstance(model, nn.Module):
        raise LoraqError(
            f"Cannot copy a {type(model).__name__}. Use `quantize_`, which works in place and "
            "takes a pipeline too; for files, `loraq.quantize_checkpoint`."
        )
    recipe = Recipe.of(recipe).adjusted(
        effort=effort,
        budget=budget,
        rank=rank,
        keep=keep,
        modules_to_not_convert=modules_to_not_convert,
    )
    model = bare_model(model)
    weights = [
        weight
        for job in Plan.of_model(model, recipe).quantized
        if (weight := _find_weight(model, job.weight_name)) is not None
    ]
    copied = copy.deepcopy(model, {id(weight): weight for weight in weights})
    quantize_(
        copied,
        recipe,
        stats=stats,
        device=device,
        backend=backend,
        dtype=dtype,
        workers=workers,
        progress=progress,
    )
    return copied


def _find_weight(model: nn.Module, name: str) -> nn.Parameter | None:
    """Return a weight, unless it is none of its module's parameters: a parametrization makes it."""
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner)._parameters.get(leaf)
