"""LoRaQ with statistics: less output error, an objective that is the output error, and nothing
new for white inputs.
"""

from dataclasses import replace

import pytest
import torch
from correlated_inputs import correlated, output_error, stats_of

from benchmarks.worlds.matrices import dit_like
from loraq.errors import CalibrationError
from loraq.methods import GPTQ, LoRaQ, inputs
from loraq.methods.inputs import Inputs
from loraq.methods.noise import rounding_noise
from loraq.nn import QuantizedLinear
from loraq.scheme import Branch, Scheme
from loraq.stats import ActivationStats

SCHEME = Scheme("int4", branch=Branch(8, "mxint8"))
FAST = LoRaQ.at("fast")
WEIGHT, X = dit_like(64, 96), correlated(2000, 96)


def packed(solution) -> list[torch.Tensor]:
    return list(solution.packed.tensors.values())


def test_more_knowledge_is_less_output_error():
    none, squares, full = (
        output_error(X, WEIGHT, FAST.solve(WEIGHT, SCHEME, stats=stats))
        for stats in (None, stats_of(X, full=False), stats_of(X))
    )
    assert full < 0.8 * squares
    assert squares < none


def test_it_is_better_than_the_same_rounding_beside_a_branch_of_svd():
    stats = stats_of(X)
    ours = FAST.solve(WEIGHT, SCHEME, stats=stats)
    assert output_error(X, WEIGHT, ours) < 0.95 * output_error(
        X, WEIGHT, GPTQ().solve(WEIGHT, SCHEME, stats=stats)
    )
    assert ours.metrics["objective"] <= ours.metrics["start_objective"]


@pytest.mark.parametrize("rotation", [0, 32])
def test_without_activation_noise_the_objective_is_the_output_error(rotation):
    scheme = Scheme("mxfp4", "mxfp4", Branch(8, "mxint8"), rotation)
    ours = replace(FAST, activation_aware=False).solve(WEIGHT, scheme, stats=stats_of(X))
    assert ours.metrics["objective"] == pytest.approx(output_error(X, WEIGHT, ours), rel=1e-3)


def test_mean_squares_that_are_all_alike_change_no_byte():
    alike = ActivationStats(10, torch.full((96,), 4.0))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            packed(FAST.solve(WEIGHT, SCHEME, stats=alike)),
            packed(FAST.solve(WEIGHT, SCHEME)),
            strict=True,
        )
    )


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("kind", ["zeros", "dead", "constant", "tiny", "huge"])
@pytest.mark.parametrize("rotation", [0, 32])
def test_inputs_at_the_edge_are_no_problem(kind, full, rotation):
    x = X.clone()
    if kind == "zeros":
        x = torch.zeros_like(x)
    elif kind == "dead":
        x[:, 5:40] = 0
    elif kind == "constant":
        x = torch.ones_like(x)
    else:
        x = x * (1e-18 if kind == "tiny" else 1e15)
    scheme = Scheme("mxfp4", "mxfp4", Branch(8, "mxint8"), rotation)
    ours = FAST.solve(WEIGHT, scheme, stats=stats_of(x, full=full))
    assert ours.reconstruct().isfinite().all()
    assert ours.relative_error < 0.5
    assert ours.metrics["objective"] <= ours.metrics["start_objective"]


@pytest.mark.parametrize(("name", "activation"), [("int4", "mxint4"), ("mxfp4", "mxfp4")])
@pytest.mark.parametrize("factor", ["mxint8", "mxfp4"])
def test_beside_noisy_activations_the_branch_is_not_the_svd_of_the_weight(
    name, activation, factor, monkeypatch
):
    """Measured with activations that are really rounded, not by the objective alone."""
    scheme = Scheme(name, activation, Branch(8, factor, "mxint8", "int8"), 32)
    exact = X @ WEIGHT.mT

    def solve():
        solution = FAST.solve(WEIGHT, scheme, stats=stats_of(X))
        layer = QuantizedLinear.from_packed(solution.packed)
        layer.backend = "reference"  # others may leave activations as they are
        return (layer(X) - exact).norm().item(), solution.metrics

    now, new = solve()
    monkeypatch.setattr(Inputs, "best_branch", lambda self, weight, svd, seed: svd)
    before, old = solve()
    assert now < 0.99 * before
    assert new["objective"] < old["objective"] <= old["start_objective"]


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
@pytest.mark.parametrize("method", [FAST, GPTQ(noise_filter=True)])
def test_noise_that_is_measured_is_filtered_better_than_a_share_of_the_power(
    name, method, monkeypatch
):
    """Measured with activations that are really rounded."""
    x = X.clone()
    x[:, ::16] *= 6  # they set the step of their blocks, which a share of each channel misses
    scheme, exact = Scheme(name, name, Branch(8, "mxint8")), x @ WEIGHT.mT

    def solve():
        layer = QuantizedLinear.from_packed(method.solve(WEIGHT, scheme, stats=stats_of(x)).packed)
        layer.backend = "reference"  # others may leave activations as they are
        return (layer(x) - exact).norm().item()

    measured = solve()
    share = rounding_noise(name)
    monkeypatch.setattr(inputs, "noise_powers", lambda mean_square, fmt: share * mean_square)
    assert measured < 0.95 * solve()


def test_a_branch_as_noisy_as_the_main_path_gets_no_answer_to_its_noise(monkeypatch):
    def fail(*_):
        raise AssertionError("nobody asks for it")

    monkeypatch.setattr(Inputs, "best_branch", fail)
    for scheme in (
        Scheme("mxfp4", "mxfp4", Branch(8, "mxint8", "mxfp4")),
        Scheme("mxfp4", branch=Branch(8, "mxint8")),
    ):
        metrics = FAST.solve(WEIGHT, scheme, stats=stats_of(X)).metrics
        assert metrics["objective"] <= metrics["start_objective"]


def test_statistics_of_another_layer_are_refused():
    with pytest.raises(CalibrationError, match="of 96 input channels, the weight has 64"):
        FAST.solve(dit_like(24, 64), SCHEME, stats=stats_of(X))
