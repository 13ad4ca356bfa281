"""Does it pay to share one budget among the layers instead of giving each its own, at the same bytes in all?

A trained transformer (`--world digits` or `patches`) is quantized with the ranks of the uniform
plan, and with ranks shared by marginal gain; the total that is made small counts the squared error
of each layer in one of several ways:

    absolute     ‖W − Ŵ‖², what `allocation = "greedy"` does
    relative     ‖W − Ŵ‖² / ‖W‖²: every layer counts alike
    per weight   the relative one times the number of weights
    measured     times how much velocity error this layer alone causes: needs data and the whole model; a bound for all
                 that could be known of the layers beforehand

Read the ratio of velocity errors to the uniform plan's, seed by seed (each seed has its own images
and noise): its mean and 95 % confidence interval (Student's t). Below 1 the allocation is better.
Budgets are the bytes of 16-bit branches.

    python benchmarks/allocation.py --world digits --fast --seeds 5 --save
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from common import options, report
from loraq.evaluation.metrics import relative_error
from loraq.layers import linear_layers, matrix_of, replace_layer
from loraq.methods.prediction import Prediction
from loraq.nn import QuantizedLinear
from loraq.packed import LayerSolution
from loraq.pipeline.layer import solve_layer
from loraq.pipeline.module import plan_model
from loraq.pipeline.plan import LayerJob, Plan
from loraq.pipeline.sharing import allocated, predicted_layer
from loraq.recipe import Recipe
from loraq.scheme import Scheme
from quality import WORLDS, World

RECIPES = ("mxfp4-a16+w6a8", "mxfp4-a8+w6a8", "mxfp4-a4+w6a8")
#: A seed that no row is measured with.
OTHER_SEED = 100

Solved = dict[tuple[str, Scheme], LayerSolution]


def main() -> None:
    """Print the table and the JSON line."""
    chosen = options(
        __doc__,
        world=("digits", "trained transformer: digits or patches (default: digits)"),
        budgets=(
            (0,),
            "ranks of the 16-bit branches whose bytes are shared (default: the world's, and 0.4 "
            "and 2 of it)",
        ),
        seeds=(
            3,
            "seeds of the solver, each with images and noise of its own (default: 3, at most 8)",
        ),
        fast="effort 'fast' instead of the default",
        bound="also allocate by measured importances",
    )
    world = WORLDS[chosen.world]
    usual = int(world.budget.removeprefix("r16="))
    budgets = (
        [round(usual * share) for share in (0.4, 1, 2)]
        if chosen.budgets[0] == 0
        else chosen.budgets
    )
    trained = world.load(torch.float32)
    exact = [world.probe(trained, seed=seed) for seed in range(chosen.seeds)]
    rows: list[dict[str, object]] = []
    print(
        f"{'recipe':16}{'budget':8}{'allocation':12}{'bits':>7}{'weight error':>14}{'velocity error':>18}{'ratio':>16}"
    )
    for name in RECIPES:
        for budget in budgets:
            asked = replace(
                Recipe.named(name),
                budget=f"r16={budget}",
                effort="fast" if chosen.fast else "default",
            )
            plans = contenders(trained, world, asked, bound=chosen.bound)
            errors = {label: [] for label in plans}
            weights = {label: [] for label in plans}
            for seed, velocity in enumerate(exact):
                solved: Solved = {}
                for label, plan in plans.items():
                    model, weight = quantized(trained, plan, replace(asked, seed=seed), solved)
                    errors[label].append(relative_error(velocity, world.probe(model, seed=seed)))
                    weights[label].append(weight)
            for label, plan in plans.items():
                ratios = [
                    ours / theirs
                    for ours, theirs in zip(errors[label], errors["uniform"], strict=True)
                ]
                print(
                    f"{name:16}{budget!s:8}{label:12}{plan.bits_per_weight:7.3f}{weights[label][0]:14.4f}"
                    f"{interval(errors[label], 4):>18}{interval(ratios, 3):>16}",
                    flush=True,
                )
                row = {
                    "world": chosen.world,
                    "effort": asked.effort,
                    "recipe": name,
                    "rank_16bit": budget,
                }
                row |= {"allocation": label, "nbytes": plan.nbytes, "bits": plan.bits_per_weight}
                rows.append({**row, "weight": weights[label], "velocity": errors[label]})
    report(rows, save=chosen.save)


def contenders(trained: nn.Module, world: World, asked: Recipe, *, bound: bool) -> dict[str, Plan]:
    """Return plans of the same bytes by label."""
    uniform = plan_model(trained, asked)
    layers = linear_layers(trained)
    found = {
        layer.name: predicted_layer(layer, matrix_of(layers[layer.name]), asked)
        for layer in uniform.quantized
    }
    counts: dict[str, Callable[[LayerJob], float]] = {
        "absolute": lambda layer: 1.0,
        "relative": lambda layer: 1 / found[layer.name].energy,
        "per weight": lambda layer: layer.shape[0] * layer.shape[1] / found[layer.name].energy,
    }
    if bound:
        importance = measured(trained, world, uniform, asked)
        counts["measured"] = lambda layer: importance[layer.name]
    plans = {"uniform": uniform}
    for label, count in counts.items():
        counted = {
            layer.name: scaled(found[layer.name], count(layer)) for layer in uniform.quantized
        }
        plans[label] = allocated(uniform, counted)
    return plans


def scaled(prediction: Prediction, factor: float) -> Prediction:
    """Return a prediction that counts so many times."""
    return Prediction(prediction.energy * factor, tuple(factor * left for left in prediction.left))


def measured(trained: nn.Module, world: World, plan: Plan, asked: Recipe) -> dict[str, float]:
    """Return the squared velocity error that each layer alone causes, over its squared weight error."""
    model, found = copy.deepcopy(trained), {}
    layers = linear_layers(model)
    velocity = world.probe(trained, seed=OTHER_SEED)
    for layer in plan.quantized:
        assert layer.scheme is not None
        weight = layers[layer.name].weight
        kept = weight.data
        solution = solve_layer(
            matrix_of(layers[layer.name]), replace(asked, effort="fast"), layer.scheme, layer.name
        )
        weight.data = solution.reconstruct().view_as(kept)
        error = (weight.data - kept).square().sum().item()
        found[layer.name] = (
            relative_error(velocity, world.probe(model, seed=OTHER_SEED)) ** 2 / error
        )
        weight.data = kept
    return found


def quantized(
    trained: nn.Module, plan: Plan, recipe: Recipe, solved: Solved
) -> tuple[nn.Module, float]:
    """Return a model by a plan, and its mean relative weight error; a layer with the same scheme is solved once."""
    model = copy.deepcopy(trained)
    errors = []
    for name, layer in linear_layers(model).items():
        scheme = next(planned.scheme for planned in plan.layers if planned.name == name)
        if scheme is None:
            continue
        if (name, scheme) not in solved:
            solved[name, scheme] = solve_layer(matrix_of(layer), recipe, scheme, name)
        solution = solved[name, scheme]
        bias: Tensor | None = layer.bias
        replace_layer(model, name, QuantizedLinear.from_packed(solution.packed, bias))
        errors.append(solution.relative_error)
    return model, sum(errors) / len(errors)


if __name__ == "__main__":
    main()
