"""One budget for all layers: ranks go where they lower the summed squared error of the weights most.

The layers whose rank a budget settles share the bytes that they would take one by one. One pass
over their weights predicts what each rank would leave of ‖W − Ŵ‖²; nothing is solved, and no data
is needed: statistics that are given are not looked at here. The sum of these squares is the squared
error at the layers' outputs if all inputs have uncorrelated channels of one power.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from loraq.allocation import Choice, allocate
from loraq.checkpoint.reader import TensorReader
from loraq.errors import LayerError, LoraqError, RecipeError
from loraq.methods.prediction import Prediction, predicted
from loraq.pipeline.plan import LayerPlan, Plan
from loraq.pipeline.progress import ProgressCallback, progress_bar
from loraq.pipeline.workers import one_thread, run_jobs
from loraq.recipe import Recipe
from loraq.scheme import Branch, Scheme

#: No layer gets more than this many times the rank that it would have alone: predictions were tried
#: up to there.
_MOST = 8


def sharing_layers(plan: Plan, recipe: Recipe) -> tuple[LayerPlan, ...]:
    """Return the layers that share a budget: none if the recipe leaves each its own.

    Raises:
        RecipeError: the recipe asks for sharing, and no layer's rank is open.
    """
    if recipe.allocation == "uniform":
        return ()
    layers = tuple(layer for layer in plan.quantized if layer.sized)
    if not layers:
        raise RecipeError(
            f"Allocation '{recipe.allocation}' shares bytes among layers whose rank a budget "
            f"settles, and there are "
            "none: all ranks are fixed, or no layer has a branch. Leave the rank out of the "
            "recipe, or do not allocate."
        )
    return layers


def predicted_layer(layer: LayerPlan, weight: Tensor, recipe: Recipe) -> Prediction:
    """Return what each rank would leave of a layer: pure, and the same whoever runs it.

    Raises:
        LayerError: the weight cannot be used; the message names the layer.
    """
    assert layer.scheme is not None
    most = min(_MOST * _branch(layer.scheme).rank, *layer.shape)
    try:
        with torch.no_grad(), one_thread():
            return predicted(weight, layer.scheme, recipe.method, most)
    except LoraqError as error:
        raise LayerError(f"Layer '{layer.name}': {error}") from error


def allocated(plan: Plan, predictions: dict[str, Prediction]) -> Plan:
    """Return the plan with the bytes of the layers that have a prediction shared among them; it stores no more."""
    layers = [layer for layer in plan.layers if layer.name in predictions]
    choices = allocate(
        [_choices(layer, predictions[layer.name]) for layer in layers],
        sum(layer.nbytes for layer in layers),
    )
    settled = {
        layer.name: replace(layer, scheme=_ranked(layer, choice.rank))
        for layer, choice in zip(layers, choices, strict=True)
    }
    return replace(plan, layers=tuple(settled.get(layer.name, layer) for layer in plan.layers))


@dataclass(frozen=True)
class _FromFile:
    """`predicted_layer` for worker processes: it reads the weight by itself."""

    reader: TensorReader
    recipe: Recipe

    def __call__(self, layer: LayerPlan) -> tuple[str, Prediction]:
        """Return the layer's name and its prediction."""
        weight = self.reader.read(f"{layer.name}.weight").view(layer.shape)
        return layer.name, predicted_layer(layer, weight, self.recipe)


def allocated_from_files(
    plan: Plan,
    recipe: Recipe,
    reader: TensorReader,
    *,
    workers: int,
    progress: ProgressCallback | bool,
) -> Plan:
    """Return the plan that a recipe's allocation makes of a checkpoint's weights, one in memory for each worker.

    Raises:
        CheckpointError: a weight cannot be read.
        LayerError, RecipeError: as `predicted_layer` and `sharing_layers`.
    """
    if not (sharing := sharing_layers(plan, recipe)):
        return plan
    return allocated(
        plan, collected(run_jobs(_FromFile(reader, recipe), sharing, workers), sharing, progress)
    )


def collected(
    predictions: Iterable[tuple[str, Prediction]],
    layers: Sequence[LayerPlan],
    progress: ProgressCallback | bool,
) -> dict[str, Prediction]:
    """Return predictions by name as they are made, on show unless `progress` is False or somebody's function.

    The error that is shown is the one predicted for the layer's own budget.
    """
    found: dict[str, Prediction] = {}
    ranks = {layer.name: _branch(layer.scheme).rank for layer in layers}
    with progress_bar("allocate") if progress is True else nullcontext(lambda *_: None) as show:
        for name, prediction in predictions:
            found[name] = prediction
            show(len(found), len(layers), name, prediction.relative_error(ranks[name]))
    return found


def _choices(layer: LayerPlan, prediction: Prediction) -> list[Choice]:
    """Return one choice for each rank from 1 on."""
    assert layer.scheme is not None
    left = prediction.left[1:]
    sizes = _sizes(_branch(layer.scheme), layer.shape, len(left))
    main = layer.scheme.weight_format.nbytes(layer.shape)
    return [
        Choice(main + size, loss, i + 1)
        for i, (size, loss) in enumerate(zip(sizes, left, strict=True))
    ]


@lru_cache(maxsize=1024)  # a model has few shapes and many layers
def _sizes(branch: Branch, shape: tuple[int, int], most: int) -> tuple[int, ...]:
    """Return the bytes of both factors for ranks 1 to `most`."""
    return tuple(replace(branch, rank=rank).nbytes(shape) for rank in range(1, most + 1))


def _ranked(layer: LayerPlan, rank: int) -> Scheme:
    assert layer.scheme is not None
    return replace(layer.scheme, branch=replace(_branch(layer.scheme), rank=rank))


def _branch(scheme: Scheme | None) -> Branch:
    assert scheme is not None
    assert scheme.branch is not None
    return scheme.branch
