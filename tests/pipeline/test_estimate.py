"""What is said of a run before it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from loraq.methods import LoRaQ
from loraq.pipeline import estimate
from loraq.pipeline.estimate import describe_run, estimate_seconds, run_nbytes, worker_nbytes
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.module import plan_model
from loraq.recipe import Recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def jobs_of(*widths: int, recipe: str | Recipe = "mxfp4-a16") -> list[LayerJob]:
    model = nn.Sequential(*(nn.Linear(width, 256, bias=False) for width in widths))
    return plan_model(model, recipe).quantized


def test_memory_follows_the_largest_layer():
    assert worker_nbytes(jobs_of(256, 512, 128)) == 4 * 4 * 256 * 512
    assert worker_nbytes(jobs_of(256)) == 4 * 4 * 256 * 256


@pytest.mark.parametrize("method", ["loraq", "svdquant", "gptq", "qera", "rtn"])
def test_every_method_has_an_estimate(method):
    name = "mxfp4-a16" if method == "rtn" else "mxfp4-a16+w6a8-r8"
    recipe = Recipe.named(name).adjusted(effort="fast") if method == "loraq" else Recipe.named(name)
    recipe = Recipe(recipe.scheme, method=method, effort=recipe.effort)
    assert estimate_seconds(jobs_of(256, 128, recipe=recipe), CPU) > 0


def test_without_layers_nothing_is_taken_but_the_program():
    assert (estimate_seconds([], CPU), worker_nbytes([])) == (0, 0)
    assert run_nbytes([], [CPU], 2, leads=True) == run_nbytes([], [CPU], 1, leads=False) > 0
    assert run_nbytes([], [CUDA], 2, leads=True) == 0


def test_several_workers_share_the_time_but_not_more_than_there_are_layers(tried):
    jobs = jobs_of(256, 256, 256)
    alone = estimate_seconds(jobs, CPU)
    assert estimate_seconds(jobs, CPU, workers=2) == pytest.approx(alone / 2)
    assert estimate_seconds(jobs, CPU, workers=9) == pytest.approx(alone / 3)


def test_the_memory_that_runs_took_is_the_estimate():
    """Of published models on two workers, as result files have it: 5 % less to 30 % more."""
    pytest.importorskip("diffusers")
    stream = pytest.importorskip("benchmarks.speed.stream")
    from benchmarks.results import read
    from loraq.integrations.diffusers import model_of

    plans = {
        name: plan_model(model_of(config, Path("config.json")), "default").quantized
        for name, config in stream.CONFIGS.items()
    }
    rows = [row for each in read() if each["benchmark"] == "speed.stream" for row in each["rows"]]
    # Runs whose plan was another are not of this program: a layer took up to nine copies then.
    rows = [row for row in rows if row["layers_of_the_model"] == len(plans[row["model"]])]
    assert {row["model"] for row in rows} == {*plans}
    said = {}
    for row in rows:
        leads = row["workers"] > 1
        nbytes = run_nbytes(plans[row["model"]], [CPU], row["workers"], leads=leads)
        said[row["model"], row["effort"]] = nbytes / row["peak_anonymous_bytes"]
    assert {key: ratio for key, ratio in said.items() if not 0.95 < ratio < 1.3} == {}


def test_what_only_the_first_solve_takes_does_not_hide_what_steps_take(monkeypatch):
    recipe = Recipe.named("int4-a16+w6a6-r8").adjusted(effort="default")
    jobs, first = jobs_of(256, recipe=recipe), iter([10.0])
    monkeypatch.setattr(estimate, "_solve", lambda job, _: next(first, 0.0) + steps_of(job))
    assert estimate_seconds(jobs, CPU) == pytest.approx(steps_of(jobs[0]))


@pytest.fixture
def tried(monkeypatch) -> list[tuple[int, int]]:
    """The shapes of all trials; a weight takes a microsecond, and so does each step with it."""
    shapes = []

    def solve(job: LayerJob, device: torch.device) -> float:
        shapes.append(job.shape)
        return 1e-6 * math.prod(job.shape) * (1 + steps_of(job))

    monkeypatch.setattr(estimate, "_solve", solve)
    return shapes


def steps_of(job: LayerJob) -> int:
    return job.method.steps + job.method.refine_steps if isinstance(job.method, LoRaQ) else 0


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_the_estimate_is_the_time_that_all_steps_of_all_layers_take(effort, tried):
    recipe = Recipe.named("int4-a16+w6a6-r8").adjusted(effort=effort)
    jobs = jobs_of(256, 1024, recipe=recipe)
    expected = 1e-6 * 256 * (256 + 1024) * (1 + steps_of(jobs[0]))
    assert estimate_seconds(jobs, CPU) == pytest.approx(expected)
    assert {*tried} == {(256, 1024)}


def test_the_trial_before_a_run_is_short_and_counts_the_same(tried):
    jobs = jobs_of(256, 8192)
    assert estimate_seconds(jobs, CPU, most_side=512) == pytest.approx(1e-6 * 256 * (256 + 8192))
    assert tried == [(256, 512)]
    tall = replace(jobs_of(256, recipe="int4-a16+w6a6-r64")[0], shape=(4096, 4096))
    estimate_seconds([tall], CPU, most_side=64)
    assert {*tried[1:]} == {(256, 256)}  # four times the rank


@pytest.mark.parametrize(
    ("devices", "workers", "leads", "expected"),
    [
        ([CPU], 1, False, "about 3 min, 1.5 GB peak"),
        ([CPU], 2, True, "about 2 min, 2.9 GB peak"),
        ([CPU], 2, False, "about 2 min, 2.9 GB peak"),  # of two ranks each builds the model
        ([CUDA], 1, False, "about 3 min, 1.1 GB peak on each cuda device"),
        ([CUDA, torch.device("cuda", 1)], 3, True, "about 68 s, 2.1 GB peak on each cuda device"),
    ],
)
def test_a_run_is_described_in_a_line(devices, workers, leads, expected, tried):
    job = replace(jobs_of(256)[0], shape=(8192, 8192))
    jobs = [job, job, *[replace(job, shape=(4096, 4096))] * 4]
    assert describe_run(jobs, devices, workers, leads=leads) == expected
    assert max(max(shape) for shape in tried) <= 1024


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, "1 s"), (89, "89 s"), (700, "12 min"), (9000, "2.5 h")]
)
def test_times_are_shown_as_people_say_them(monkeypatch, seconds, shown):
    monkeypatch.setattr(estimate, "_solve", lambda job, device: seconds)
    assert describe_run(jobs_of(256), [CPU], 1, leads=False).startswith(f"about {shown}, ")
