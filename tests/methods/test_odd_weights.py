"""Weights that no trained layer has: never worse than round to nearest, and nothing lost silently.

Every method promises it in its own measure: the error of the weight, the output error where there
are statistics, and the objective J for `loraq`.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import loraq
from benchmarks.worlds.matrices import dit_like, gaussian, huge, tiny
from loraq.errors import CheckpointError, FormatError, LayerError
from loraq.methods import GPTQ, LQER, QERA, RTN, LoRaQ, Method, SVDQuant
from loraq.methods.noise import ActivationNoise
from loraq.packed import LayerSolution
from loraq.pipeline.source import Checkpoint, Source
from loraq.recipe import Recipe
from loraq.recipe_names import parse_scheme
from loraq.safetensors.layout import write_shards
from loraq.scheme import Scheme
from loraq.stats import ActivationStats

SHAPE = (48, 96)
FP32 = torch.finfo(torch.float32)
NAMES = [
    "mxfp4-a4+w8a8-r8",
    "mxfp4-a16+w8a8-r8",
    "mxfp4-a8+bf16-r8",
    "int4-a4+w6a6-r8",
    "int4-a16+bf16-r8",
    "nvfp4-a4+w8a8-r8",
    "mxint4-a16+w4a8-r8",
    "int5-a16+fp16-r8",
]
LORAQ = LoRaQ(steps=4, refine_steps=2)
DATA_FREE: dict[str, Method] = {
    "lqer": LQER(),
    "svdquant": SVDQuant(),
    "svdquant_x3": SVDQuant(rounds=3),
    "loraq": LORAQ,
}
WITH_STATS: dict[str, Method] = {
    "gptq": GPTQ(),
    "qera": QERA(),
    "qera_diagonal": QERA(exact=False),
    "loraq": LORAQ,
}


def one_hot(n_out: int, n_in: int) -> Tensor:
    weight = torch.zeros(n_out, n_in)
    weight[torch.arange(n_out), torch.arange(n_out) * 7 % n_in] = 1
    return weight


def one_entry(n_out: int, n_in: int) -> Tensor:
    weight = torch.zeros(n_out, n_in)
    weight[n_out // 2, n_in // 3] = 0.7
    return weight


def outlier(n_out: int, n_in: int) -> Tensor:
    weight = gaussian(n_out, n_in)
    weight[3, 5] = 1e6
    return weight


def checkerboard(n_out: int, n_in: int) -> Tensor:
    return (-1.0) ** (torch.arange(n_out)[:, None] + torch.arange(n_in)[None])


ODD = {
    "identity": torch.eye(*SHAPE),
    "scaled identity": 0.37 * torch.eye(*SHAPE),
    "checkerboard": checkerboard(*SHAPE),
    "scaled checkerboard": 0.3 * checkerboard(*SHAPE),
    "largest of fp16": torch.full(SHAPE, 65504.0),
    "one-hot rows": one_hot(*SHAPE),
    "rank one": gaussian(SHAPE[0], 1, 2) @ gaussian(1, SHAPE[1], 3),
    "one entry": one_entry(*SHAPE),
    "huge outlier": outlier(*SHAPE),
    "signs": torch.where(gaussian(*SHAPE) > 0, 1.0, -1.0),
    "tiny": tiny(*SHAPE),
    "huge": huge(*SHAPE),
}

each_name = pytest.mark.parametrize("name", NAMES)


def nearest_of(weight: Tensor, scheme: Scheme) -> LayerSolution:
    return RTN().solve(weight, replace(scheme, branch=None))


def statistics() -> ActivationStats:
    x = gaussian(200, SHAPE[1], 5) @ (torch.eye(SHAPE[1]) + 0.3 * gaussian(SHAPE[1], SHAPE[1], 6))
    return ActivationStats(len(x), x.T @ x / len(x))


def output_error(weight: Tensor, solution: LayerSolution, stats: ActivationStats) -> float:
    moment, error = stats.second_moment.double(), weight.double() - solution.reconstruct().double()
    size = ((weight.double() @ moment) * weight.double()).sum()
    return math.sqrt(((error @ moment) * error).sum() / size)


# --- never worse than round to nearest ------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in DATA_FREE if name != "loraq"])
@each_name
def test_the_weight_is_never_worse_than_rounded_to_nearest(name, method):
    scheme = parse_scheme(name)
    worse = {}
    for kind, weight in ODD.items():
        found = DATA_FREE[method].solve(weight, scheme).relative_error
        if not found <= nearest_of(weight, scheme).relative_error:
            worse[kind] = found
    assert not worse


@pytest.mark.parametrize("method", [name for name in WITH_STATS if name != "loraq"])
@pytest.mark.parametrize("name", NAMES[1::2])
def test_the_output_is_never_worse_than_rounded_to_nearest(name, method):
    scheme, stats = replace(parse_scheme(name), rotation=0), statistics()
    worse = {}
    for kind, weight in ODD.items():
        solution = WITH_STATS[method].solve(weight, scheme, stats=stats)
        found = output_error(weight, solution, stats)
        assert solution.metrics["output_error"] == pytest.approx(found, rel=1e-3, abs=1e-7)
        if not found <= output_error(weight, nearest_of(weight, scheme), stats) * (1 + 1e-6):
            worse[kind] = found
    assert not worse


@pytest.mark.parametrize(
    ("name", "with_stats"),
    [(name, False) for name in NAMES] + [(name, True) for name in NAMES[1::2]],
)
def test_loraq_is_never_worse_in_its_objective_which_prices_rounded_activations(name, with_stats):
    scheme, stats = replace(parse_scheme(name), rotation=0), statistics()
    price = ActivationNoise.of(scheme, scheme.branch).main
    moment = stats.second_moment.double() if with_stats else torch.eye(SHAPE[1]).double()
    worse = {}
    for kind, weight in ODD.items():
        solution = LORAQ.solve(weight, scheme, stats=stats if with_stats else None)
        rounded = nearest_of(weight, scheme).reconstruct().double()
        error = weight.double() - rounded
        cost = ((error @ moment) * error).sum() + price * (rounded**2 @ moment.diagonal()).sum()
        size = ((weight.double() @ moment) * weight.double()).sum()
        if not solution.metrics["objective"] <= math.sqrt(cost / size) * (1 + 1e-5) + 1e-7:
            worse[kind] = solution.metrics["objective"], math.sqrt(cost / size)
    assert not worse


@pytest.mark.parametrize("name", [name for name in NAMES if "-a16" in name])
def test_with_16_bit_activations_loraq_is_never_worse_on_the_weight(name):
    scheme = parse_scheme(name)
    worse = {}
    for kind, weight in ODD.items():
        found = LORAQ.solve(weight, scheme).relative_error
        if not found <= nearest_of(weight, scheme).relative_error + 1e-7:
            worse[kind] = found
    assert not worse


def test_a_rotated_scheme_is_compared_with_the_rounding_of_the_rotated_weight():
    scheme = parse_scheme("mxfp4-a4+w8a8-r8")
    assert scheme.rotation == 32
    solution = SVDQuant().solve(torch.eye(*SHAPE), scheme)
    assert solution.relative_error == nearest_of(torch.eye(*SHAPE), scheme).relative_error > 0
    assert not solution.packed.branch.reconstruct().any()


# --- the ends of fp32 -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("name", [name for name in NAMES if "fp16" not in name])  # has no scales
def test_a_power_of_two_changes_nothing_but_the_scales(name, method):
    scheme, weight = parse_scheme(name), dit_like(*SHAPE)
    expected = DATA_FREE[method].solve(weight * 2.0**41, scheme)
    for exponent in (124, -100):
        solution = DATA_FREE[method].solve(weight * 2.0**exponent, scheme)
        assert solution.relative_error == pytest.approx(expected.relative_error, rel=1e-6), exponent
        dense = solution.reconstruct().double() * 2.0**-exponent
        close = torch.linalg.vector_norm(dense - expected.reconstruct().double() * 2.0**-41)
        assert close <= 1e-6 * torch.linalg.vector_norm(weight), exponent


@pytest.mark.parametrize("method", ["lqer", "svdquant", "loraq"])
@pytest.mark.parametrize("name", NAMES[::2])
@pytest.mark.parametrize("largest", [1e37, 0.74 * FP32.max, FP32.max, 1e-30, 1e-36, FP32.tiny])
@pytest.mark.parametrize("kind", [dit_like, checkerboard])
def test_extreme_weights_are_stored_well_or_refused(kind, largest, name, method):
    scheme, weight = parse_scheme(name), kind(*SHAPE)
    weight = (weight.double() / weight.abs().max() * largest).float()
    try:
        solution = DATA_FREE[method].solve(weight, scheme)
    except FormatError as error:
        assert not 1e-34 < largest < 0.7 * FP32.max
        assert "keep this layer in floats" in str(error)  # noqa: PT017
        return
    dense = solution.reconstruct()
    assert dense.isfinite().all()
    error = torch.linalg.vector_norm(dense.double() - weight.double())
    found = (error / torch.linalg.vector_norm(weight.double())).item()
    assert solution.relative_error == pytest.approx(found, rel=1e-3, abs=1e-6)
    assert found < (0.2 if 1e-30 <= largest <= 1e37 else 1)


@pytest.mark.parametrize("method", WITH_STATS)
@pytest.mark.parametrize("largest", [1e37, 1e-30])
def test_statistics_do_not_mind_extreme_weights(largest, method):
    scheme, stats, weight = parse_scheme("int4-a8+w8a8-r8"), statistics(), dit_like(*SHAPE)
    weight = (weight.double() / weight.abs().max() * largest).float()
    solution = WITH_STATS[method].solve(weight, scheme, stats=stats)
    assert solution.reconstruct().isfinite().all()
    assert solution.metrics["output_error"] < 0.2


@pytest.mark.parametrize("largest", [1e37, FP32.max, 1e-30])
def test_predictions_do_not_mind_extreme_weights(largest):
    scheme, weight = parse_scheme("mxfp4-a4+w8a8-r8"), dit_like(*SHAPE)
    usual = LQER().predict(weight, scheme, 8)
    extreme = (weight.double() / weight.abs().max() * largest).float()
    found = LQER().predict(extreme, scheme, 8)
    for rank in (0, 4, 8):
        assert found.relative_error(rank) == pytest.approx(usual.relative_error(rank), rel=0.15)


#: fp64 weights that fp32 does not hold, and what is said of them.
BEYOND = {
    "too large": (
        1e300,
        r"the value at \(0, 3\) is 1e\+300, .*beyond 3.4e\+38, the largest of fp32",
    ),
    "too small": (1e-300, r"the largest magnitude is .*e-300, below the normal numbers of fp32"),
}


def beyond(kind: str) -> Tensor:
    weight = gaussian(48, 64).double()
    if kind == "too large":
        weight[0, 3] = 1e300
        return weight
    return weight * 1e-300


@pytest.mark.parametrize("kind", BEYOND)
@pytest.mark.parametrize("method", DATA_FREE)
def test_a_weight_that_fp32_does_not_hold_is_refused(kind, method):
    with pytest.raises(FormatError, match=BEYOND[kind][1]):
        DATA_FREE[method].solve(beyond(kind), parse_scheme("mxfp4-a16+w8a8-r8"))


@pytest.mark.parametrize("kind", BEYOND)
def test_it_is_found_by_name_before_any_layer_is_solved(kind, tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48)).double()
    model[1].weight.data = beyond(kind)
    monkeypatch.setattr(Method, "solve", None)
    with pytest.raises(LayerError, match=rf"Layer '1' .*{BEYOND[kind][1]}"):
        loraq.quantize_(model, "mxfp4+w8a8-r4", progress=False)
    write_shards(model.state_dict(), tmp_path, "model")
    source = Source.open(Checkpoint(tmp_path, {}), Recipe.named("mxfp4+w8a8-r4"))
    with pytest.raises(CheckpointError, match=rf"Tensor '1.weight' .*{BEYOND[kind][1]}"):
        source.hash_weights()


@pytest.mark.parametrize("value", [1e300, 1e-300])
def test_a_kept_tensor_may_hold_what_its_own_dtype_holds(tmp_path, value):
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).double()
    model[1].weight.data = torch.full((64,), value, dtype=torch.float64)
    write_shards(model.state_dict(), tmp_path, "model")
    source = Source.open(Checkpoint(tmp_path, {}), Recipe.named("mxfp4+w8a8-r4"))
    assert set(source.hash_weights()) == set(model.state_dict())


def test_a_tiny_value_among_normal_ones_is_no_fault():
    weight = dit_like(*SHAPE).double()
    weight[2, 3] = 1e-300
    scheme = parse_scheme("mxfp4-a16+w8a8-r8")
    assert LQER().solve(weight, scheme).relative_error < 0.2


class Broken(LQER):
    """Returns numbers that are not finite."""

    def _fit(self, weight, scheme, seed, stats):
        fit = super()._fit(weight, scheme, seed, stats)
        fit.branch.proj_up.packed.fill_(0xFF)  # NaN in bf16
        return fit


def test_a_fit_that_is_not_finite_is_never_returned():
    weight, scheme = dit_like(*SHAPE), parse_scheme("mxfp4-a16+bf16-r8")
    solution = Broken().solve(weight, scheme)
    assert solution.relative_error == nearest_of(weight, scheme).relative_error
    assert solution.reconstruct().isfinite().all()
