"""Recipes for the targets of an export, and what they must not ask for."""

import pytest
from torch import nn

from loraq.errors import RecipeError
from loraq.exports.table import TARGETS
from loraq.recipe import Recipe
from loraq.recipe_names import parse_scheme
from loraq.scheme import Scheme
from loraq.targets import fallback, limits_of, recipes_of, target_recipes

RECIPES = list(target_recipes())
PLAIN = (256, 256)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_for_a_target_is_a_recipe_with_that_target(name):
    made, recipe = target_recipes()[name], Recipe.of(name)
    assert recipe.target == name
    assert recipe.solved_for is made
    assert (recipe.scheme, recipe.budget, recipe.keep) == (made.scheme, made.budget, made.keep)
    assert recipe.scheme.rotation == 0
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict({"scheme": name}) == recipe
    assert Recipe.from_dict({"scheme": name, "keep": "int8"}).keep == "int8"


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "dense"])
def test_every_target_has_a_recipe(target):
    assert recipes_of(target)
    assert limits_of(target).name == target
    assert TARGETS[target].about.recipes == tuple(made.name for made in recipes_of(target))


def test_a_rank_may_stand_behind_the_name():
    assert Recipe.of("nunchaku-int4-r64").scheme.branch.rank == 64
    assert Recipe.of("nunchaku-int4-r64").target == "nunchaku-int4"
    assert Recipe.of("sdnq-r7").scheme.branch.rank == 7
    with pytest.raises(RecipeError, match="has no branch"):
        Recipe.of("gguf-q8_0-r32")


@pytest.mark.parametrize("name", ["nunchaku-int5", "sdnq-r0", "sdnq-r", "sndq", "gguf"])
def test_a_name_that_is_none_is_answered_with_those_that_are(name):
    with pytest.raises(RecipeError, match=r"For a target: sdnq, .*gguf-q4_0, .*nunchaku-int4"):
        Recipe.of(name)


def test_a_recipe_without_a_target_says_nothing_of_one():
    assert "target" not in Recipe.of("default").to_dict()
    with pytest.raises(RecipeError, match="Unknown recipe for a target 'nunchaku'"):
        Recipe(parse_scheme("int4+bf16"), target="nunchaku")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"scheme": "mxfp4+bf16"}, r"its main weight is mxfp4, and not int4\."),
        ({"scheme": "int4+w8a8-h0"}, r"its branch is in mxint8, and not in bf16"),
        ({"scheme": "int4+bf16-r32-h32"}, r"its layers are rotated by blocks of 32"),
        ({"scheme": "int4+bf16-r24"}, r"its rank 24 is not a multiple of 16, such as 16 or 32"),
        ({"scheme": "int4"}, "it has no branch"),
        ({"scheme": "int4+bf16", "method": "rtn"}, "it has no branch"),
        ({"scheme": "int4+bf16", "allocation": "greedy"}, "takes one rank.*Leave that out"),
        (
            {"scheme": "int4+bf16-r32", "rules": [{"match": "a*", "branch": {"rank": 48}}]},
            "needs one rank for all layers, and the recipe has 32, 48",
        ),
        (
            {"scheme": "int4+bf16", "rules": [{"match": "a*", "branch": {"rank": 32}}]},
            "the recipe has that of the budget, 32",
        ),
        (
            {"scheme": "int4+bf16", "rules": [{"match": "a*", "weight": "nvfp4"}]},
            r"Rule 'a\*' does not fit target 'nunchaku-lite' of 'nunchaku-int4'",
        ),
    ],
)
def test_what_a_target_does_not_hold_is_an_error_of_the_recipe(table, message):
    Recipe.from_dict(table)
    with pytest.raises(RecipeError, match=f"(?s){message}") as caught:
        Recipe.from_dict(table | {"target": "nunchaku-int4"})
    if "--allocate" not in str(caught.value):
        assert "Use the recipe 'nunchaku-int4' as it is." in str(caught.value)


def test_formats_of_one_file_may_differ_where_the_target_says_so():
    rules = [{"match": "a*", "weight": "int5_b32"}]
    assert Recipe.from_dict({"scheme": "gguf-q4_0", "rules": rules}).rules
    with pytest.raises(RecipeError, match="its main weight is int5_b32, and not int4"):
        Recipe.from_dict({"scheme": "sdnq", "rules": rules})


def test_rules_that_leave_layers_out_break_nothing():
    rules = [{"match": "a*", "skip": True}, {"match": "b*", "keep": True}]
    assert Recipe.from_dict({"scheme": "nunchaku-int4", "rules": rules}).rules


def test_modulations_are_what_the_target_has_for_them():
    name, kind = "transformer_blocks.0.norm1.linear", "FluxTransformer2DModel"
    for recipe in ("nunchaku-int4", "nunchaku-nvfp4"):
        assert Recipe.of(recipe).scheme_for(name, PLAIN, kind) == Scheme("int4")
    assert Recipe.of("sdnq").scheme_for(name, PLAIN, kind).branch is not None


@pytest.mark.parametrize(
    ("target", "scheme", "shape", "is_conv", "why"),
    [
        ("nunchaku-lite", "int4+bf16", (256, 384), False, ""),
        ("nunchaku-lite", "int4+bf16", (2240, 2240), False, "2240×2240 is not in multiples of 128"),
        ("nunchaku-lite", "int4-a16", (12, 64), False, ""),
        ("nunchaku-lite", "int4-a16", (12, 32), False, "12×32 is not in multiples of 4×64"),
        ("nunchaku-lite", "int4+bf16", (256, 256), True, "no quantized convolution"),
        ("sdnq", "int4-a16+bf16", (256, 256), True, ""),
        ("sdnq", "int4-a16+bf16", (256, 96), False, "its input of 96 is not a multiple of 64"),
        ("gguf", "int4_b32-a16+bf16", (7, 96), False, ""),
        ("gguf", "int4_b32-a16+bf16", (7, 80), False, "7×80 is not in multiples of 1×32"),
        ("onnx", "int4_b32-a16+w8a8", (7, 96), False, ""),
        ("torchao", "nvfp4-a16+bf16", (7, 24), False, "its input of 24 is not a multiple of 16"),
        ("sdnq", "int4-a16", (8, 256, 256), False, "stacked experts"),
    ],
)
def test_layers_within_the_limits_and_beyond(target, scheme, shape, is_conv, why):
    found = limits_of(target).explain_misfit(parse_scheme(scheme), shape, is_conv=is_conv)
    assert (why in found) if why else not found


def test_a_modulation_with_a_lora_is_a_layer_with_a_branch():
    limits = limits_of("nunchaku-lite")
    assert not limits.explain_misfit(Scheme("int4"), (12, 64))
    assert "128×128" in limits.explain_misfit(Scheme("int4"), (12, 64), lora_rank=8)


def test_classes_are_known_by_name_or_not_at_all():
    class FluxTransformer2DModel(nn.Module):
        pass

    class Mine(FluxTransformer2DModel):
        pass

    class PreTrainedModel(nn.Module):
        pass

    assert not limits_of("gguf").explain_class(Mine)
    assert "single file" in limits_of("gguf").explain_class(nn.Linear)
    assert not limits_of("torchao").explain_class(Mine)
    for target in TARGETS:
        assert "models of diffusers" in limits_of(target).explain_class(PreTrainedModel)


def test_the_classes_of_gguf_are_those_of_diffusers():
    pytest.importorskip("diffusers")
    from loraq.integrations.diffusers import _quiet_diffusers

    with _quiet_diffusers() as diffusers:
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        able = {
            name
            for name in SINGLE_FILE_LOADABLE_CLASSES
            if hasattr(getattr(diffusers, name), "load_lora_adapter")
        }
    assert able == set(limits_of("gguf").classes)


def test_what_holds_most_holds_convolutions_and_every_class():
    limits = fallback().limits
    assert limits.convolutions
    assert not limits.classes
    assert limits.rank_step == 1
