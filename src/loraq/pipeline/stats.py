"""Statistics beside a plan: who uses them, and whether they fit, settled before any long work."""

from collections.abc import Mapping
from pathlib import Path

from loraq.checkpoint.stats import load_stats
from loraq.errors import CalibrationError
from loraq.methods import Method
from loraq.pipeline.plan import LayerPlan, Plan
from loraq.recipe import METHODS, Recipe
from loraq.stats import ActivationStats

#: Statistics by layer, or the file they are in.
Stats = Mapping[str, ActivationStats] | str | Path


def opened(stats: Stats | None) -> Mapping[str, ActivationStats] | None:
    """Return statistics by layer from any of their forms.

    Raises:
        CalibrationError, CheckpointError: it is no file of statistics.
    """
    return load_stats(stats) if isinstance(stats, str | Path) else stats


def layers_that_use(plan: Plan, recipe: Recipe) -> list[LayerPlan]:
    """Return the layers of a plan whose method makes something of statistics.

    Raises:
        CalibrationError: there is none.
    """
    using = [layer for layer in plan.quantized if _solver(layer, recipe).use_of_stats != "ignored"]
    if not using:
        able = [name for name, method in METHODS.items() if method.use_of_stats != "ignored"]
        raise CalibrationError(
            f"No layer uses the statistics: method '{recipe.method}' makes nothing of them here. Leave them out, or "
            f"use one of the methods {', '.join(able)}."
        )
    return using


def hashes_of_used(stats: Mapping[str, ActivationStats] | None, plan: Plan, recipe: Recipe) -> dict[str, str]:
    """Return the hash of the statistics of every layer whose method uses them; none without statistics.

    Raises:
        CalibrationError: a layer's method needs statistics that are missing, those given are not of this layer, or
            no layer uses them.
    """
    if stats is None:
        needy = [layer for layer in plan.quantized if _solver(layer, recipe).use_of_stats == "required"]
        if needy:
            raise CalibrationError(
                f"Method '{recipe.method}' needs activation statistics, and none are given for {len(needy)} layers. "
                "Collect them with `loraq stats` or `loraq.collect_stats` and give them as `stats` (`--stats`), or use "
                "a method without data, such as 'loraq'."
            )
        return {}
    using = {layer.name: layer for layer in layers_that_use(plan, recipe)}
    if missing := [name for name in using if name not in stats]:
        raise CalibrationError(
            f"There are no statistics of {len(missing)} of {len(using)} layers: {', '.join(missing[:4])}. Collect "
            "those of every layer of the plan, or skip these layers."
        )
    hashes = {}
    for name, layer in using.items():
        of_layer = stats[name]
        if of_layer.width != layer.shape[1]:
            raise CalibrationError(
                f"Layer '{name}' has {layer.shape[1]} input channels, its statistics have {of_layer.width}. They are "
                "of another model: collect them again."
            )
        hashes[name] = of_layer.sha256
    return hashes


def _solver(layer: LayerPlan, recipe: Recipe) -> Method:
    assert layer.scheme is not None
    return recipe.solver(layer.scheme)
