"""Rules: which one decides, and what it changes."""

from dataclasses import replace

import pytest

from loraq.errors import FormatError, RecipeError, SchemeError
from loraq.recipe import Recipe
from loraq.rules import Rule
from loraq.scheme import Branch, Scheme

MINIMAL = {"scheme": {"weight": "mxfp4"}}


def recipe_of(**changes) -> Recipe:
    return Recipe(Scheme("mxfp4", "mxfp4", Branch(16, "mxint8", "mxint8")), **changes)


def test_the_first_rule_that_matches_wins_and_nothing_is_added_from_the_others():
    recipe = recipe_of(
        rules=(
            Rule("blocks.0.*", weight="int4"),
            Rule("blocks.*.ff", activation="bf16"),
            Rule("blocks.*", branch={"rank": 8}),
        )
    )
    base = recipe.scheme
    assert recipe.scheme_for("blocks.0.ff", (64, 64)) == replace(base, weight="int4")
    assert recipe.scheme_for("blocks.1.ff", (64, 64)) == replace(base, activation="bf16")
    assert recipe.scheme_for("blocks.1.attn", (64, 64)) == replace(
        base, branch=replace(base.branch, rank=8)
    )
    assert recipe.scheme_for("other", (64, 64)) == base


@pytest.mark.parametrize(
    ("pattern", "matches", "differs"),
    [
        (
            "blocks.*.ff",
            ["blocks.0.ff", "blocks.1.deep.ff"],
            ["blocks.ff", "blocks.0.ff.0", "my.blocks.0.ff"],
        ),
        ("*.to_[kv]", ["a.to_k", "a.to_v"], ["a.to_q", "to_k"]),
        ("head", ["head"], ["Head", "a.head", "head.0"]),
    ],
)
def test_a_pattern_is_that_of_the_shell_over_the_whole_name(pattern, matches, differs):
    recipe = recipe_of(rules=(Rule(pattern, skip=True),))
    assert all(recipe.scheme_for(name, (64, 64)) is None for name in matches)
    assert all(recipe.scheme_for(name, (64, 64)) is not None for name in differs)


def test_a_rule_changes_only_the_fields_of_the_branch_that_it_names():
    recipe = recipe_of(
        rules=(
            Rule("a", branch={"weight": "bf16"}),
            Rule("b", branch={}),
            Rule("c", branch={"rank": 0}),
        )
    )
    assert recipe.scheme_for("a", (64, 64)).branch == Branch(16, "bf16", "mxint8")
    assert recipe.scheme_for("b", (64, 64)) == recipe.scheme
    sized = recipe.scheme_for("c", (256, 256)).branch  # back to what the budget pays for
    assert sized.rank > 32
    assert replace(sized, rank=16) == recipe.scheme.branch


def test_a_rule_gives_a_branch_to_a_recipe_without_one():
    recipe = Recipe(Scheme("int4"), rules=(Rule("a", branch={"rank": 4, "weight": "mxint8"}),))
    assert recipe.scheme_for("a", (64, 64)).branch == Branch(4, "mxint8", "bf16")
    assert recipe.scheme_for("b", (64, 64)).branch is None


def test_a_rule_of_the_recipe_overrides_the_rules_of_the_class():
    name, model_class = "transformer_blocks.0.attn2.to_k", "PixArtTransformer2DModel"
    assert recipe_of(keep="float").scheme_for(name, (64, 64), model_class) is None
    assert recipe_of().scheme_for(name, (64, 64), model_class) == Scheme("int8_b128")
    assert recipe_of().scheme_for(name, (64, 64)) == recipe_of().scheme
    forced = recipe_of(rules=(Rule("*.attn2.*", skip=False),))
    assert forced.scheme_for(name, (64, 64), model_class) == forced.scheme
    assert forced.scheme_for("proj_out", (64, 64), model_class) is None
    # Any match of the recipe's own rules ends the search: to change a format is to quantize.
    changed = recipe_of(rules=(Rule("proj_out", weight="mxint8"),))
    assert changed.scheme_for("proj_out", (64, 64)).weight == "mxint8"


def test_the_rule_that_decides_can_be_asked_for():
    recipe = recipe_of(rules=(Rule("a", skip=True, reason="mine"),))
    assert recipe.rule_for("a").reason == "mine"
    assert recipe.rule_for("b") is None
    assert recipe.rule_for("proj_out").reason == "output projection"


@pytest.mark.parametrize(
    ("recipe", "shape", "message"),
    [
        (
            recipe_of(),
            (8, 64),
            r"Layer 'blocks\.7': Branch rank 16 is larger than min\(out, in\).*at most 8",
        ),
        (
            recipe_of(rules=(Rule("*", branch={"rank": 65}),)),
            (64, 64),
            r"Layer 'blocks\.7': Branch rank 65 .* at most 64, or skip",
        ),
        (
            Recipe.from_dict({"scheme": "mxfp4+w8a8", "budget": 4.25}),
            (1152, 1152),
            r"Layer 'blocks\.7': A budget of 4\.25 leaves 0 bytes.*1152×1152.*Raise the budget",
        ),
        (recipe_of(), (64,), r"Layer 'blocks\.7': Weight has shape \(64,\)\. A matrix"),
    ],
)
def test_what_does_not_fit_names_the_layer(recipe, shape, message):
    with pytest.raises(SchemeError, match=message):
        recipe.scheme_for("blocks.7", shape)


def test_weight_only_leaves_all_activations_and_stores_the_same():
    recipe = Recipe.from_dict(
        {"scheme": "mxfp4+w6a6", "rules": [{"match": "*mod*", "weight_only": True}]}
    )
    plain, weight_only = recipe.scheme_for("a", (64, 128)), recipe.scheme_for("mod", (64, 128))
    assert weight_only == plain.weight_only()
    assert (weight_only.weight, weight_only.branch.weight) == ("mxfp4", "mxfp6_e2m3")
    assert (weight_only.activation, weight_only.branch.activation) == ("bf16", "bf16")
    assert weight_only.branch.intermediate_format.name == "bf16"
    assert weight_only.nbytes((64, 128)) == plain.nbytes((64, 128))
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("more", [{"activation": "mxint8"}, {"branch": {"intermediate": "mxint8"}}])
def test_a_rule_that_is_weight_only_and_names_activations_is_refused(more):
    with pytest.raises(
        RecipeError,
        match=r"Rule 'a\*' is weight-only and names a format of activations\. Leave one",
    ):
        Recipe.from_dict({**MINIMAL, "rules": [{"match": "a*", "weight_only": True, **more}]})


def test_a_format_error_in_a_rule_is_still_a_value_error():
    with pytest.raises(FormatError, match="Unknown number format 'w8a8'"):
        Recipe.from_dict({**MINIMAL, "rules": [{"match": "*", "activation": "w8a8"}]})
