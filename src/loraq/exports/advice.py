"""What to quantize with instead: the end of every refusal, which must work."""

from collections.abc import Sequence

from loraq.exports.layer import Head
from loraq.exports.target import most_common
from loraq.targets import Limits, TargetRecipe, fallback, limits_of, recipes_of

#: Share of the weights that a target may leave in 16 bits without a word.
_LITTLE = 0.1


def recommend(target: str, heads: Sequence[Head], kind: type) -> str:
    """Return a sentence that names a recipe, and the target that holds what comes out.

    Args:
        target: as `--to` takes it.
        heads: layers of the model.
        kind: class of the model.
    """
    limits, other = limits_of(target), fallback()
    recipe = _choose(target, heads)
    share = 0.0 if recipe is None else _share_within(recipe, limits, heads)
    if recipe is not None and share > 0.0 and not limits.explain_class(kind):
        text = f"Quantize with the recipe '{recipe.name}'"
        if 1 - share <= _LITTLE or recipe.name == other.name:
            return f"{text}."
        return f"{text}, which leaves {1 - share:.0%} of these weights in 16 bits; {_as(other)}."
    if target != other.limits.name:
        return f"{_as(other).capitalize()}."
    return "Export `--to dense`, which holds every model."


def _as(recipe: TargetRecipe) -> str:
    return f"use the recipe '{recipe.name}' and `--to {recipe.limits.name}`"


def _choose(target: str, heads: Sequence[Head]) -> TargetRecipe | None:
    """Return the recipe with the format that most weights have, or the first one."""
    recipes = recipes_of(target)
    weight = most_common(heads, lambda head: head.scheme.weight)
    alike = (recipe for recipe in recipes if recipe.scheme.weight == weight)
    return next(alike, recipes[0] if recipes else None)


def _share_within(recipe: TargetRecipe, limits: Limits, heads: Sequence[Head]) -> float:
    """Return the share of the weights whose layers the target holds if the recipe solves them."""
    counted = [head for head in heads if not head.is_kept]
    held = 0
    for head in counted:
        apart = limits.modulations if head.is_modulation else None
        scheme = apart.scheme if apart else recipe.scheme
        why = limits.explain_misfit(scheme, head.packed_shape, is_conv=head.is_conv)
        held += 0 if why else head.numel
    return held / max(1, sum(head.numel for head in counted))
