"""Recipes: the grammar of names, files, rules, and which layers of the known models are left alone."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from loraq.budget import Budget
from loraq.errors import FormatError, LoraqError, RecipeError, SchemeError
from loraq.formats import FORMATS, get_format
from loraq.layers import linear_layers, matrix_shapes
from loraq.methods import EFFORTS, GPTQ, LQER, RTN, LoRaQ, SVDQuant
from loraq.recipe import (
    GRAMMAR,
    METHODS,
    NAMED,
    SHOWCASE,
    Recipe,
    Rule,
    families,
    family_rules,
    parse_scheme,
)
from loraq.scheme import Branch, Scheme

#: What the branch names mean: weight, activation, intermediate.
W8A8 = ("mxint8", "mxint8", "int8")
W6A6 = ("mxfp6_e2m3", "mxfp6_e2m3", "int8")
W6A8 = ("mxfp6_e2m3", "mxint8", "int8")
W4A8 = ("mxfp4", "mxint8", "int8")
W16A16 = ("bf16", "bf16", None)

#: The canonical meaning of names: main weight, its activations, rank (0 is left to the budget),
#: branch formats.
MEANING = {
    "mxfp4": ("mxfp4", "mxfp4", None, None),
    "mxfp4+w8a8": ("mxfp4", "mxfp4", 0, W8A8),
    "mxfp4+w6a6": ("mxfp4", "mxfp4", 0, W6A6),
    "mxfp4+w6a8": ("mxfp4", "mxfp4", 0, W6A8),
    "mxfp4-a8+w6a8": ("mxfp4", "mxint8", 0, W6A8),
    "mxfp4+w4a8": ("mxfp4", "mxfp4", 0, W4A8),
    "mxfp4+bf16": ("mxfp4", "mxfp4", 0, W16A16),
    "mxfp4+bf16-r32": ("mxfp4", "mxfp4", 32, W16A16),
    "mxfp4+w8a8-r64": ("mxfp4", "mxfp4", 64, W8A8),
    "mxfp4-a4+w8a8-r64": ("mxfp4", "mxfp4", 64, W8A8),
    "mxfp4-a8+w8a8": ("mxfp4", "mxint8", 0, W8A8),
    "mxfp4-a8+w6a6": ("mxfp4", "mxint8", 0, W6A6),
    "mxfp4-a16+w8a8": ("mxfp4", "bf16", 0, ("mxint8", "bf16", None)),
    "mxfp4-a16+w6a6": ("mxfp4", "bf16", 0, ("mxfp6_e2m3", "bf16", None)),
    "mxfp4-a16": ("mxfp4", "bf16", None, None),
    "mxfp4-amxfp8_e4m3": ("mxfp4", "mxfp8_e4m3", None, None),
    "mxfp4-amxint8+bf16-r32": ("mxfp4", "mxint8", 32, W16A16),
    "mxfp4-amxfp8_e4m3+w8a8-r64": ("mxfp4", "mxfp8_e4m3", 64, W8A8),
    "mxfp4+mxint8": ("mxfp4", "mxfp4", 0, ("mxint8", "mxint8", None)),
    "mxfp4+mxfp6_e3m2-r85": ("mxfp4", "mxfp4", 85, ("mxfp6_e3m2", "mxfp6_e3m2", None)),
    "mxfp4+nvfp4-r8": ("mxfp4", "mxfp4", 8, ("nvfp4", "nvfp4", None)),
    "mxfp4+int4-r8": ("mxfp4", "mxfp4", 8, ("int4", "int4", None)),
    "mxfp4+fp16-r8": ("mxfp4", "mxfp4", 8, ("fp16", "fp16", None)),
    "nvfp4+w8a8": ("nvfp4", "nvfp4", 0, W8A8),
    "nvfp4+bf16-r32": ("nvfp4", "nvfp4", 32, W16A16),
    "nvfp4-a8": ("nvfp4", "mxint8", None, None),
    "int4+bf16-r32": ("int4", "int4", 32, W16A16),
    "int4-a16+bf16-r32": ("int4", "bf16", 32, W16A16),
    "int4-a8+w8a8": ("int4", "int8", 0, W8A8),
    "int4_b128-a16": ("int4_b128", "bf16", None, None),
    "mxint4+w8a8": ("mxint4", "mxint4", 0, W8A8),
    "mxint4-a8": ("mxint4", "mxint8", None, None),
    "int5": ("int5", "int8", None, None),
    "int5-a16": ("int5", "bf16", None, None),
    "int6-a4": ("int6", "int4", None, None),
    "int8": ("int8", "int8", None, None),
    "int8_b64-a16": ("int8_b64", "bf16", None, None),
    "mxint6": ("mxint6", "mxint8", None, None),
    "mxfp6_e3m2": ("mxfp6_e3m2", "mxint8", None, None),
    "fp8_e4m3": ("fp8_e4m3", "fp8_e4m3", None, None),
    "fp8_e4m3-a4+w8a8-r4": ("fp8_e4m3", "mxfp4", 4, W8A8),
}

MINIMAL = {"scheme": {"weight": "mxfp4"}}

TOML = """
method = "svdquant"
effort = "fast"
seed = 7
budget = 5.5

[options]
rounds = 12

[scheme]
weight = "mxint4"
activation = "mxint8"
branch = { weight = "mxint8", activation = "mxint8", intermediate = "bf16" }

[[rules]]
match = "*.norm*"
skip = true
reason = "small"

[[rules]]
match = "transformer_blocks.*.ff.net.2"
branch = { rank = 64 }

[[rules]]
match = "proj_out"
skip = false
weight = "mxint8"
activation = "bf16"
"""


def meaning(scheme: Scheme) -> tuple:
    branch = scheme.branch
    if branch is None:
        return scheme.weight, scheme.activation, None, None
    return (
        scheme.weight,
        scheme.activation,
        branch.rank,
        (branch.weight, branch.activation, branch.intermediate),
    )


def recipe_of(**changes) -> Recipe:
    return Recipe(Scheme("mxfp4", "mxfp4", Branch(16, "mxint8", "mxint8")), **changes)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), MEANING.items())
def test_a_name_has_one_meaning(name, expected):
    scheme = parse_scheme(name)
    assert meaning(scheme) == expected
    assert Recipe.named(name) == Recipe(scheme)
    assert Recipe.of(name) == Recipe(scheme)


@pytest.mark.parametrize("name", [*SHOWCASE, *NAMED.values()])
def test_a_name_worth_knowing_can_be_used_and_fits_a_layer(name):
    scheme = Recipe.of(name).scheme_for("blocks.0.attn.to_q", (1152, 1152))
    assert scheme is not None
    assert scheme.nbytes((1152, 1152)) < 1152 * 1152


@pytest.mark.parametrize("main", ["mxfp4", "nvfp4", "int4", "mxint4", "int5"])
@pytest.mark.parametrize(
    "branch", ["", "+bf16", "+w8a8", "+w6a6", "+w6a8", "+w4a8", "+bf16-r32", "+w8a8-r7"]
)
@pytest.mark.parametrize("width", ["", "-a4", "-a8", "-a16"])
def test_any_combination_can_be_asked_for(main, branch, width):
    scheme = parse_scheme(main + width + branch)
    assert scheme.weight == main
    assert (scheme.branch is None) == (branch == "")
    bits = int(width[2:] or (8 if main == "int5" else 4))
    assert get_format(scheme.activation).bits == bits
    if bits == 16 and scheme.branch is not None:
        assert (
            scheme.branch.activation_format
            == scheme.branch.intermediate_format
            == get_format("bf16")
        )


@pytest.mark.parametrize("main", [name for name in FORMATS if FORMATS[name].bits <= 8])
def test_every_format_of_up_to_8_bits_can_be_the_main_one(main):
    for width in ("", "-a4", "-a8", "-a16"):
        assert parse_scheme(main + width).weight == main


def test_every_format_can_be_that_of_the_branch_or_of_the_activations():
    for name in FORMATS:
        assert parse_scheme(f"mxfp4+{name}-r8").branch.weight == name
        assert parse_scheme(f"mxfp4-a{name}").activation == name


def test_the_default_has_no_16_bit_part():
    scheme = Recipe.named("default").scheme
    assert scheme.branch is not None
    formats = (scheme.weight, scheme.activation, scheme.branch.weight, scheme.branch.activation)
    assert all(
        get_format(name).bits < 16 for name in (*formats, scheme.branch.intermediate or "int4")
    )


def test_the_grammar_explains_its_own_words():
    words = set(re.findall(r"\bw\d+a\d+\b", GRAMMAR))
    assert words == {"w8a8", "w6a6", "w6a8", "w4a8"}
    for word in words:
        assert parse_scheme(f"mxfp4+{word}").branch is not None
    for word in re.findall(r"^MAIN .*: (.*) …$", GRAMMAR, re.MULTILINE)[0].split(", "):
        assert parse_scheme(word).weight == word
    assert "a16" in GRAMMAR


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"Cannot read the recipe name ''.*MAIN\[-aBITS\]\[\+BRANCH"),
        ("MXFP4-w8a8", r"Cannot read the recipe name 'MXFP4-w8a8'.*MAIN\[-aBITS\]\[\+BRANCH"),
        ("mxfp4_w8a8!", r"Cannot read the recipe name.*MAIN\[-aBITS\]\[\+BRANCH"),
        ("mxfp4 ", "Cannot read the recipe name 'mxfp4 '"),
        ("mxfp4-", "Cannot read the recipe name"),
        ("mxfp4+", "Cannot read the recipe name"),
        ("+w8a8", "Cannot read the recipe name"),
        ("mxfp4-r8+w8a8", "Cannot read the recipe name"),
        ("mxfp4+w8a8-a8", "Cannot read the recipe name"),
        ("mxfp4--a8", "Cannot read the recipe name"),
        ("mxfp4+w8a8-r-8", "Cannot read the recipe name"),
        (
            "mxfp5",
            r"'mxfp5': Unknown number format 'mxfp5'\. Did you mean 'mxfp4'.*Named recipes: "
            r"default",
        ),
        ("defualt", r"Unknown number format 'defualt'.*Named recipes: default"),
        ("int4_b12", r"Block size 12 .* not a multiple of 8"),
        ("bf16", r"MAIN 'bf16' has 16 bits\. Use a format of 4 to 8 bits"),
        ("fp16+w8a8-r8", "MAIN 'fp16' has 16 bits"),
        ("mxfp4+w8a9", r"Unknown branch 'w8a9'\. Did you mean 'w8a8'.*bf16"),
        ("mxfp4+w4a4-r8", r"Unknown branch 'w4a4'.*w4a8"),
        ("mxfp4+w16a16", r"Unknown branch 'w16a16'.*bf16"),
        ("mxfp4+rtn", "Unknown branch 'rtn'"),
        ("mxfp4-a5+w8a8", r"activations 'a5'\. Use -a4, -a8, -a16"),
        ("mxfp4-amxfp5", r"activations 'amxfp5'\. Use -a4, -a8, -a16"),
        ("mxfp4+bf16-r0", r"rank 0\. Use a rank of at least 1"),
        ("mxfp4-a8+w8a8-r0", "rank 0"),
    ],
)
def test_a_name_outside_the_grammar_is_refused(name, message):
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        Recipe.named(name)
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        Recipe.of(name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mxfp4-w8a8", "mxfp4+w8a8"),
        ("mxfp4-w8a8-a8", "mxfp4-a8+w8a8"),
        ("int4-w6a6-r85-a16", "int4-a16+w6a6-r85"),
        ("mxfp4-r32", "mxfp4+bf16-r32"),
        ("int4-w16a16-r32-a16", "int4-a16+bf16-r32"),
        ("mxfp4-w8a8-r64-h0-a4", "mxfp4-a4+w8a8-r64-h0"),
        ("mxfp4-mxfp8_e4m3-r8-amxfp8_e4m3", "mxfp4-amxfp8_e4m3+mxfp8_e4m3-r8"),
    ],
)
def test_a_name_of_the_old_grammar_is_answered_with_the_new_spelling(old, new):
    with pytest.raises(RecipeError, match=re.escape(f"'{old}' is written '{new}'")):
        Recipe.of(old)
    assert parse_scheme(new)


@pytest.mark.parametrize("what", [None, 4, 4.5, b"mxfp4", ["mxfp4"]])
def test_what_is_no_recipe_is_refused(what):
    with pytest.raises(RecipeError):
        Recipe.of(what)


# --- what a recipe holds --------------------------------------------------------------------------


def test_a_recipe_is_made_of_any_of_its_forms(tmp_path):
    scheme = Scheme("int4", "int4", Branch(32))
    recipe = Recipe(scheme)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.to_dict()))
    assert Recipe.of(recipe) is recipe
    assert (
        Recipe.of(scheme)
        == Recipe.of("int4+bf16-r32")
        == Recipe.of(path)
        == Recipe.of(str(path))
        == recipe
    )


def test_the_defaults():
    recipe = Recipe(Scheme("mxfp4"))
    assert (recipe.method, recipe.effort, recipe.seed, recipe.budget) == (
        "loraq",
        "default",
        0,
        "r16=32",
    )
    assert recipe.options == {}
    assert recipe.rules == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"method": "lorak"},
            r"Unknown method 'lorak'\. Did you mean 'loraq'.*Known: gptq, loraq, lqer, qera, rtn, "
            r"svdquant",
        ),
        ({"effort": "good"}, r"Unknown effort 'good'.*Known: best, default, fast"),
        (
            {"options": {"stepps": 3}},
            r"Unknown option of method 'loraq' 'stepps'\. Did you mean 'steps'",
        ),
        (
            {"method": "lqer", "options": {"steps": 3}},
            r"option of method 'lqer' 'steps'.*Known: scale_rule",
        ),
        ({"options": {"steps": "many"}}, r"'steps' in options is 'many'\. It must be of type int"),
        (
            {"options": {"activation_aware": 1}},
            r"'activation_aware' in options is 1\. It must be of type bool",
        ),
        (
            {"rules": (Rule("a"), Rule("b*", branch={"rnk": 3}))},
            r"key in branch of rule 'b\*' 'rnk'.*'rank'",
        ),
        (
            {"rules": (Rule("b", branch={"rank": "3"}),)},
            r"'rank' in branch of rule 'b' is '3'\. It must be of type int",
        ),
    ],
)
def test_a_field_that_means_nothing_is_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of(**change)


@pytest.mark.parametrize("scheme", ["mxfp4+w8a8", None, {"weight": "mxfp4"}])
def test_the_scheme_of_a_recipe_is_a_scheme(scheme):
    with pytest.raises(
        RecipeError, match=r"scheme is .*Use a `Scheme`, or `Recipe\.named` for a name"
    ):
        Recipe(scheme)


def test_the_formats_of_a_rule_are_known_when_the_recipe_is_made():
    with pytest.raises(FormatError, match="Unknown number format 'mxfp5'"):
        recipe_of(rules=(Rule("*", weight="mxfp5"),))


def test_the_method_is_made_with_effort_and_options():
    scheme = recipe_of().scheme
    for effort, (steps, refine_steps) in EFFORTS.items():
        assert recipe_of(effort=effort).solver(scheme) == LoRaQ(
            steps=steps, refine_steps=refine_steps
        )
    options = {"steps": 3, "heat": 2, "decay": None}
    assert recipe_of(effort="fast", options=options).solver(scheme) == replace(
        LoRaQ.at("fast"), **options
    )
    assert recipe_of(method="svdquant", options={"rounds": 9}).solver(scheme) == SVDQuant(rounds=9)
    assert recipe_of(method="lqer").solver(scheme) == LQER()


@pytest.mark.parametrize("method", set(METHODS) - {"gptq"})
def test_without_a_branch_every_method_but_gptq_is_round_to_nearest(method):
    assert recipe_of(method=method).solver(Scheme("mxfp4")) == RTN()


def test_gptq_needs_no_branch():
    assert recipe_of(method="gptq", options={"damping": 0.1}).solver(Scheme("mxfp4")) == GPTQ(
        damping=0.1
    )


# --- files ----------------------------------------------------------------------------------------


def test_a_toml_file_is_read_field_by_field(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(TOML)
    assert Recipe.read(path) == Recipe(
        scheme=Scheme("mxint4", "mxint8", Branch(0, "mxint8", "mxint8", "bf16")),
        method="svdquant",
        effort="fast",
        options={"rounds": 12},
        seed=7,
        budget="5.5",
        rules=(
            Rule("*.norm*", skip=True, reason="small"),
            Rule("transformer_blocks.*.ff.net.2", branch={"rank": 64}),
            Rule("proj_out", skip=False, weight="mxint8", activation="bf16"),
        ),
    )


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(Scheme("int5", "bf16")),
        Recipe.of("default"),
        Recipe.of("mxfp4-a4+w8a8-r64"),
        recipe_of(options={"steps": 10, "decay": 0.01}, seed=3, effort="best", budget="4.75"),
        recipe_of(
            rules=(
                Rule("a*", skip=True),
                Rule("b", skip=False, reason="why"),
                Rule("c", branch={"rank": 3}),
            )
        ),
    ],
    ids=str,
)
def test_plain_data_and_json_make_an_equal_recipe(recipe, tmp_path):
    plain = recipe.to_dict()
    assert Recipe.from_dict(plain) == recipe
    text = json.dumps(plain, allow_nan=False)
    path = tmp_path / "recipe.json"
    path.write_text(text)
    assert Recipe.read(path) == recipe
    assert json.dumps(Recipe.read(path).to_dict()) == text


def test_reading_leaves_the_plain_data_as_it_was(tmp_path):
    plain = Recipe.of("default").to_dict()
    before = json.dumps(plain)
    Recipe.from_dict(plain)
    assert json.dumps(plain) == before


@pytest.mark.parametrize("name", ["default", "mxfp4-a4+w8a8-r64", "int5-a16"])
def test_the_scheme_may_be_a_name(name):
    assert Recipe.from_dict({"scheme": name, "seed": 1}) == replace(Recipe.of(name), seed=1)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (
            {**MINIMAL, "sed": 1},
            r"Unknown key in recipe 'sed'\. Did you mean 'seed'.*budget, effort, method",
        ),
        (
            {"scheme": {"weight": "mxfp4", "rank": 3}},
            r"key in scheme 'rank'.*Known: activation, branch, rotation, weight",
        ),
        (
            {"scheme": {"weight": "mxfp4", "branch": {"rnk": 3}}},
            r"key in scheme\.branch 'rnk'\. Did you mean 'rank'.*activation, intermediate, rank, "
            r"weight",
        ),
        (
            {**MINIMAL, "rules": [{"match": "*"}, {"match": "a", "skipp": True}]},
            r"key in rules\[1\] 'skipp'\. Did you mean 'skip'.*activation, branch, match, reason, "
            r"skip, weight",
        ),
        (
            {**MINIMAL, "rules": [{"match": "a*", "branch": {"ranks": 3}}]},
            r"key in branch of rule 'a\*' 'ranks'\. Did you mean 'rank'",
        ),
        (
            {**MINIMAL, "options": {"step": 3}},
            r"option of method 'loraq' 'step'\. Did you mean 'steps'",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_legal_ones(plain, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(plain)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (None, r"'recipe' is None\. A table is required"),
        ([MINIMAL], "'recipe' is .* A table is required"),
        ({}, r"has no scheme\. Add a \[scheme\] table with at least `weight`"),
        ({"scheme": {}}, "'scheme' has no 'weight'"),
        ({"scheme": None}, "'scheme' in recipe is None"),
        ({"scheme": 3}, r"'scheme' in recipe is 3\. It must be of type table or string"),
        ({"scheme": {"weight": 4}}, r"'weight' in scheme is 4\. It must be of type str"),
        (
            {"scheme": {"weight": "mxfp4", "branch": "w8a8"}},
            r"'branch' in scheme is 'w8a8'.*of type table",
        ),
        (
            {"scheme": {"weight": "mxfp4", "branch": {"rank": "32"}}},
            r"'rank' in scheme\.branch is '32'.*type int",
        ),
        (
            {"scheme": {"weight": "mxfp4", "branch": {"rank": True}}},
            r"'rank' in scheme\.branch is True.*type int",
        ),
        (
            {"scheme": {"weight": "mxfp4", "branch": {"rank": 8.5}}},
            r"'rank' in scheme\.branch is 8\.5.*type int",
        ),
        ({**MINIMAL, "seed": "1"}, r"'seed' in recipe is '1'\. It must be of type int"),
        ({**MINIMAL, "seed": True}, r"'seed' in recipe is True\. It must be of type int"),
        ({**MINIMAL, "method": 1}, r"'method' in recipe is 1\. It must be of type str"),
        ({**MINIMAL, "rules": {"match": "*"}}, r"'rules' in recipe is .*of type array of tables"),
        ({**MINIMAL, "rules": ["*"]}, r"'rules\[0\]' is '\*'\. A table is required"),
        ({**MINIMAL, "rules": [{"skip": True}]}, r"'rules\[0\]' has no 'match'"),
        ({**MINIMAL, "rules": [{"match": "*", "skip": "yes"}]}, r"'skip' in rules\[0\] is 'yes'"),
        ({**MINIMAL, "rules": [{"match": "*", "skip": 1}]}, r"'skip' in rules\[0\] is 1"),
        (
            {**MINIMAL, "rules": [{"match": "*", "branch": "w8a8"}]},
            r"'branch' in rules\[0\] is 'w8a8'.*type table",
        ),
        ({**MINIMAL, "options": 3}, r"'options' in recipe is 3\. It must be of type table"),
    ],
)
def test_a_value_of_the_wrong_type_or_a_missing_one_is_refused(plain, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(plain)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"scheme": {"weight": "mxfp5"}}, "Unknown number format 'mxfp5'"),
        (
            {"scheme": {"weight": "mxfp4", "branch": {"weight": "w8a8"}}},
            "Unknown number format 'w8a8'",
        ),
        (
            {**MINIMAL, "rules": [{"match": "*", "weight": "mxfp5"}]},
            "Unknown number format 'mxfp5'",
        ),
        ({**MINIMAL, "rules": [{"match": "*", "branch": {"rank": -1}}]}, "Branch rank is -1"),
        ({**MINIMAL, "budget": "much"}, "Cannot read the budget 'much'"),
        ({**MINIMAL, "budget": -1}, "Cannot read the budget '-1'"),
        ({**MINIMAL, "budget": "r16=0"}, "Cannot read the budget 'r16=0'"),
    ],
)
def test_a_value_that_means_nothing_is_found_when_the_recipe_is_made(plain, message):
    with pytest.raises(LoraqError, match=message):
        Recipe.from_dict(plain)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "scheme = ", r"Cannot read the recipe '.*a\.toml'"),
        ("a.json", "{", r"Cannot read the recipe '.*a\.json'"),
        ("a.json", "[]", r"Cannot read the recipe '.*a\.json': 'recipe' is \[\]"),
        (
            "a.toml",
            "[scheme]\nweight = 'mxfp5'",
            r"Cannot read the recipe '.*a\.toml': Unknown number format",
        ),
        (
            "a.toml",
            "[scheme]\nweigth = 'mxfp4'",
            r"a\.toml': Unknown key in scheme 'weigth'\. Did you mean 'weight'",
        ),
        ("a.toml", b"\xff\xfe", r"Cannot read the recipe '.*a\.toml'"),
        ("a.toml", None, r"Cannot read the recipe '.*a\.toml'.*No such file"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=message):
        Recipe.of(path)


# --- rules ----------------------------------------------------------------------------------------


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
    assert recipe_of().scheme_for(name, (64, 64), model_class) is None
    assert recipe_of().scheme_for(name, (64, 64)) is not None
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


# --- budget ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["5.25", 5.25, "r16=32", "r16=8", 6])
def test_a_rank_left_open_is_the_largest_one_the_budget_pays_for(budget):
    shape = (1152, 1152)
    recipe = Recipe.from_dict({"scheme": "mxfp4+w8a8", "budget": budget})
    scheme = recipe.scheme_for("a", shape)
    allowed = Budget.parse(budget)
    limit = allowed.branch_bytes(shape, scheme.weight_format.nbytes(shape))
    assert (
        scheme.branch.nbytes(shape)
        <= limit
        < replace(scheme.branch, rank=scheme.branch.rank + 1).nbytes(shape)
    )


@pytest.mark.parametrize(
    ("name", "rank"),
    [("mxfp4+bf16", 32), ("mxfp4+w8a8", 62), ("mxfp4+w6a6", 81), ("mxfp4+w4a8", 120)],
)
def test_the_ranks_of_equal_bytes_at_width_1152(name, rank):
    assert Recipe.of(name).scheme_for("a", (1152, 1152)).branch.rank == rank


def test_a_rank_that_is_given_stands_whatever_the_budget():
    assert (
        replace(Recipe.of("mxfp4+w8a8-r3"), budget="r16=500").scheme_for("a", (64, 64)).branch.rank
        == 3
    )


def test_each_layer_gets_the_rank_of_its_own_shape():
    of_bytes, of_bits = Recipe.of("mxfp4+w8a8"), replace(Recipe.of("mxfp4+w8a8"), budget="5.25")
    shapes = [(128, 128), (1152, 1152), (4608, 1152)]
    assert of_bytes.scheme_for("a", (40, 64)).branch.rank == 40  # never more than min(out, in)
    assert all(60 <= of_bytes.scheme_for("a", shape).branch.rank <= 62 for shape in shapes)
    small, wide, tall = (of_bits.scheme_for("a", shape).branch.rank for shape in shapes)
    assert small < wide / 8
    assert wide < tall


# --- the layers of known models -------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("diffusers")
    from loraq.integrations.diffusers import _quiet_diffusers

    with _quiet_diffusers() as module:
        for family in families().values():
            for name in family.classes:
                getattr(module, name)  # loaded on first use
        return module


def on_meta(kind: type, **config) -> nn.Module:
    with torch.device("meta"):
        return kind(**config)


def kept_and_quantized(model: nn.Module) -> tuple[dict[str, str], set[str]]:
    recipe, name = Recipe.of("mxfp4"), type(model).__name__
    names = list(linear_layers(model))
    kept = {
        layer: recipe.rule_for(layer, name).reason
        for layer in names
        if not recipe.scheme_for(layer, (64, 64), name)
    }
    return kept, set(names) - set(kept)


def test_of_pixart_sigma_xl_the_same_224_layers_are_quantized_as_by_svdquant(diffusers):
    # The published configuration of PixArt-Sigma-XL-2-1024-MS.
    model = on_meta(
        diffusers.PixArtTransformer2DModel,
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        cross_attention_dim=1152,
        attention_bias=True,
        sample_size=128,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        interpolation_scale=2,
        use_additional_conditions=False,
        caption_channels=4096,
    )
    kept, quantized = kept_and_quantized(model)
    parts = [f"attn1.to_{part}" for part in ("q", "k", "v", "out.0")] + [
        "attn2.to_q",
        "attn2.to_out.0",
    ]
    parts += ["ff.net.0.proj", "ff.net.2"]
    assert len(quantized) == 224
    assert quantized == {f"transformer_blocks.{i}.{part}" for i in range(28) for part in parts}
    assert len(kept) == 62
    shapes = matrix_shapes(model)
    assert sum(math.prod(shapes[name]) for name in quantized) == 28 * (
        6 * 1152**2 + 2 * 1152 * 4608
    )


def test_the_layers_of_a_small_pixart_that_stay(diffusers):
    model = on_meta(
        diffusers.PixArtTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        num_layers=1,
        sample_size=64,
        use_additional_conditions=True,
        caption_channels=32,
    )
    embedders = ("timestep_embedder", "resolution_embedder", "aspect_ratio_embedder")
    assert kept_and_quantized(model)[0] == {
        **{f"adaln_single.emb.{e}.linear_{i}": "embedding" for e in embedders for i in (1, 2)},
        "adaln_single.linear": "adaptive norm",
        "caption_projection.linear_1": "text projection",
        "caption_projection.linear_2": "text projection",
        "transformer_blocks.0.attn2.to_k": "text-side projection of the cross-attention",
        "transformer_blocks.0.attn2.to_v": "text-side projection of the cross-attention",
        "proj_out": "output projection",
    }


def test_the_layers_of_a_small_sana_that_stay(diffusers):
    model = on_meta(
        diffusers.SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=32,
        sample_size=8,
    )
    kept, quantized = kept_and_quantized(model)
    assert kept == {
        "time_embed.emb.timestep_embedder.linear_1": "embedding",
        "time_embed.emb.timestep_embedder.linear_2": "embedding",
        "time_embed.linear": "embedding",
        "patch_embed.proj": "embedding",
        "caption_projection.linear_1": "text projection",
        "caption_projection.linear_2": "text projection",
        **{
            f"transformer_blocks.{i}.attn2.to_{part}": "text-side projection of the cross-attention"
            for i in range(2)
            for part in "kv"
        },
        "proj_out": "output projection",
    }
    parts = [f"attn1.to_{part}" for part in ("q", "k", "v", "out.0")] + [
        "attn2.to_q",
        "attn2.to_out.0",
    ]
    parts += ["ff.conv_inverted", "ff.conv_point"]
    assert quantized == {f"transformer_blocks.{i}.{part}" for i in range(2) for part in parts}


def test_the_layers_of_a_small_flux_that_stay(diffusers):
    model = on_meta(
        diffusers.FluxTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=True,
    )
    kept, quantized = kept_and_quantized(model)
    embedders = ("timestep_embedder", "guidance_embedder", "text_embedder")
    assert kept == {
        **{f"time_text_embed.{e}.linear_{i}": "embedding" for e in embedders for i in (1, 2)},
        "context_embedder": "text projection",
        "x_embedder": "input projection",
        "norm_out.linear": "adaptive norm of the output",
        "proj_out": "output projection",
    }
    modulation = {f"transformer_blocks.0.norm1{part}.linear" for part in ("", "_context")}
    modulation |= {"single_transformer_blocks.0.norm.linear"}
    assert quantized == {
        *(f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
        *(
            f"transformer_blocks.0.attn.{part}"
            for part in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        ),
        *(
            f"transformer_blocks.0.{ff}.{part}"
            for ff in ("ff", "ff_context")
            for part in ("net.0.proj", "net.2")
        ),
        *(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.0.proj_mlp",
        "single_transformer_blocks.0.proj_out",
        *modulation,
    }
    recipe = Recipe.of("mxfp4+w8a8")
    schemes = {
        name: recipe.scheme_for(name, (64, 64), "FluxTransformer2DModel") for name in quantized
    }
    assert {name for name, scheme in schemes.items() if scheme.activation == "bf16"} == modulation
    assert {scheme.activation for name, scheme in schemes.items() if name not in modulation} == {
        "mxfp4"
    }


def test_every_rule_of_a_family_gives_a_reason_and_says_what_to_do(diffusers):
    *named, last = families().items()
    assert last[0] == "any"
    assert not last[1].classes
    for name, family in named:
        assert family.classes, name
        assert all(hasattr(diffusers, kind) for kind in family.classes)
    for _, family in families().items():
        assert all(
            rule.reason and (rule.weight_only or rule.skip is not None) for rule in family.rules
        )


def test_a_class_gets_the_rules_of_all_its_families_and_those_for_any_last():
    reasons = [rule.reason for rule in family_rules("HunyuanVideoTransformer3DModel")]
    text = reasons.index("blocks that refine the text")
    assert reasons.index("modulation") < text < reasons.index("embedding")
    assert family_rules("SomeTransformer") == families()["any"].rules


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


def test_weight_only_gives_no_branch_to_a_recipe_without_one():
    recipe = Recipe.of("mxfp4")
    assert recipe.scheme_for(
        "transformer_blocks.0.norm1.linear", (64, 64), "FluxTransformer2DModel"
    ) == Scheme("mxfp4")
    assert (
        recipe.scheme_for("transformer_blocks.0.attn.to_q", (64, 64), "FluxTransformer2DModel")
        == recipe.scheme
    )


@pytest.mark.parametrize("more", [{"activation": "mxint8"}, {"branch": {"intermediate": "mxint8"}}])
def test_a_rule_that_is_weight_only_and_names_activations_is_refused(more):
    with pytest.raises(
        RecipeError,
        match=r"Rule 'a\*' is weight-only and names a format of activations\. Leave one",
    ):
        Recipe.from_dict({**MINIMAL, "rules": [{"match": "a*", "weight_only": True, **more}]})


def test_a_rule_of_the_recipe_comes_before_the_family_s():
    name, kind = "transformer_blocks.0.norm1.linear", "FluxTransformer2DModel"
    assert Recipe.of("mxfp4+w8a8").scheme_for(name, (64, 64), kind).activation == "bf16"
    rules = (Rule("*.norm1.linear", skip=False),)
    assert (
        replace(Recipe.of("mxfp4+w8a8"), rules=rules).scheme_for(name, (64, 64), kind).activation
        == "mxfp4"
    )
    assert (
        replace(Recipe.of("mxfp4+w8a8"), rules=(Rule("*norm*", skip=True),)).scheme_for(
            name, (64, 64), kind
        )
        is None
    )


def test_an_unknown_class_gets_the_rules_for_any():
    recipe = Recipe.of("mxfp4")
    for name in ("proj_in", "time_embed.0", "blocks.0.norm.linear", "img_modulation.1"):
        assert recipe.scheme_for(name, (64, 64), "SomeTransformer") is None
    for name in ("blocks.0.attn.to_k", "blocks.0.proj_out", "layers.3.w1"):
        assert recipe.scheme_for(name, (64, 64), "SomeTransformer") is not None


def test_a_format_error_in_a_rule_is_still_a_value_error():
    with pytest.raises(FormatError, match="Unknown number format 'w8a8'"):
        Recipe.from_dict({**MINIMAL, "rules": [{"match": "*", "activation": "w8a8"}]})
