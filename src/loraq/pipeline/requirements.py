"""Which layers of a plan use statistics, and whether those given fit: settled before long work."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from loraq.checkpoint.stats_file import load_stats
from loraq.errors import CalibrationError, list_some
from loraq.methods import METHODS
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.plan import Plan
from loraq.recipe import Recipe
from loraq.stats import ActivationStats

#: Statistics by layer, or the file they are in.
Stats = Mapping[str, ActivationStats] | str | Path
#: Those of several models, by the component that each is of a pipeline.
StatsByComponent = Mapping[str, Stats]


def open_stats(stats: Stats | None) -> Mapping[str, ActivationStats] | None:
    """Return statistics by layer from any of their forms.

    Raises:
        CalibrationError, CheckpointError: it is not a file of statistics.
    """
    return load_stats(stats) if isinstance(stats, str | Path) else stats


def split_stats(stats: Stats | StatsByComponent | None, components: list[str]) -> dict[str, Stats]:
    """Return statistics by component.

    Raises:
        CalibrationError: they are of a component that is not quantized, or do not say of which.
    """
    if stats is None:
        return {}
    if isinstance(stats, dict) and any(
        isinstance(each, str | Path | Mapping) for each in stats.values()
    ):
        if wrong := [name for name in stats if name not in components]:
            raise CalibrationError(
                f"There are statistics of {list_some(wrong)}, which is not quantized. Components "
                f"that are: {', '.join(components) or 'none'}."
            )
        return stats
    if len(components) > 1:
        raise CalibrationError(
            f"Statistics are of one model, and {len(components)} are quantized: "
            f"{', '.join(components)}. Give them by component (`--stats NAME=FILE`, "
            "`stats={NAME: …}`), or quantize one (`--components`)."
        )
    return {components[0]: stats}  # type: ignore[dict-item]


def only_stats(stats: Stats | StatsByComponent | None) -> Stats | None:
    """Return the statistics of a model that is no component of a pipeline.

    Raises:
        CalibrationError: they are given by component.
    """
    return split_stats(stats, [""]).get("")


def find_users(plan: Plan, recipe: Recipe) -> list[LayerJob]:
    """Return the layers of a plan that use statistics.

    Raises:
        CalibrationError: there is none; the message says why.
    """
    if using := [job for job in plan.quantized if job.uses_stats and not job.is_stack]:
        return using
    able = [method for method in METHODS.values() if method.use_of_stats != "ignored"]
    if not plan.quantized:
        reason = "the recipe quantizes none. `loraq plan` shows why"
    elif all(job.is_stack for job in plan.quantized):
        reason = "the recipe quantizes stacked experts alone, whose inputs are not counted"
    elif METHODS[recipe.method].use_of_stats == "ignored":
        names = ", ".join(method.name for method in able)
        reason = (
            f"method '{recipe.method}' does not use them. Leave them out, or use one of the "
            f"methods {names}"
        )
    else:
        names = ", ".join(method.name for method in able if method.branch != "required")
        reason = (
            f"none has a branch, and without one method '{recipe.method}' rounds to nearest. Leave "
            f"them out, add a branch, or use method {names}"
        )
    raise CalibrationError(f"No layer uses the statistics: {reason}.")


def require_enough(jobs: Iterable[LayerJob], recipe: Recipe) -> None:
    """Raise `CalibrationError` if a layer's method needs more than mean squares."""
    if any(job.method.needs_full_moment for job in jobs):
        raise CalibrationError(
            f"Mean squares are not enough: method '{recipe.method}' needs full second moments. "
            "Collect those, or use method 'loraq'."
        )


def hash_used_stats(
    stats: Mapping[str, ActivationStats] | None, plan: Plan, recipe: Recipe
) -> dict[str, str]:
    """Return the hash of the statistics of every layer that uses them.

    Raises:
        CalibrationError: a layer needs statistics that are missing or say too little,
            those given are not of this layer, or no layer uses them.
    """
    _require_none_of_stacks(plan, recipe)
    if stats is None:
        _require_none_needed(plan, recipe)
        return {}
    if not plan.quantized:  # of a model that is finished: nothing is left to use them
        return {}
    using = {job.name: job for job in find_users(plan, recipe)}
    if missing := [name for name in using if name not in stats]:
        raise CalibrationError(
            f"There are no statistics of {len(missing)} of {len(using)} layers: "
            f"{', '.join(missing[:4])}. Collect those of every layer of the plan, or skip these "
            "layers."
        )
    hashes = {}
    for name, job in using.items():
        of_layer = stats[name]
        if of_layer.width != job.shape[-1]:
            raise CalibrationError(
                f"Layer '{name}' has {job.shape[-1]} input channels, its statistics have "
                f"{of_layer.width}. They are of another model: collect them again."
            )
        outputs = of_layer.output_sensitivity
        if outputs is not None and len(outputs) != job.matrix[0]:
            raise CalibrationError(
                f"Layer '{name}' has {job.matrix[0]} outputs, its statistics have sensitivities of "
                f"{len(outputs)}. They are of another model: collect them again."
            )
        if not of_layer.is_full:
            require_enough([job], recipe)
        hashes[name] = of_layer.sha256
    return hashes


def _require_none_of_stacks(plan: Plan, recipe: Recipe) -> None:
    needy = [job for job in plan.quantized if job.method.use_of_stats == "required"]
    if stacks := [job.name for job in needy if job.is_stack]:
        raise CalibrationError(
            f"Method '{recipe.method}' needs activation statistics, and the inputs of stacked "
            f"experts are not counted: {list_some(stacks, most=4)}. Leave these layers out "
            "(`skip = true` in a rule of the recipe), or use a method without data, such as "
            "'loraq'."
        )


def _require_none_needed(plan: Plan, recipe: Recipe) -> None:
    if needy := [job for job in plan.quantized if job.needs_stats]:
        what, instead = "Smoothing", "leave '-s' out of the recipe"
        if METHODS[recipe.method].use_of_stats == "required":
            what, instead = f"Method '{recipe.method}'", "use one without data, such as 'loraq'"
        raise CalibrationError(
            f"{what} needs activation statistics, and none are given for {len(needy)} layers. "
            "Collect them with `loraq stats` or `loraq.collect_stats` and give them as `stats` "
            f"(`--stats`), or {instead}."
        )
