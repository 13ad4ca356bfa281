"""Other ways to share one budget among layers than `allocation = "greedy"`, at the same bytes.

Greedy sharing counts ‖W − Ŵ‖² of every layer alike. Each way here counts it differently before
ranks are shared by the same marginal gain, and gives a recipe with a rule for each layer's rank.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from loraq.evaluation.metrics import relative_error
from loraq.layers import linear_layers, matrix_of
from loraq.methods.prediction import Prediction
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.layer import solve_layer
from loraq.pipeline.module import plan_model
from loraq.pipeline.plan import Plan
from loraq.pipeline.sharing import predict_layer, spend_budget
from loraq.recipe import Recipe
from loraq.rules import Rule

#: A seed that no row is measured with.
UNUSED_SEED = 100
#: relative: ‖W − Ŵ‖² / ‖W‖², every layer counts alike. per weight: that times the number of
#: weights. measured: times how much velocity error this layer alone causes, which needs data and
#: the whole model: a bound for all that could be known of the layers beforehand.
WAYS = ("relative", "per weight", "measured")


def share_otherwise(
    model: nn.Module, recipe: Recipe, *, way: str, probe: Callable[..., Tensor]
) -> Recipe:
    """Return the recipe with ranks that one of `WAYS` shares.

    Args:
        model: the float model.
        recipe: with one budget for every layer.
        way: how a layer's squared error counts.
        probe: velocities of a model, by its seed.
    """
    uniform, layers = plan_model(model, recipe), linear_layers(model)
    sized = [job for job in uniform.quantized if job.sized]
    found = dict(predict_layer(job, matrix_of(layers[job.name])) for job in sized)
    if way == "measured":
        factors = measure_importance(model, probe, sized)
    else:
        factors = {
            job.name: (math.prod(job.shape) if way == "per weight" else 1) / found[job.name].energy
            for job in sized
        }
    counted = {name: scale(prediction, factors[name]) for name, prediction in found.items()}
    return replace(recipe, rules=(*rank_rules(spend_budget(uniform, counted)), *recipe.rules))


def rank_rules(plan: Plan) -> list[Rule]:
    """Return a rule for the rank of every layer of a plan whose rank a budget settled."""
    rules = []
    for job in plan.quantized:
        if job.sized and job.scheme.branch is not None:
            branch = {"rank": job.scheme.branch.rank}
            weight_only = True if job.scheme.activation == "bf16" else None
            rules.append(Rule(job.name, branch=branch, weight_only=weight_only))
    return rules


def scale(prediction: Prediction, factor: float) -> Prediction:
    """Return a prediction that counts so many times."""
    return Prediction(prediction.energy * factor, tuple(factor * left for left in prediction.left))


def measure_importance(
    trained: nn.Module, probe: Callable[..., Tensor], jobs: list[LayerJob]
) -> dict[str, float]:
    """Return the squared velocity error that each layer alone causes over its squared error."""
    model, found = copy.deepcopy(trained), {}
    velocity = probe(trained, seed=UNUSED_SEED)
    layers = linear_layers(model)
    for job in jobs:
        linear = layers[job.name]
        exact = linear.weight.data
        solution = solve_layer(job, matrix_of(linear))
        linear.weight.data = solution.reconstruct().view_as(exact)
        error = (linear.weight.data - exact).square().sum().item()
        caused = relative_error(velocity, probe(model, seed=UNUSED_SEED))
        found[job.name] = caused**2 / error
        linear.weight.data = exact
    return found
