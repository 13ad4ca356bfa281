"""Recipes: what they hold, how they are read from tables and files, and the ranks of a budget."""

import json
from dataclasses import replace

import pytest

from loraq.budget import Budget
from loraq.errors import FormatError, LoraqError, RecipeError
from loraq.methods import EFFORTS, GPTQ, LQER, METHODS, RTN, LoRaQ, SVDQuant
from loraq.recipe import Recipe
from loraq.rules import Rule
from loraq.scheme import Branch, Scheme

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


def recipe_of(**changes) -> Recipe:
    return Recipe(Scheme("mxfp4", "mxfp4", Branch(16, "mxint8", "mxint8")), **changes)


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
            r"option of method 'lqer' 'steps'.*Known: rotate, scale_rule",
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


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"gptq"}))
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
            r"Unknown key in recipe 'sed'\. Did you mean 'seed'.*budget, effort, keep, method",
        ),
        (
            {"scheme": {"weight": "mxfp4", "rank": 3}},
            r"key in scheme 'rank'.*Known: activation, branch, rotation, smoothing, weight",
        ),
        (
            {"scheme": {"weight": "mxfp4", "branch": {"rnk": 3}}},
            r"key in scheme\.branch 'rnk'\. Did you mean 'rank'.*activation, intermediate, rank, "
            r"weight",
        ),
        (
            {**MINIMAL, "rules": [{"match": "*"}, {"match": "a", "skipp": True}]},
            r"key in rules\[1\] 'skipp'\. Did you mean 'skip'.*activation, branch, keep, match, "
            r"reason, skip, weight",
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
