"""Every method solves where its weight is, and LoRaQ's loop never waits for the device.

There need be no GPU: tensors are fake ones on a fake CUDA device, where an operator raises for
tensors of two devices.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from loraq.formats import get_format
from loraq.methods import METHODS, LoRaQ, SVDQuant
from loraq.methods.base import Method
from loraq.methods.fits import Prepared
from loraq.methods.noise import ActivationNoise
from loraq.pipeline import layer
from loraq.pipeline.collect import collect_stats
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.ranks import Place
from loraq.pipeline.worker import LayerWork
from loraq.recipe import Recipe
from loraq.recipe_names import parse_scheme
from loraq.scheme import Branch, Scheme
from loraq.stats import ActivationStats
from tests.fake_cuda import CUDA, fake_cuda

SHAPE = (32, 64)
BRANCH = Branch(4, "mxfp6_e2m3", "mxint8", "int8")
SCHEMES = {
    "mxfp4": Scheme("mxfp4", "mxint8", BRANCH),
    "int4, rotated": Scheme("int4", "int4", BRANCH, 32),
    "nvfp4": Scheme("nvfp4", "nvfp4", Branch(4, "nvfp4", "bf16")),
    "int8 rows": Scheme("int8", "int8", Branch(4, "int8", "int8")),
    "mxint5": Scheme("mxint6", "bf16", Branch(4, "bf16")),
    "int4, smoothed": Scheme("int4", "mxint8", BRANCH, smoothing=True),
    "int4, smoothed by calls": Scheme("int4", "int4", BRANCH, 32, smoothing=True),
    "fp8": Scheme("fp8_e4m3", "fp8_e4m3", Branch(4, "fp8_e4m3", "fp8_e4m3")),
}


def solve_on_fake_device(method: Method, scheme: Scheme) -> int:
    """Solve a weight, and return how many numbers the host has read."""
    if scheme.branch is not None:  # made of real numbers, and kept
        ActivationNoise.of(scheme, scheme.branch)
    with fake_cuda() as reads:
        weight = torch.empty(SHAPE, dtype=torch.bfloat16, device=CUDA)
        stats = None
        if scheme.smoothing or method.use_of_stats != "ignored":
            size = (SHAPE[1], SHAPE[1]) if method.needs_full_moment else (SHAPE[1],)
            calls = torch.empty(16, SHAPE[1], device="cpu")
            stats = ActivationStats(64, torch.empty(size, device="cpu"), call_mean_squares=calls)
        with torch.no_grad():
            solution = method.solve(weight, scheme, stats=stats)
        assert {tensor.device for tensor in solution.packed.tensors.values()} == {CUDA}
        assert solution.reconstruct().device == CUDA
        return reads.count


@pytest.mark.slow  # fake tensors take long
@pytest.mark.parametrize("name", METHODS)
def test_a_method_stays_on_the_device_of_its_weight(name):
    method = METHODS[name]() if name != "loraq" else LoRaQ(steps=2, refine_steps=2)
    # Each with three of the formats and smoothed, LoRaQ with all; rounding alone is below.
    smoothed = [scheme for scheme in SCHEMES.values() if scheme.smoothing]
    few = [*list(SCHEMES.values())[:3], *smoothed]
    schemes = SCHEMES.values() if name == "loraq" else few
    for scheme in schemes:
        if method.branch == "none":
            scheme = replace(scheme, branch=None)
        solve_on_fake_device(method, scheme)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mxfp4", "int4, rotated", "nvfp4"])
@pytest.mark.parametrize(
    "method",
    [LoRaQ(steps=2, refine_steps=2, input_prior=1.0), SVDQuant(input_prior=1.0)],
    ids=["loraq", "svdquant"],
)
def test_expected_second_moments_stay_on_the_device_too(method, name):
    solve_on_fake_device(method, SCHEMES[name])


@pytest.mark.slow
def test_all_second_moments_stay_on_the_device_too():
    class Full(LoRaQ):
        needs_full_moment = True

    for name in ("int4, rotated", "int8 rows"):
        solve_on_fake_device(Full(steps=2, refine_steps=2), SCHEMES[name])


def test_the_loop_reads_nothing_of_the_device():
    few, many = (
        solve_on_fake_device(
            LoRaQ(steps=steps, refine_steps=steps, scale_rule=None), SCHEMES["mxfp4"]
        )
        for steps in (1, 4)
    )
    assert few == many


def test_a_read_is_counted_and_a_mixed_device_refused():
    with fake_cuda() as reads:
        there = torch.ones(3, device=CUDA)
        assert there.sum().item() == 1.0
        assert not (there > 0).any()
        assert (there > 0).all()
        assert reads.count == 3
        with pytest.raises(RuntimeError, match="device"):
            there + torch.ones(3, device="cpu")


def test_a_prediction_is_made_on_the_device():
    scheme = parse_scheme("mxfp4+w6a8-r8")
    with fake_cuda():
        weight = torch.empty(SHAPE, device=CUDA)
        prediction = LoRaQ().predict(weight, scheme, 16)
    assert len(prediction.left) == 17


def test_every_format_is_read_and_written_on_the_device():
    for name in ("mxfp4", "int4", "nvfp4", "int5", "mxfp6_e3m2", "int8", "fp8_e4m3", "bf16"):
        with fake_cuda():
            x = torch.empty(SHAPE, device=CUDA)
            fmt = get_format(name)
            assert fmt.quantize(x).dequantize().device == fmt.round(x).device == CUDA


def test_a_layer_is_solved_on_the_device_and_comes_back(monkeypatch):
    recipe = Recipe(parse_scheme("mxfp4-a16"), method="rtn")
    job = LayerJob.of("proj", SHAPE, recipe.scheme_for("proj", SHAPE), recipe)
    solved = []

    def watch(job: LayerJob, weight: Prepared, stats: ActivationStats | None) -> object:
        solved.append(weight.weight.device)
        return job.method.solve(weight, job.scheme, seed=job.seed, stats=stats)

    monkeypatch.setattr(layer, "solve_layer", watch)
    monkeypatch.setattr(layer, "tensor_bytes", lambda tensor: b"")  # there are none
    with fake_cuda():
        finished = layer.quantize_layer(job, torch.empty(SHAPE, device="cpu"), device=CUDA)
    assert solved == [CUDA]
    assert finished.packed.device.type == "cpu"
    assert finished.report.device == finished.report.record()["device"] == "cuda"


def test_workers_of_a_machine_take_turns_on_its_devices():
    devices = tuple(torch.device("cuda", index) for index in range(2))
    work = LayerWork({}, None, {}, devices)
    taken = [work.open(Place(10 + local, local)).args[0].index for local in range(4)]
    assert taken == [0, 1, 0, 1]


def reads_of_counting(n_calls: int, *, full: bool) -> int:
    """Count inputs of two layers, and return how many numbers the host has read."""
    layers = [nn.Linear(16, 8, device="meta"), nn.Linear(8, 4, device="meta")]
    with fake_cuda() as reads:
        for layer in layers:
            for name, parameter in list(layer.named_parameters()):
                there = torch.empty(parameter.shape, device=CUDA)
                setattr(layer, name, nn.Parameter(there))
        model, x = nn.Sequential(*layers), torch.empty(2, 6, 16, device=CUDA)

        def run() -> None:
            for _ in range(n_calls):
                model(x)

        stats = collect_stats(model, run, ["0", "1"], second_moment=full, tokens_per_call=4)
        assert {each.tokens for each in stats.values()} == {4 * n_calls}
        assert {each.second_moment.device.type for each in stats.values()} == {"cpu"}
        return reads.count


@pytest.mark.parametrize("full", [True, False])
def test_inputs_are_counted_where_they_are_and_a_call_of_a_layer_is_one_read(full):
    few, many = (reads_of_counting(n_calls, full=full) for n_calls in (1, 4))
    assert many - few == 2 * 3  # is it finite: before it is added, so that the layer can be named
