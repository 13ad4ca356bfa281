"""Statistics beside a plan: who uses them, what is refused before any work, the same bytes from
memory and files.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import loraq
from benchmarks.worlds.matrices import heavy_tailed
from loraq.checkpoint.stats_file import save_stats
from loraq.cli import main
from loraq.errors import CalibrationError, CheckpointError, RecipeError
from loraq.recipe import Recipe
from loraq.rules import Rule
from loraq.safetensors.layout import write_shards
from loraq.scheme import Branch, Scheme
from loraq.stats import ActivationStats
from tests.folders import files_of

#: Layer "3" has no branch, so that only GPTQ makes something of its inputs.
RECIPE = Recipe(
    Scheme("mxfp4", branch=Branch(8, "mxint8")),
    method="qera",
    rules=(Rule("3", branch={"rank": 4}),),
)
METHODS = ["loraq", "gptq", "qera"]
LAYERS = ["0", "2", "3", "4"]


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Linear(64, 48),
        nn.LayerNorm(48),
        nn.Linear(48, 96, bias=False),
        nn.Linear(96, 33),
        nn.Linear(33, 16),
    )
    return nn.Sequential(*layers)


def collected(seed: int = 0, **options) -> dict[str, ActivationStats]:
    model = net()
    return dict(
        loraq.collect_stats(model, lambda: model(heavy_tailed(500, 64, seed)), LAYERS, **options)
    )


@pytest.fixture(scope="module")
def stats() -> dict[str, ActivationStats]:
    return collected()


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "source").mkdir()
    write_shards(net().state_dict(), tmp_path / "source", "model")
    return tmp_path / "source"


def by(method: str) -> Recipe:
    return replace(RECIPE, method=method, effort="fast")


def quantize(source: Path, target: Path, recipe: Recipe = RECIPE, **options):
    return loraq.quantize_checkpoint(source, target, recipe, **{"progress": False, **options})


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "source")


@pytest.mark.parametrize("method", METHODS)
def test_reports_say_what_statistics_think_of_the_outputs(method, source, tmp_path, stats):
    report = quantize(source, tmp_path / "out", by(method), stats=stats)
    float_net, x = net(), heavy_tailed(500, 64, 0)  # what the statistics saw
    rounded = loraq.quantize_weight(
        float_net[0].weight, by(method), name="0", stats=stats["0"]
    ).reconstruct()
    exact = x @ float_net[0].weight.detach().mT
    first = report.layers[0]
    assert first.output_error == pytest.approx(
        ((x @ rounded.mT - exact).norm() / exact.norm()).item(), rel=1e-3
    )
    assert report.mean_output_error == pytest.approx(
        sum(layer.output_error for layer in report.layers) / 4
    )
    assert first.record()["output_error"] == first.output_error
    without = quantize(source, tmp_path / "without", by("svdquant"))
    assert without.mean_output_error is None
    assert "output_error" not in without.layers[0].record()


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_memory_and_files_and_both_forms_of_statistics_agree(method, source, tmp_path, stats):
    loraq.save_stats(stats, tmp_path / "stats.safetensors")
    quantize(source, tmp_path / "streamed", by(method), stats=tmp_path / "stats.safetensors")
    model = net()
    loraq.quantize_(model, by(method), stats=stats, workers=2, progress=False)
    loraq.save(model, tmp_path / "saved")
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "saved")
    one = loraq.quantize_weight(net()[0].weight, by(method), name="0", stats=stats["0"])
    assert torch.equal(one.packed.main.packed, model[0].weight_packed)
    quantize(source, tmp_path / "other", by(method), stats=collected(seed=1))
    assert files_of(tmp_path / "other") != files_of(tmp_path / "streamed")


@pytest.mark.slow
def test_processes_agree(source, tmp_path, stats):
    loraq.save_stats(stats, tmp_path / "stats.safetensors")
    for workers in (1, 2):
        quantize(
            source, tmp_path / str(workers), workers=workers, stats=tmp_path / "stats.safetensors"
        )
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_each_layer_that_used_statistics_records_their_hash(source, tmp_path, stats):
    mixed = Recipe(
        Scheme("mxfp4"), method="loraq", effort="fast", rules=(Rule("2", branch={"rank": 4}),)
    )
    report = quantize(source, tmp_path / "out", mixed, stats=stats)
    assert {layer.name: layer.stats_sha256 for layer in report.layers} == {
        **dict.fromkeys(LAYERS, ""),
        "2": stats["2"].sha256,
    }
    loaded = net()
    loraq.load_into(loaded, tmp_path / "out")
    assert loaded[2].record["stats_sha256"] == stats["2"].sha256
    assert "stats_sha256" not in loaded[0].record


def test_an_interrupted_run_goes_on_with_the_same_statistics_only(source, tmp_path, stats):
    quantize(source, tmp_path / "whole", stats=stats)

    def interrupt(*_event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="1 of 4 layers are kept"):
        quantize(source, tmp_path / "out", stats=stats, progress=interrupt)
    with pytest.raises(
        CheckpointError, match=r"other settings\. Changed: statistics \(0: '[0-9a-f]{16}' then"
    ):
        quantize(source, tmp_path / "out", stats=collected(seed=1))
    assert quantize(source, tmp_path / "out", stats=stats).kept == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_statistics_that_change_meanwhile_are_found(source, tmp_path, stats):
    place = tmp_path / "stats.safetensors"
    loraq.save_stats(stats, place)

    def change(*_event: object) -> None:
        loraq.save_stats(collected(seed=1), place)

    with pytest.raises(CalibrationError, match=r"statistics of layer '\d' changed meanwhile"):
        quantize(source, tmp_path / "out", stats=place, progress=change)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (
            by("gptq"),
            None,
            r"Method 'gptq' needs activation statistics, and none are given for 4 layers\. Collect",
        ),
        (by("qera"), None, "Method 'qera' needs activation statistics"),
        (
            by("svdquant"),
            {},
            "No layer uses the statistics: method 'svdquant' does not use them.* gptq, loraq, qera",
        ),
        (by("rtn"), {}, "method 'rtn' does not use them"),
        (
            replace(by("loraq"), scheme=Scheme("mxfp4"), rules=()),
            {},
            "none has a branch.*'loraq' rounds to nearest",
        ),
        (
            by("gptq"),
            {"second_moment": False},
            "Mean squares are not enough: method 'gptq' needs full second moments",
        ),
        (by("qera"), {"second_moment": False}, "Mean squares are not enough: method 'qera'"),
    ],
)
def test_what_cannot_work_is_known_before_any_work(recipe, options, message, source, tmp_path):
    stats = None if options is None else collected(**options)
    model = net()
    with pytest.raises(CalibrationError, match=message):
        loraq.quantize_(model, recipe, stats=stats, progress=pytest.fail)
    with pytest.raises(CalibrationError, match=message):
        quantize(source, tmp_path / "out", recipe, stats=stats, progress=pytest.fail)
    assert type(model[0]) is nn.Linear
    assert left_behind(tmp_path) == []


def test_statistics_of_another_model_are_refused(source, tmp_path, stats):
    fewer = {name: of_layer for name, of_layer in stats.items() if name != "3"}
    with pytest.raises(CalibrationError, match="no statistics of 1 of 4 layers: 3"):
        quantize(source, tmp_path / "out", stats=fewer)
    with pytest.raises(
        CalibrationError, match="Layer '0' has 64 input channels, its statistics have 48"
    ):
        quantize(source, tmp_path / "out", stats=stats | {"0": stats["2"]})
    other = replace(stats["0"], output_sensitivity=torch.ones(7))
    with pytest.raises(CalibrationError, match="its statistics have sensitivities of 7"):
        quantize(source, tmp_path / "out", stats=stats | {"0": other})
    assert left_behind(tmp_path) == []


def test_a_target_that_is_there_is_found_before_the_statistics_are_read(source, tmp_path):
    class Unread(dict):
        def __getitem__(self, _layer: str) -> ActivationStats:
            pytest.fail("statistics were read")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        quantize(source, tmp_path / "out", stats=Unread(dict.fromkeys(LAYERS)))


def test_mean_squares_do_for_those_that_take_them(source, tmp_path):
    squares = collected(second_moment=False)
    for method, options in (("loraq", {}), ("qera", {"exact": False})):
        report = quantize(
            source, tmp_path / method, replace(by(method), options=options), stats=squares
        )
        assert all(layer.stats_sha256 for layer in report.layers)


def test_a_finished_model_can_be_given_statistics_again(stats):
    model = net()
    loraq.quantize_(model, RECIPE, stats=stats, progress=False)
    assert loraq.quantize_(model, RECIPE, stats=stats, progress=False).layers == ()


def test_nothing_to_quantize_is_said_before_what_statistics_are_for(stats):
    with pytest.raises(RecipeError, match="Nothing to quantize"):
        loraq.quantize_(
            net(), replace(RECIPE, rules=(Rule("*", skip=True),)), stats=stats, progress=False
        )


def test_a_rule_that_matches_nothing_is_told_once(stats, caplog):
    with caplog.at_level(logging.WARNING, logger="loraq"):
        recipe = replace(RECIPE, rules=(Rule("no_such_layer", skip=True),))
        loraq.quantize_(net(), recipe, stats=stats, progress=False)
    assert len(caplog.records) == 1


def test_layers_that_are_not_smoothed_are_told(source, stats, tmp_path):
    """In the second group of calls of one layer, other channels are large than on average."""
    profile = torch.logspace(-2, 2, 64)
    moving = ActivationStats(
        500, torch.diag(profile), call_mean_squares=torch.stack([profile, profile.flip(0)])
    )
    given = {**stats, "0": moving}
    save_stats(given, tmp_path / "stats.safetensors")
    options = ["--recipe", "int4-a4-s-h0", "--method", "rtn", "--stats"]
    command = ["quantize", str(source), str(tmp_path / "out"), *options]
    for _ in range(2):  # the second finds it complete
        result = CliRunner().invoke(main, [*command, str(tmp_path / "stats.safetensors")])
        assert result.exit_code == 0, result.stderr
        assert "1 of them are not smoothed: a call of the samples would be worse" in result.stdout
    records = json.loads((tmp_path / "out" / "loraq.json").read_text())["layers"]
    assert {name for name, of_layer in records.items() if of_layer.get("unsmoothed")} == {"0"}
    model = net()
    recipe = replace(Recipe.named("int4-a4-s-h0"), method="rtn")
    report = loraq.quantize_(model, recipe, stats=given, progress=False)
    assert [layer.unsmoothed for layer in report.layers] == [True, False, False, False]
