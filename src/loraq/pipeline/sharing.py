"""One budget for all layers: ranks go where they lower the summed squared error most.

The layers whose rank a budget settles share the bytes that they would take one by one. One pass
over their weights predicts what each rank would leave of ‖W − Ŵ‖²; nothing is solved, and no data
is needed: statistics that are given are not looked at here. The sum of these squares is the squared
error at the layers' outputs if all inputs have uncorrelated channels of one power.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from loraq.errors import LoraqError, RecipeError, layer_failure
from loraq.methods.prediction import Prediction
from loraq.pipeline.allocation import Choice, allocate
from loraq.pipeline.arithmetic import fixed_arithmetic
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.layer import matrices_of, prepare_layer, read_matrices
from loraq.pipeline.plan import Plan
from loraq.pipeline.progress import ProgressCallback, progress_bar
from loraq.pipeline.ranks import Ranks
from loraq.pipeline.tickets import Data, Place
from loraq.recipe import Recipe
from loraq.safetensors.reader import TensorReader
from loraq.scheme import Branch, Scheme

#: No layer gets more than this many times the rank that it would have alone: predictions were tried
#: up to there.
_MOST = 8

#: Predicts many layers, in whatever order and in as many threads or processes as it likes.
PredictAll = Callable[[Sequence[LayerJob]], Iterable[tuple[str, Prediction]]]


def share_budget(
    plan: Plan, recipe: Recipe, predict_all: PredictAll, progress: ProgressCallback | bool
) -> Plan:
    """Return the plan that a recipe's allocation makes of the weights; it stores no more.

    Args:
        plan: each layer with its own budget; returned as it is for allocation "uniform".
        recipe: how the budget is shared.
        predict_all: yields name and prediction of each layer, by `predict_layer`.
        progress: True shows a display on stderr; a function is not called here.

    Raises:
        LayerError: a weight cannot be used; the message names the layer.
        RecipeError: the recipe asks for sharing, and no layer's rank is open.
    """
    if recipe.allocation == "uniform":
        return plan
    jobs = [job for job in plan.quantized if job.sized]
    if not jobs:
        raise RecipeError(
            f"Allocation '{recipe.allocation}' shares bytes among layers whose rank a budget "
            "settles, and there are none: all ranks are fixed, or no layer has a branch. Leave the "
            "rank out of the recipe, or do not allocate."
        )
    predictions: dict[str, Prediction] = {}
    ranks = {job.name: _branch(job).rank for job in jobs}
    with progress_bar("allocate") if progress is True else nullcontext(lambda *_: None) as show:
        for name, prediction in predict_all(jobs):
            predictions[name] = prediction
            # What is shown is the error predicted for the layer's own budget.
            show(len(predictions), len(jobs), name, prediction.relative_error(ranks[name]))
    return spend_budget(plan, predictions)


def spend_budget(plan: Plan, predictions: dict[str, Prediction]) -> Plan:
    """Return the plan in which the layers that have a prediction share the bytes they take now."""
    jobs = [job for job in plan.quantized if job.name in predictions]
    choices = allocate(
        [_choices(job, predictions[job.name]) for job in jobs], sum(job.nbytes for job in jobs)
    )
    settled = {
        job.name: replace(job, scheme=_with_rank(job, choice.rank))
        for job, choice in zip(jobs, choices, strict=True)
    }
    return replace(plan, layers=tuple(settled.get(layer.name, layer) for layer in plan.layers))


def predict_layer(job: LayerJob, weight: Tensor | Iterable[Tensor]) -> tuple[str, Prediction]:
    """Return a layer's name, and what each rank would leave of it: the same whoever runs it.

    Raises:
        LayerError: the weight cannot be used; the message names the layer.
    """
    most = min(_MOST * _branch(job).rank, *job.matrix)
    predictions = []
    for part, matrix, _ in matrices_of(job, weight):
        try:
            # What a rank is worth does not depend on the statistics that smoothing needs.
            plain = replace(part, scheme=replace(part.scheme, smoothing=False))
            prepared = prepare_layer(plain, matrix)
            del matrix, _  # what was read for this layer alone is freed
            with torch.no_grad(), fixed_arithmetic(prepared.weight.device):
                predictions.append(job.method.predict(prepared, job.scheme, most))
        except LoraqError as error:
            raise layer_failure(part.name, error) from error
    return job.name, Prediction.sum(predictions)


@dataclass(frozen=True)
class _PredictFromFile:
    """`predict_layer` for worker processes: it reads the weight by itself."""

    reader: TensorReader

    jobs: Mapping[str, LayerJob]

    def open(self, _: Place) -> Callable[[Data], Data]:
        """Return what predicts a layer by its name."""
        return self._predict

    def _predict(self, data: Data) -> Data:
        job = self.jobs[data["name"]]
        _, prediction = predict_layer(job, read_matrices(self.reader, job))
        return {"name": job.name, **asdict(prediction)}


def predict_from_file(
    reader: TensorReader, jobs: Sequence[LayerJob], ranks: Ranks
) -> Iterator[tuple[str, Prediction]]:
    """Yield name and prediction of each layer, whichever rank made it."""
    work = _PredictFromFile(reader, {job.name: job for job in jobs})
    with closing(ranks.run(work, [{"name": job.name} for job in jobs])) as found:
        for each in found:
            yield each["name"], Prediction(each["energy"], tuple(each["left"]))


def _choices(job: LayerJob, prediction: Prediction) -> list[Choice]:
    """Return one choice for each rank from 1 on."""
    left = prediction.left[1:]
    sizes = _sizes(_branch(job), job.matrix, len(left))
    main, n_matrices = job.scheme.weight_format.nbytes(job.matrix), math.prod(job.shape[:-2])
    return [
        Choice(n_matrices * (main + size), loss, rank)
        for rank, (size, loss) in enumerate(zip(sizes, left, strict=True), start=1)
    ]


@lru_cache(maxsize=1024)  # a model has few shapes and many layers
def _sizes(branch: Branch, shape: tuple[int, int], most: int) -> tuple[int, ...]:
    """Return the bytes of both factors for ranks 1 to `most`."""
    return tuple(replace(branch, rank=rank).nbytes(shape) for rank in range(1, most + 1))


def _with_rank(job: LayerJob, rank: int) -> Scheme:
    return replace(job.scheme, branch=replace(_branch(job), rank=rank))


def _branch(job: LayerJob) -> Branch:
    assert job.scheme.branch is not None, "only the rank of a branch is settled by a budget"
    return job.scheme.branch
