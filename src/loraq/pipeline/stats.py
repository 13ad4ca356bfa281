"""Statistics beside a plan: who uses them, and whether they fit, settled before any long work."""

from collections.abc import Iterable, Mapping
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
        CalibrationError: there is none; the message says why.
    """
    if using := [
        layer for layer in plan.quantized if _solver(layer, recipe).use_of_stats != "ignored"
    ]:
        return using
    able = ", ".join(name for name, method in METHODS.items() if method.use_of_stats != "ignored")
    if not plan.quantized:
        reason = "the recipe quantizes none. `loraq plan` shows why"
    elif METHODS[recipe.method].use_of_stats == "ignored":
        reason = f"method '{recipe.method}' makes nothing of them. Leave them out, or use one of the methods {able}"
    else:
        reason = (
            f"none has a branch, and without one method '{recipe.method}' rounds to nearest. Leave "
            f"them out, add a "
            "branch, or use method 'gptq'"
        )
    raise CalibrationError(f"No layer uses the statistics: {reason}.")


def require_enough(layers: Iterable[LayerPlan], recipe: Recipe) -> None:
    """Raise `CalibrationError` if mean squares alone do not do for a layer's method."""
    if any(_solver(layer, recipe).needs_full_moment for layer in layers):
        raise CalibrationError(
            f"Mean squares are not enough: method '{recipe.method}' needs full second moments. "
            f"Collect those, or use "
            "method 'loraq'."
        )


def hashes_of_used(
    stats: Mapping[str, ActivationStats] | None, plan: Plan, recipe: Recipe
) -> dict[str, str]:
    """Return the hash of the statistics of every layer whose method uses them; none without statistics.

    Raises:
        CalibrationError: a layer's method needs statistics that are missing or say too little,
            those given are not of this layer, or no layer uses them.
    """
    if stats is None:
        needy = [
            layer for layer in plan.quantized if _solver(layer, recipe).use_of_stats == "required"
        ]
        if needy:
            raise CalibrationError(
                f"Method '{recipe.method}' needs activation statistics, and none are given for "
                f"{len(needy)} layers. "
                "Collect them with `loraq stats` or `loraq.collect_stats` and give them as `stats` "
                "(`--stats`), or use a method without data, such as 'loraq'."
            )
        return {}
    if not plan.quantized:  # of a model that is finished: nothing is left to use them
        return {}
    using = {layer.name: layer for layer in layers_that_use(plan, recipe)}
    if missing := [name for name in using if name not in stats]:
        raise CalibrationError(
            f"There are no statistics of {len(missing)} of {len(using)} layers: "
            f"{', '.join(missing[:4])}. Collect "
            "those of every layer of the plan, or skip these layers."
        )
    hashes = {}
    for name, layer in using.items():
        of_layer = stats[name]
        if of_layer.width != layer.shape[1]:
            raise CalibrationError(
                f"Layer '{name}' has {layer.shape[1]} input channels, its statistics have "
                f"{of_layer.width}. They are "
                "of another model: collect them again."
            )
        if not of_layer.is_full:
            require_enough([layer], recipe)
        hashes[name] = of_layer.sha256
    return hashes


def _solver(layer: LayerPlan, recipe: Recipe) -> Method:
    assert layer.scheme is not None
    return recipe.solver(layer.scheme)
