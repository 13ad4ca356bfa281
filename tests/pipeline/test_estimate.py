"""What is said of a run before it."""

import time

import pytest
import torch
from torch import nn

from loraq.pipeline.estimate import estimate_seconds, worker_nbytes
from loraq.pipeline.module import plan_model, quantize_
from loraq.recipe import Recipe

CPU = torch.device("cpu")


def model_of(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, 256, bias=False) for width in widths))


def test_memory_follows_the_largest_layer():
    plan = plan_model(model_of(256, 512, 128), "mxfp4-a16")
    assert worker_nbytes(plan) == 5 * 4 * 256 * 512
    assert worker_nbytes(plan_model(model_of(256), "mxfp4-a16")) == 5 * 4 * 256 * 256


@pytest.mark.parametrize("method", ["loraq", "svdquant", "gptq", "qera", "rtn"])
def test_every_method_has_an_estimate(method):
    name = "mxfp4-a16" if method == "rtn" else "mxfp4-a16+w6a8-r8"
    recipe = Recipe.named(name).adjusted(effort="fast") if method == "loraq" else Recipe.named(name)
    recipe = Recipe(recipe.scheme, method=method, effort=recipe.effort)
    plan = plan_model(model_of(256, 128), recipe)
    assert estimate_seconds(plan, CPU) > 0


def test_without_layers_nothing_is_taken():
    plan = plan_model(nn.Sequential(nn.LayerNorm(4)), "mxfp4-a16")
    assert (estimate_seconds(plan, CPU), worker_nbytes(plan)) == (0, 0)


@pytest.mark.slow
def test_the_estimate_is_near_the_time_that_it_takes():
    model = model_of(1024, 1024, 1024)
    recipe = Recipe.named("int4-a16+w6a6").adjusted(effort="fast")
    expected = estimate_seconds(plan_model(model, recipe), CPU)
    begin = time.perf_counter()
    quantize_(model, recipe, progress=False)
    assert 0.3 < expected / (time.perf_counter() - begin) < 3
