"""What a target of `loraq export` takes of a plan, and what its limits cost."""

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from loraq.errors import RecipeError, SchemeError, list_some
from loraq.pipeline.jobs import KeptLayer, LayerJob
from loraq.recipe import Recipe
from loraq.targets import Limits, TargetRecipe, fallback

#: Share of the weights beyond which it is warned of what a target leaves in 16 bits.
_MUCH = 0.1

_LOGGER = logging.getLogger("loraq")

Layers = list[LayerJob | KeptLayer]


@dataclass(frozen=True)
class TargetFit:
    """What a plan has of the limits of a target, beside what the same recipe has without them.

    What counts are the layers that get the recipe's scheme without the target.
    """

    #: Names of the recipe, and of the target that `loraq export --to` takes.
    recipe: str
    target: str
    #: What the target asks, in words.
    limits: tuple[str, ...]
    #: How many layers stay as they are because of it, by why.
    left: dict[str, int]
    #: Share of the weights that these have.
    share_left: float
    #: The least rank and the largest, and both without the target; (0, 0) for no branches.
    ranks: tuple[int, int]
    ranks_alone: tuple[int, int]
    #: Stored bits for each of the weights, and those without the target.
    bits_per_weight: float
    bits_alone: float


def require_class(recipe: Recipe, kind: type) -> None:
    """Require that the target of a recipe, if it has one, takes models of a class.

    Raises:
        RecipeError: it does not; the message names the recipe that helps.
    """
    target = recipe.solved_for
    if target and (why := target.limits.explain_class(kind)):
        raise RecipeError(
            f"Recipe '{target.name}' is for target '{target.limits.name}', which takes no "
            f"{kind.__name__}: {why}. {_way_out(target)}"
        )


def fit_to_target(
    layers: Layers, alone: Layers, recipe: Recipe, convs: Collection[str]
) -> tuple[Layers, TargetFit]:
    """Return the layers within the limits of a recipe's target, and what that costs.

    A layer that the target does not hold stays as it is; ranks that a budget settled are lowered.

    Args:
        layers: settled one by one.
        alone: the same without the target.
        recipe: has a target.
        convs: names of the layers that are 1×1 convolutions.

    Raises:
        SchemeError: the target holds none of the layers, or the budget is too small for it.
    """
    target = recipe.solved_for
    assert target is not None, "only a recipe for a target has limits"
    limits = target.limits
    fitted = list(layers)
    for i, job in enumerate(layers):
        if isinstance(job, LayerJob) and not job.is_kept:
            why = limits.explain_misfit(job.scheme, job.shape, is_conv=job.name in convs)
            if why := why or _explain_narrow(job, limits):
                fitted[i] = KeptLayer(job.name, job.shape, f"{target.name}: {why}")
    fitted = _lower_ranks(fitted, limits)
    fit = _measure(fitted, alone, recipe, target)
    if fit.left and fit.share_left == 1.0:
        raise SchemeError(
            f"Target '{limits.name}' holds none of the {sum(fit.left.values())} layers that "
            f"recipe '{target.name}' is for ({list_some(fit.left, most=4)}). {_way_out(target)}"
        )
    return fitted, fit


def warn_of_cost(fit: TargetFit) -> None:
    """Say in the log if a target leaves much of a model in 16 bits."""
    if fit.share_left > _MUCH:
        other = "" if fit.recipe == fallback().name else f" Recipe '{fallback().name}' holds most."
        _LOGGER.warning(
            "%.0f %% of the weights that recipe '%s' is for stay in 16 bits, because target '%s' "
            "does not hold them: %s.%s",
            100 * fit.share_left,
            fit.recipe,
            fit.target,
            list_some(fit.left, most=4),
            other,
        )


def _way_out(target: TargetRecipe) -> str:
    other = fallback()
    if target.name == other.name:
        return "Use a recipe without a target, such as 'default'."
    return f"Use the recipe '{other.name}', for `loraq export --to {other.limits.name}`."


def _explain_narrow(job: LayerJob, limits: Limits) -> str:
    """Return why a branch does not fit a layer, whatever the budget; "" if it does."""
    branch = job.scheme.branch
    step = limits.step_of(branch) if branch else 1
    return "" if step <= min(job.matrix) else f"it is too narrow for a branch of rank {step}"


def _lower_ranks(layers: Layers, limits: Limits) -> Layers:
    """Return the layers with the ranks that a budget settled in steps, or all the same."""
    jobs = [job for job in _own(layers) if job.sized]
    ranks = {}
    for job in jobs:
        branch = job.scheme.branch
        assert branch is not None, "only the rank of a branch is settled by a budget"
        step = limits.step_of(branch)
        ranks[job.name] = branch.rank // step * step
        if not ranks[job.name]:
            raise SchemeError(
                f"Layer '{job.name}': the budget pays for rank {branch.rank}, and target "
                f"'{limits.name}' takes multiples of {step}. Raise the budget, or give the rank "
                f"({step})."
            )
    if limits.one_rank and ranks:
        ranks = dict.fromkeys(ranks, min(ranks.values()))
    return [_with_rank(layer, ranks.get(layer.name, 0)) for layer in layers]


def _with_rank(layer: LayerJob | KeptLayer, rank: int) -> LayerJob | KeptLayer:
    if not rank or not isinstance(layer, LayerJob) or layer.scheme.branch is None:
        return layer
    return replace(
        layer, scheme=replace(layer.scheme, branch=replace(layer.scheme.branch, rank=rank))
    )


def _own(layers: Layers) -> list[LayerJob]:
    """Return the layers that get the recipe's scheme."""
    return [layer for layer in layers if isinstance(layer, LayerJob) and not layer.is_kept]


def _measure(layers: Layers, alone: Layers, recipe: Recipe, target: TargetRecipe) -> TargetFit:
    kept = ("layers that the class keeps stay floats",) if recipe.keep == "float" else ()
    before = {job.name: job for job in _own(alone)}
    after = [layer for layer in layers if layer.name in before]
    left = [layer for layer in after if isinstance(layer, KeptLayer)]
    reasons = Counter(layer.reason.removeprefix(f"{target.name}: ") for layer in left)
    total = max(1, _count(before.values()))
    return TargetFit(
        recipe=target.name,
        target=target.limits.name,
        limits=(*target.limits.describe(recipe.scheme), *kept),
        left=dict(reasons),
        share_left=_count(left) / total,
        ranks=_span(_own(after)),
        ranks_alone=_span(before.values()),
        bits_per_weight=8 * sum(layer.nbytes for layer in after) / total,
        bits_alone=8 * sum(job.nbytes for job in before.values()) / total,
    )


def _count(layers: Iterable[LayerJob | KeptLayer]) -> int:
    return sum(math.prod(layer.shape) for layer in layers)


def _span(jobs: Iterable[LayerJob]) -> tuple[int, int]:
    ranks = [job.scheme.branch.rank for job in jobs if job.scheme.branch] or [0]
    return min(ranks), max(ranks)
