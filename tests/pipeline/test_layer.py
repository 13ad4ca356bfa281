"""The job of one layer: what it holds while it works."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraq.pipeline import layer, sharing
from loraq.pipeline.jobs import LayerJob
from loraq.recipe import Recipe

SHAPE = (64, 96)


def job_of(name: str, shape: tuple[int, ...] = SHAPE) -> LayerJob:
    recipe = Recipe.named(name).adjusted(effort="fast")
    matrix = shape[-2], shape[-1]
    scheme = recipe.scheme_for("layer", matrix)
    return LayerJob.of("layer", shape, scheme, recipe)


class Source:
    """Matrices as they are read from a file, which nobody else has."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        self.n, self.dtype, self.alive = n, dtype, []

    def read(self) -> Iterator[Tensor]:
        for _ in range(self.n):
            yield self.make()

    def make(self) -> Tensor:
        matrix = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(self.dtype)
        self.alive.append(weakref.ref(matrix))
        return matrix

    def count(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.alive)


@pytest.mark.parametrize("name", ["int4-a16+w6a6-r8", "int4-a4+w6a8-r8-h32"])
@pytest.mark.parametrize("shape", [SHAPE, (2, *SHAPE)])
def test_a_weight_that_was_read_is_gone_before_its_layer_is_solved(monkeypatch, name, shape):
    source, seen = Source(2 if len(shape) == 3 else 1, torch.bfloat16), []
    solve = layer.solve_layer

    def watch(job: LayerJob, *arguments: object) -> object:
        seen.append(source.count())
        return solve(job, *arguments)

    monkeypatch.setattr(layer, "solve_layer", watch)
    layer.quantize_layer(job_of(name, shape), source.read())
    assert seen == [0] * source.n


def test_nor_does_a_prediction_hold_it(monkeypatch):
    source, seen, job = Source(1, torch.bfloat16), [], job_of("int4-a16+w6a6-r8")
    predict = type(job.method).predict

    def watch(*arguments: object) -> object:
        seen.append(source.count())
        return predict(*arguments)

    monkeypatch.setattr(type(job.method), "predict", watch)
    sharing.predict_layer(job, source.read())
    assert seen == [0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        *("default", "int4-a16+w6a6", "mxfp4-a8+w6a8", "mxfp4-a16"),
        *("int4-a4+w4a8-h32", "nvfp4-a4+w4a8"),  # whose ranks are the highest of a budget
    ],
)
def test_a_worker_holds_no_more_than_four_copies_of_a_weight(recipe):
    if not (Path(__file__).parents[2] / "benchmarks").is_dir():
        pytest.skip("benchmarks are only in a clone of the repository")
    from benchmarks.speed.memory import BAR, copies_of

    assert copies_of(recipe) <= BAR == 4.0
