"""Options: what an annotation states is what is taken, everywhere, before any work."""

import inspect
import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import pytest
import torch

import loraq
from loraq import ActivationStats, Branch, Budget, Recipe, Rule, Scheme
from loraq.errors import CalibrationError, LoraqError, RecipeError, SchemeError
from loraq.evaluation import demo
from loraq.integrations.checkpoints import plan_checkpoint
from loraq.methods import METHODS, Method, register
from loraq.options import Range, checked, describe, suits
from loraq.parallel import LoraqColwise, LoraqRowwise
from loraq.recipe import check_table

#: What nobody means, by a name for the test.
WRONG = {
    "None": None,
    "-1": -1,
    "0": 0,
    "NaN": math.nan,
    "inf": math.inf,
    "True": True,
    "'x'": "x",
    "10**30": 10**30,
    "1.5": 1.5,
    "[1]": [1],
}
#: What each kind of option takes of these.
FLAG = {"True"}
WORKERS = SEED = SIZE = STEPS = set()
TEXT = {"'x'"}
QUANTIZE = {
    "effort": TEXT | {"None"},
    "budget": TEXT | {"None", "-1", "0", "1.5"},
    "rank": {"None"},
    "keep": TEXT | {"None"},
    "modules_to_not_convert": {"None"},
    "stats": TEXT | {"None"},
    "device": TEXT | {"None"},
    "backend": TEXT | {"None"},
    "dtype": {"None"},
    "workers": WORKERS,
    "progress": FLAG,
}
#: Options of public functions by what they take; the functions are called with nothing else.
FUNCTIONS = {
    loraq.quantize_weight: {
        "method": TEXT | {"None"},
        "seed": {"None", "0"},
        "name": TEXT,
        "stats": {"None"},
    },
    loraq.plan_model: {"workers": WORKERS, "progress": FLAG},
    loraq.quantize: QUANTIZE,
    loraq.quantize_: QUANTIZE | {"components": TEXT | {"None"}},
    loraq.quantize_checkpoint: {
        "components": TEXT | {"None"},
        "config": TEXT | {"None"},
        "stats": TEXT | {"None"},
        "device": TEXT,
        "workers": WORKERS,
        "shard_bytes": SIZE,
        "overwrite": FLAG,
        "restart": FLAG,
        "link": FLAG,
        "variant": TEXT | {"None"},
        "progress": FLAG,
    },
    plan_checkpoint: {
        "components": TEXT | {"None"},
        "config": TEXT | {"None"},
        "workers": WORKERS,
        "variant": TEXT | {"None"},
        "progress": FLAG,
    },
    loraq.save: {"overwrite": FLAG, "shard_bytes": SIZE},
    loraq.load_into: {"backend": TEXT, "verify": FLAG},
    loraq.load: {
        "component": TEXT | {"None"},
        "backend": TEXT,
        "verify": FLAG,
        "device": TEXT,
        "dtype": {"None"},
    },
    loraq.set_activations: {"simulate": FLAG},
    loraq.ActivationSchedule: {
        "outer": TEXT,
        "first": {"0"},
        "last": {"0"},
        "simulate": FLAG,
    },
    loraq.absorb_lora: {
        "scale": {"-1", "0", "1.5"},
        "component": TEXT | {"None"},
        "variant": TEXT | {"None"},
        "target": TEXT | {"None"},
        "device": TEXT | {"None"},
        "overwrite": FLAG,
        "progress": FLAG,
    },
    loraq.import_checkpoint: {"overwrite": FLAG, "progress": FLAG},
    loraq.append_lora: {
        "name": TEXT | {"None"},
        "component": TEXT | {"None"},
        "target": TEXT | {"None"},
        "overwrite": FLAG,
        "progress": FLAG,
    },
    loraq.export: {
        "to": TEXT,
        "lora": set(),
        "pad_rank": FLAG,
        "allow_dense": FLAG,
        "dtype": TEXT | {"None"},
        "shard_bytes": SIZE | {"None"},
        "link": FLAG,
        "overwrite": FLAG,
        "verify": FLAG,
        "progress": FLAG,
    },
    loraq.plan_export: {
        "to": TEXT,
        "lora": set(),
        "pad_rank": FLAG,
        "allow_dense": FLAG,
        "dtype": TEXT | {"None"},
        "shard_bytes": SIZE | {"None"},
    },
    loraq.remove_lora: {
        "component": TEXT | {"None"},
        "target": TEXT | {"None"},
        "overwrite": FLAG,
        "progress": FLAG,
    },
    loraq.collect_stats: {
        "second_moment": FLAG,
        "sensitivity": FLAG,
        "max_tokens": {"None"},
        "tokens_per_call": {"None"},
        "memory_bytes": {"None"},
        "target": TEXT | {"None"},
    },
    loraq.collect_pipeline_stats: {
        "component": TEXT | {"None"},
        "variant": TEXT | {"None"},
        "prompts": set(),
        "samples": {"None"},
        "steps": {"None"},
        "seed": {"0"},
        "second_moment": FLAG,
        "sensitivity": FLAG,
        "max_tokens": {"None"},
        "memory_bytes": set(),
        "device": TEXT | {"None"},
        "dtype": {"None"},
        "call": {"None"},
        "overwrite": FLAG,
        "progress": FLAG,
    },
    demo.run: {
        "every": FLAG,
        "n_images": {"None"},
        "steps": STEPS,
        "effort": set(),
        "device": TEXT,
        "workers": WORKERS,
        "progress": set(),
    },
    LoraqColwise: {"fused": SIZE, "gather_output": FLAG},
    LoraqRowwise: {"exact_branch": FLAG, "split_input": FLAG},
}


class Untouched:
    """An argument that must not be looked at."""

    def __getattr__(self, name: str):
        raise AssertionError(f"{name} was asked for")


def build(kind: type, **options: object) -> None:
    """Make an instance past the tests' own check of types, which some modules are loaded with."""
    instance = object.__new__(kind)
    for each in fields(kind):
        object.__setattr__(instance, each.name, options.get(each.name, each.default))
    instance.__post_init__()


def positional(function) -> list[Untouched]:
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(function).parameters.values()
    return [Untouched() for each in parameters if each.kind in kinds and each.default is each.empty]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_keyword_option_of_the_public_functions_is_in_the_table(function):
    keywords = {
        name
        for name, each in inspect.signature(function).parameters.items()
        if each.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert keywords == FUNCTIONS[function].keys()


def test_no_public_function_with_keyword_options_is_left_out():
    functions = {getattr(loraq, name) for name in loraq.__all__}
    with_options = {
        each
        for each in functions
        if not inspect.isclass(each)
        and any(p.kind is p.KEYWORD_ONLY for p in inspect.signature(each).parameters.values())
    }
    assert with_options <= FUNCTIONS.keys()


@pytest.mark.parametrize(
    ("function", "option"),
    [(function, option) for function, options in FUNCTIONS.items() for option in options],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
def test_a_senseless_option_is_refused_before_anything_is_looked_at(function, option):
    taken = []
    for name, value in WRONG.items():
        if name in FUNCTIONS[function][option]:
            continue
        if option in ("max_tokens", "tokens_per_call", "samples", "steps", "memory_bytes") and (
            name in ("-1", "0") and function in (loraq.collect_stats, loraq.collect_pipeline_stats)
        ):
            continue  # refused by their own checks, which name what would be enough
        try:
            function(*positional(function), **{option: value})
        except LoraqError as error:
            assert f"'{option}'" in str(error)  # noqa: PT017
            assert "must be" in str(error)  # noqa: PT017
        except (AssertionError, AttributeError, TypeError, ValueError):
            taken.append(name)
        else:
            taken.append(name)
    assert not taken


@pytest.mark.parametrize("name", [None, -1, 0, math.nan, True, 10**30, ["auto"], "x"])
def test_names_that_are_none_are_refused(name):
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    for refused in (
        lambda: loraq.set_backend(model, name),
        lambda: loraq.get_format(name),
        lambda: loraq.quantize_(model, name, progress=False),
        lambda: Recipe.named(name) if isinstance(name, str) else Recipe.of(name),
        lambda: Recipe(Scheme(name)),
        lambda: Recipe(Scheme("int4"), method=name),
        lambda: Recipe(Scheme("int4"), effort=name),
        lambda: Recipe(Scheme("int4"), allocation=name),
    ):
        with pytest.raises(LoraqError):
            refused()


# --- methods --------------------------------------------------------------------------------------

LARGE, NAN, INF = 10**30, math.nan, math.inf
OPTIONS = [
    ("loraq", "steps", [-1, 1.5, NAN, None, True, "x", LARGE, 10**9]),
    ("loraq", "refine_steps", [-1, 1.5, NAN, None, True, "x", LARGE]),
    ("loraq", "heat", [-1, NAN, INF, -INF, True, "x", LARGE, float("1e400")]),
    ("loraq", "final_step", [-0.1, 2.5, NAN, INF, True, "x", LARGE]),
    ("loraq", "leverage_cap", [-1, NAN, -INF, None, True, "x", LARGE]),
    ("loraq", "pull", [-1, NAN, INF, None, True, "x", LARGE]),
    ("loraq", "decay", [-1, 1.5, NAN, INF, True, "x", LARGE]),
    ("loraq", "activation_aware", [0, 1, None, "yes"]),
    ("loraq", "rotate", [0, 1, None, "yes"]),
    ("loraq", "scale_rule", ["nearest", 1, True, NAN]),
    ("loraq", "importance_damping", [-1, NAN, INF, None, True, "x", LARGE]),
    ("loraq", "feedback_damping", [-1, NAN, INF, None, True, "x", LARGE]),
    ("loraq", "input_prior", [-1, NAN, INF, None, True, "x", LARGE]),
    ("loraq", "refits", [-1, 1.5, NAN, None, True, "x", LARGE]),
    ("gptq", "refits", [-1, 1.5, NAN, None, True, "x", LARGE]),
    ("svdquant", "input_prior", [-1, NAN, INF, None, True, "x", LARGE]),
    ("gptq", "damping", [-1e-9, NAN, INF, None, True, "x", LARGE]),
    ("gptq", "scale_rule", ["nearest", 1]),
    ("gptq", "rounds", [0, -1, 1.5, NAN, None, True, "x", LARGE]),
    ("gptq", "patience", [0, -1, 1.5, NAN, None, True, "x", LARGE]),
    ("gptq", "rotate", [0, 1, None, "yes"]),
    ("gptq", "noise_filter", [0, 1, None, "yes"]),
    ("qera", "rotate", [0, 1, None, "x"]),
    ("lqer", "rotate", [0, 1, None, "x"]),
    ("svdquant", "rotate", [0, 1, None, "x"]),
    ("qera", "exact", [0, 1, None, "x"]),
    ("qera", "damping", [-1e-9, NAN, INF, None, True, "x", LARGE]),
    ("qera", "scale_rule", ["nearest", 1]),
    ("lqer", "scale_rule", ["nearest", 1]),
    ("rtn", "scale_rule", ["nearest", 1]),
    ("svdquant", "rounds", [0, -1, 1.5, NAN, None, True, "x", LARGE]),
    ("svdquant", "patience", [0, -1, 1.5, NAN, None, True, "x", LARGE]),
    ("svdquant", "scale_rule", ["nearest", 1]),
]


def test_every_option_of_every_method_is_in_the_table():
    known = {(method, each.name) for method in METHODS for each in fields(METHODS[method])}
    assert {(method, option) for method, option, _ in OPTIONS} == known


@pytest.mark.parametrize(("method", "option", "values"), OPTIONS)
def test_a_senseless_option_of_a_method_is_refused_when_it_is_built(method, option, values):
    for value in values:
        with pytest.raises(SchemeError, match=rf"Option '{option}' of method '{method}' is .*must"):
            build(METHODS[method], **{option: value})
        with pytest.raises(RecipeError, match=rf"'{option}'"):
            Recipe(Scheme("mxfp4", branch=Branch(8)), method=method, options={option: value})


def test_a_scale_rule_that_a_format_does_not_have_is_refused_by_the_plan():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, device="meta"))
    for main, branch, rule in (("int4", "bf16", "midmax"), ("mxfp4", "int8", "floor")):
        scheme = Scheme(main, branch=Branch(8, branch))
        recipe = Recipe(scheme, method="lqer", options={"scale_rule": rule})
        with pytest.raises(SchemeError, match=rf"Layer '0': .*scale rule .*'{rule}'"):
            loraq.plan_model(model, recipe, progress=False)


@dataclass(frozen=True)
class Third(Method):
    """A method of somebody else, with options of every kind."""

    name = "third"
    summary = "for this test"
    branch = "optional"

    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, float] | None = None
    share: Annotated[float, Range(0, 1)] = 0.5
    count: int = 3

    def _fit(self, weight, scheme, seed, stats):
        raise NotImplementedError


@pytest.fixture
def third():
    register(Third)
    yield Third
    del METHODS["third"]


def test_a_registered_method_gets_the_checks_for_free(third):
    def recipe(**options) -> Recipe:
        return Recipe(Scheme("mxfp4"), method="third", options=options)

    for options in (
        {"kind": "c"},
        {"kind": 1},
        {"sizes": 3},
        {"sizes": [1, "x"]},
        {"sizes": "12"},
        {"pair": [1]},
        {"pair": [1, 2, 3]},
        {"share": 1.5},
        {"share": NAN},
        {"count": LARGE},
    ):
        with pytest.raises(RecipeError, match=next(iter(options))):
            recipe(**options)
        with pytest.raises(SchemeError, match=next(iter(options))):
            third(**options)
    assert recipe(kind="b", sizes=[3, 4], pair=[1, 0.5], share=1).options["kind"] == "b"


def test_tables_of_any_annotation_are_checked_and_raise_no_type_error(third):
    for table in ({"kind": "c"}, {"sizes": [1.5]}, {"pair": "x"}, {"share": None}):
        with pytest.raises(RecipeError):
            check_table(Third, table, "options")
    assert check_table(Third, {"kind": "b", "sizes": [1], "pair": None}, "options")


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**63, LARGE, True, 1.5, NAN, "1", None])
def test_a_seed_is_an_integer_that_is_not_negative(seed):
    with pytest.raises(RecipeError, match="seed"):
        Recipe(Scheme("int4"), seed=seed)
    with pytest.raises(LoraqError, match="seed"):
        Recipe.from_dict({"scheme": {"weight": "int4"}, "seed": seed})


@pytest.mark.parametrize(
    "budget",
    [NAN, INF, -1, 0, "nan", "inf", "-5", "1e400", "r16=0", LARGE, 1e9, None, True, "", []],
)
def test_a_budget_is_a_number_of_bits_that_means_something(budget):
    with pytest.raises(SchemeError, match="budget"):
        Budget.parse(budget)
    with pytest.raises(SchemeError, match="budget"):
        Recipe(Scheme("int4"), budget=budget)


@pytest.mark.parametrize("fields", [{}, {"bits_per_weight": 5.0, "rank_16bit": 3}])
def test_a_budget_is_one_of_two(fields):
    with pytest.raises(SchemeError, match="budget"):
        Budget(**fields)


@pytest.mark.parametrize("bad", [-1, NAN, "5", True, LARGE])
def test_numbers_of_budgets_branches_schemes_and_statistics_are_checked(bad):
    with pytest.raises(SchemeError):
        Budget(bits_per_weight=bad)
    with pytest.raises(SchemeError):
        Budget(rank_16bit=bad)
    with pytest.raises(SchemeError):
        Branch(rank=bad)
    with pytest.raises(SchemeError):
        Scheme("int4", rotation=bad)
    with pytest.raises(CalibrationError):
        build(ActivationStats, tokens=bad, second_moment=torch.ones(4))
    with pytest.raises(RecipeError):
        Rule(match=[bad])
    with pytest.raises(RecipeError):
        Rule(match="*", skip="yes" if bad is True else bad)


def test_a_huge_rank_is_refused_by_the_name_of_the_layer():
    recipe = Recipe(Scheme("int4", branch=Branch(10**15)))
    with pytest.raises(SchemeError, match=r"Layer 'a': Branch rank 1000000000000000 is larger"):
        recipe.scheme_for("a", (64, 64))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("heat = 1e400", "it has the number inf, and only finite numbers are read"),
        ("heat = nan", "it has the number nan, and only finite numbers are read"),
        ("heat = -inf", "it has the number -inf, and only finite numbers are read"),
        ("heat = -1.0", "'heat'"),
        ("steps = -3", "'steps'"),
    ],
)
def test_a_file_with_numbers_that_mean_nothing_is_refused(tmp_path, text, match):
    path = tmp_path / "recipe.toml"
    path.write_text(f'scheme = "mxfp4+w8a8-r8"\n[options]\n{text}\n')
    with pytest.raises(RecipeError, match=match):
        Recipe.read(path)


# --- annotations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "good", "bad", "words"),
    [
        (int, [0, -5], [True, 1.5, "1", None, 2**63], "an integer of at most 64 bits"),
        (float, [0, -1.5], [True, NAN, INF, "1", None, 2**70], "a finite number"),
        (Annotated[int, Range(1, 3)], [1, 3], [0, 4, True, 2.0], "an integer from 1 to 3"),
        (Annotated[float, Range(0)], [0, INF], [-1, NAN, None], "a number of at least 0"),
        (Annotated[float, Range(0, 1)] | None, [None, 1], [2, NAN], "a number from 0 to 1 or None"),
        (bool, [True], [1, 0, None, "x"], "True or False"),
        (str | None, ["x", None], [1, True, b"x"], "a string or None"),
        (Literal["a", 1], ["a", 1], ["b", True, 1.0], "one of 'a', 1"),
        (tuple[int, ...], [(), (1, 2), [3]], ["12", (1, "x"), 1, None], "tuple[int, ...]"),
        (tuple[int, str], [(1, "x")], [(1,), (1, 2), ("x", 1)], "tuple[int, str]"),
    ],
)
def test_what_suits_an_annotation(hint, good, bad, words):
    assert all(suits(value, hint) for value in good)
    assert not any(suits(value, hint) for value in bad)
    assert describe(hint) == words


def test_a_checked_function_is_that_function_and_names_what_is_wrong():
    @checked
    def add(a: int, *, times: Annotated[int, Range(1, 9)] = 1) -> int:
        """Add."""
        return a * times

    assert add(2, times=3) == 6
    assert (add.__name__, add.__doc__) == ("add", "Add.")
    with pytest.raises(LoraqError, match=r"'times' of `add` is 0. It must be an integer from 1"):
        add(2, times=0)
    with pytest.raises(LoraqError, match=r"is an integer of \d+ bits|is 1000000"):
        add(2, times=10**5000)
    with pytest.raises(TypeError):
        add(2, tmes=0)
