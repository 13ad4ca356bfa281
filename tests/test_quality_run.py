"""A run of the quality benchmark goes on where it stopped, and smoothing changes no float model."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("benchmarks")
pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from benchmarks.quality import ledger, run
from benchmarks.quality.field import OWN_SMOOTHING
from benchmarks.quality.smoothing import divide_inputs, smooth
from benchmarks.quality.tables import COMPARISONS, all_tables
from benchmarks.worlds.matrices import gaussian, outlier_columns
from benchmarks.worlds.world import WORLDS
from loraq.evaluation.contender import simulate
from loraq.pipeline.module import quantize_
from loraq.recipe import Recipe
from loraq.scheme import Scheme
from loraq.stats import ActivationStats

TITLE = "W4A4, from weights alone"


def test_a_row_that_is_known_is_not_measured_again_unless_its_bytes_change(tmp_path):
    rows = COMPARISONS[TITLE].entrants
    index = next(i for i, row in enumerate(rows) if row.label == "round to nearest")
    known = ledger.fingerprint(rows[index], WORLDS["digits"].budget, "fast")
    job = run.Job("digits", TITLE, index, 0, "fast", pictures=False, known=known)
    assert run.measure(job, tmp_path) is None
    with pytest.raises(FileNotFoundError):  # it would look at the float model's velocities
        run.measure(replace(job, known="another"), tmp_path)
    with pytest.raises(FileNotFoundError):
        run.measure(replace(job, index=index + 1), tmp_path)


@pytest.mark.parametrize("world", WORLDS)
def test_every_row_fits_the_matrix_that_tells_its_method_apart(world):
    """One did not, and a run of hours ended with it."""
    shape = ledger.fixed_matrix()[0].shape
    for rows in all_tables(world).values():
        for row in rows:
            recipe = row.to_recipe(budget=WORLDS[world].budget, effort="fast")
            assert recipe.scheme_for("", tuple(shape)) is not None


def smoothed(way):
    """A layer whose inputs have outlier channels; smoothed, and its factors."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48)), outlier_columns(300, 64)
    stats = {"0": ActivationStats(300, x.mT @ x / 300)}
    exact = model(x).detach()
    scheme = {"0": Scheme("int4", "int4")}
    factors, moved = smooth(model, way, scheme, stats, {"0": x})
    return model, x, exact, factors["0"], moved["0"]


@pytest.mark.parametrize("way", ["0.5", "grid"])
def test_smoothing_moves_size_from_inputs_to_weights_and_changes_nothing_else(way):
    model, x, exact, factor, moved = smoothed(way)
    assert factor.log().mean().abs() < 1e-4
    assert factor[::16].mean() > 2 * factor[1::16].mean()
    torch.testing.assert_close(model(x / factor), exact, rtol=1e-3, atol=1e-3)
    seen = x / factor
    torch.testing.assert_close(moved.second_moment, seen.mT @ seen / 300, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("moves", [False, True])
def test_a_gated_way_smooths_unless_a_call_is_worse_by_it(moves):
    model, x = nn.Sequential(nn.Linear(64, 48)), outlier_columns(300, 64)
    first = x.square().mean(0)
    calls = torch.stack([first, first.roll(1) if moves else 0.9 * first])
    stats = {"0": ActivationStats(300, x.mT @ x / 300, call_mean_squares=calls)}
    scheme = {"0": Scheme("int4", "int4")}
    factors, moved = smooth(model, OWN_SMOOTHING, scheme, stats, {})
    assert bool((factors["0"] == 1).all()) is moves
    assert moved["0"].call_mean_squares is None


def test_smoothed_layers_divide_their_inputs_and_lose_less():
    errors = []
    for way in ("", "0.5"):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(64, 48)), outlier_columns(300, 64)
        exact, factors = model(x).detach(), {"0": torch.ones(64)}
        if way:
            model, x, exact, factor, _ = smoothed(way)
            factors = {"0": factor}
        quantize_(model, Recipe.of(Scheme("int8", "int4")), progress=False)
        simulate(model)
        divide_inputs(model, factors)
        errors.append(((model(x) - exact).norm() / exact.norm()).item())
    assert errors[1] < errors[0]


def test_tokens_are_kept_from_many_calls():
    model = nn.Sequential(nn.Linear(8, 8))
    keeping = run.keep_tokens(model, ["0"], every_call=4)
    found = next(keeping)
    for seed in range(3):
        model(gaussian(100, 8, seed))
    next(keeping, None)
    model(gaussian(100, 8, 9))
    assert torch.equal(found["0"], torch.cat([gaussian(100, 8, s)[:100:25] for s in range(3)]))


def test_a_row_that_fails_is_named_and_loses_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(run, "look_at", lambda *_: None)
    monkeypatch.setattr(run, "measure", measure_but_for_the_second)
    kept = ("date", "commit", "changed", "torch", "cpu_count")
    monkeypatch.setattr(run, "environment", lambda: dict.fromkeys(kept, ""))
    added = []
    monkeypatch.setattr(run.ledger, "add", added.append)
    jobs = [run.Job("digits", TITLE, index, 0, "fast", pictures=False) for index in range(3)]
    with pytest.raises(SystemExit, match="1 rows failed"):
        run.run("digits", jobs, 1)
    assert [line["index"] for line in added] == [0, 2]
    assert "FAILED: RuntimeError('no')" in capsys.readouterr().out


def measure_but_for_the_second(job, place):
    if job.index == 1:
        raise RuntimeError("no")
    return {"index": job.index, "velocity_error": 0.5}
