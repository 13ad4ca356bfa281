"""Other ways to share one budget among layers than `allocation = "greedy"`, at the same bytes.

Greedy sharing counts ‖W − Ŵ‖² of every layer alike. Each way here counts it differently before
ranks are shared by the same marginal gain, and gives a recipe with a rule for each layer's rank.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from loraq.evaluation.metrics import relative_error
from loraq.layers import linear_layers, matrix_of
from loraq.methods.prediction import Prediction
from loraq.pipeline.plan import LayerPlan, Plan
from loraq.pipeline.quantize import plan_model, solve_layer
from loraq.pipeline.sharing import allocated, predicted_layer
from loraq.recipe import Recipe, Rule

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
    sized = [layer for layer in uniform.quantized if layer.sized]
    found = {
        layer.name: predicted_layer(layer, matrix_of(layers[layer.name]), recipe) for layer in sized
    }
    if way == "measured":
        factors = measure_importance(model, probe, sized, recipe)
    else:
        factors = {
            layer.name: (layer.shape[0] * layer.shape[1] if way == "per weight" else 1)
            / found[layer.name].energy
            for layer in sized
        }
    counted = {name: scale(prediction, factors[name]) for name, prediction in found.items()}
    return replace(recipe, rules=(*rank_rules(allocated(uniform, counted)), *recipe.rules))


def rank_rules(plan: Plan) -> list[Rule]:
    """Return a rule for the rank of every layer of a plan whose rank a budget settled."""
    rules = []
    for layer in plan.quantized:
        if layer.sized and layer.scheme is not None and layer.scheme.branch is not None:
            branch = {"rank": layer.scheme.branch.rank}
            weight_only = True if layer.scheme.activation == "bf16" else None
            rules.append(Rule(layer.name, branch=branch, weight_only=weight_only))
    return rules


def scale(prediction: Prediction, factor: float) -> Prediction:
    """Return a prediction that counts so many times."""
    return Prediction(prediction.energy * factor, tuple(factor * left for left in prediction.left))


def measure_importance(
    trained: nn.Module, probe: Callable[..., Tensor], layers: list[LayerPlan], recipe: Recipe
) -> dict[str, float]:
    """Return the squared velocity error that each layer alone causes over its squared error."""
    model, found = copy.deepcopy(trained), {}
    velocity = probe(trained, seed=UNUSED_SEED)
    recipe = replace(recipe, effort="fast")
    for layer in layers:
        assert layer.scheme is not None
        linear = linear_layers(model)[layer.name]
        exact = linear.weight.data
        solution = solve_layer(matrix_of(linear), recipe, layer.scheme, layer.name)
        linear.weight.data = solution.reconstruct().view_as(exact)
        error = (linear.weight.data - exact).square().sum().item()
        caused = relative_error(velocity, probe(model, seed=UNUSED_SEED))
        found[layer.name] = caused**2 / error
        linear.weight.data = exact
    return found
