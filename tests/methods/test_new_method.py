"""A new method is one class: recipes, plans, budgets and the
command line learn of it by `register`.

The toy scales the weight before it rounds, which is no good; it touches nothing but this file.
"""

import re
from dataclasses import dataclass

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import loraq
from benchmarks.worlds.matrices import dit_like
from loraq import Recipe, Scheme
from loraq.cli import main
from loraq.errors import LoraqError, RecipeError, SchemeError
from loraq.methods import METHODS, Method, register
from loraq.methods.fits import Fit, quantize_branch
from loraq.safetensors.layout import write_shards
from loraq.scheme import Branch

MAIN = Scheme("mxfp4")
BRANCHED = Scheme("mxfp4", branch=Branch(0, "mxint8"))


@dataclass(frozen=True)
class Toy(Method):
    """Round a shrunken weight beside a branch of zeros."""

    name = "toy"
    summary = "shrinks and rounds"
    branch = "optional"
    efforts = ("fast", "default")

    #: Factor before rounding.
    shrink: float = 0.9

    @classmethod
    def at(cls, effort):
        """Shrink less when there is time."""
        super().at(effort)
        return cls(shrink={"fast": 0.5, "default": 0.9}[effort])

    def _fit(self, weight, scheme, seed, stats):
        main_weight = scheme.weight_format.quantize(self.shrink * weight)
        if scheme.branch is None:
            return Fit(main_weight, is_final=True)
        up, down = (
            torch.zeros(len(weight), scheme.branch.rank),
            torch.zeros(scheme.branch.rank, weight.shape[1]),
        )
        return Fit(main_weight, quantize_branch(up, down, scheme.branch, None), {"toys": 1.0}, True)


@pytest.fixture(autouse=True)
def toy():
    register(Toy)
    yield Toy
    del METHODS["toy"]


def net() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    for layer in model:
        layer.weight.data = dit_like(*layer.weight.shape)
    return model


def test_a_recipe_takes_it_with_its_options_and_efforts():
    recipe = Recipe(BRANCHED, method="toy", effort="fast")
    assert recipe.solver(BRANCHED) == Toy(0.5)
    assert recipe.solver(Scheme("mxfp4")) == Toy(0.5)  # it can do without a branch
    assert Recipe(BRANCHED, method="toy", options={"shrink": 0.7}).solver(BRANCHED) == Toy(0.7)
    with pytest.raises(RecipeError, match=r"option of method 'toy' 'shrnk'.*Did you mean 'shrink'"):
        Recipe(BRANCHED, method="toy", options={"shrnk": 0.7})
    with pytest.raises(RecipeError, match="'shrink' in options is 'x'"):
        Recipe(BRANCHED, method="toy", options={"shrink": "x"})
    with pytest.raises(RecipeError, match=r"Unknown effort 'best'.*Known: default, fast"):
        Recipe(BRANCHED, method="toy", effort="best")


def test_a_weight_and_a_module_are_quantized_by_it():
    weight = dit_like(64, 96)
    solution = loraq.quantize_weight(weight, Scheme("mxfp4"), method="toy")
    assert solution.relative_error > 0.1
    assert solution.seconds > 0
    report = loraq.quantize_(net(), Recipe(BRANCHED, method="toy", budget="r16=4"), progress=False)
    assert [layer.relative_error > 0.1 for layer in report.layers] == [True, True]
    assert report.recipe.method == "toy"


def test_a_budget_is_shared_by_its_prediction():
    recipe = Recipe(BRANCHED, method="toy", budget="r16=4", allocation="greedy")
    plan = loraq.plan_model(net(), recipe, progress=False)
    assert plan.nbytes <= loraq.plan_model(net(), Recipe(BRANCHED, budget="r16=4")).nbytes


def test_statistics_are_refused_for_it_by_name():
    stats = loraq.ActivationStats(1, torch.ones(64))
    with pytest.raises(LoraqError, match="method 'toy' does not use them"):
        loraq.quantize_(net(), Recipe(BRANCHED, method="toy", budget="r16=4"), stats={"0": stats})


def test_the_command_line_lists_runs_and_checks_it(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_shards(net().state_dict(), source, "model")
    run = CliRunner().invoke
    listed = run(main, ["methods"]).output
    assert re.search(r"^toy +optional +ignored +fast, default +shrinks and rounds$", listed, re.M)
    arguments = [str(source), "--method", "toy", "--budget", "r16=4"]
    planned = run(main, ["plan", *arguments])
    assert planned.exit_code == 0, planned.output
    target = str(tmp_path / "out")
    done = run(main, ["quantize", str(source), target, *arguments[1:], "--effort", "fast"])
    assert done.exit_code == 0, done.output
    assert "2 layers quantized" in done.output


def test_a_name_that_is_taken_is_refused():
    @dataclass(frozen=True)
    class Other(Toy):
        """Another method of the same name."""

    with pytest.raises(SchemeError, match="There is a method 'toy' already"):
        register(Other)


def test_a_class_that_recipes_could_not_use_is_not_registered():
    with pytest.raises(SchemeError, match="Nameless has no `name`"):
        register(dataclass(frozen=True)(type("Nameless", (Method,), {})))
    with pytest.raises(SchemeError, match="One of them must be 'default'"):
        register(type("Slow", (Toy,), {"name": "slow", "efforts": ("slow", "slower")}))
    assert "slow" not in METHODS


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme("mxfp4", branch=Branch(2, "mxint8")), "returned no branch, and the scheme has one"),
        (Scheme("mxfp4"), "returned a branch, and the scheme has none"),
    ],
)
def test_a_fit_that_is_not_of_the_scheme_is_refused(scheme, message):
    class Wrong(Toy):
        """Does the opposite of what is asked for."""

        def _fit(self, weight, asked, seed, stats):
            other = Scheme("mxfp4", branch=Branch(2, "mxint8")) if asked.branch is None else MAIN
            return super()._fit(weight, other, seed, stats)

    with pytest.raises(SchemeError, match=message):
        Wrong().solve(dit_like(32, 64), scheme)
