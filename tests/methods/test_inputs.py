"""What a solver knows of inputs: prices are those of the inputs themselves."""

import pytest
import torch
from correlated_inputs import correlated, stats_of

from benchmarks.worlds.matrices import dit_like, gaussian
from loraq.errors import SchemeError
from loraq.formats import get_format
from loraq.linalg import truncated_svd
from loraq.methods import feedback
from loraq.methods.inputs import Inputs
from loraq.methods.noise import noise_powers
from loraq.stats import ActivationStats

X = correlated(2000, 96)
POWER = X.double().square().mean().item()


def test_white_inputs_price_a_matrix_by_its_energy():
    error = gaussian(24, 96)
    white = Inputs()
    assert white.importance(0.3) is None
    assert white.error_energy(error) == pytest.approx(error.square().sum().item(), rel=1e-5)
    assert white.noise_energy(error) == white.error_energy(error)
    assert white.size(error) == pytest.approx(error.norm().item(), rel=1e-5)
    assert white.size(torch.zeros(4, 4)) == 1


def test_with_full_moments_an_error_costs_what_it_does_to_the_outputs():
    error = gaussian(24, 96)
    outputs = (X.double() @ error.double().mT).square().sum(1).mean().item()
    assert Inputs(stats_of(X)).error_energy(error) == pytest.approx(outputs / POWER, rel=1e-4)
    assert Inputs(stats_of(X)).size(error) == pytest.approx((outputs / POWER) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("full", [True, False])
def test_noise_costs_by_the_mean_squares_alone(full):
    matrix = gaussian(24, 96)
    expected = (matrix.double().square() * X.double().square().mean(0)).sum().item() / POWER
    inputs = Inputs(stats_of(X, full=full))
    assert inputs.noise_energy(matrix) == pytest.approx(expected, rel=1e-5)
    if not full:
        assert inputs.error_energy(matrix) == pytest.approx(expected, rel=1e-5)


def test_importance_is_the_damped_mean_square_and_1_in_the_mean():
    squares = X.double().square().mean(0)
    found = Inputs(stats_of(X)).importance(0.3).double()
    assert found.mean().item() == pytest.approx(1)
    assert torch.allclose(found, (squares / squares.mean() + 0.3) / 1.3, rtol=1e-5)


def test_only_full_moments_feed_errors_back():
    weight, fmt = dit_like(24, 96), get_format("mxfp4")
    nearest = fmt.quantize(weight, "search").packed
    assert torch.equal(Inputs().round(weight, fmt, "search").packed, nearest)
    assert torch.equal(Inputs(stats_of(X, full=False)).round(weight, fmt, "search").packed, nearest)
    assert not torch.equal(Inputs(stats_of(X)).round(weight, fmt, "search").packed, nearest)


def test_several_roundings_share_one_factor(monkeypatch):
    made, inputs = [], Inputs(stats_of(X))
    factor = feedback._unit_factor
    monkeypatch.setattr(feedback, "_unit_factor", lambda *of: made.append(of) or factor(*of))
    first, second = (
        inputs.round(dit_like(24, 96, seed), get_format("mxfp4"), "search") for seed in (0, 1)
    )
    assert len(made) == 1
    assert torch.equal(
        second.packed,
        Inputs(stats_of(X)).round(dit_like(24, 96, 1), get_format("mxfp4"), "search").packed,
    )
    assert not torch.equal(first.packed, second.packed)


def test_noise_that_inputs_cannot_make_is_filtered():
    # Fine enough that its own error is no matter.
    weight, fmt = dit_like(24, 96), get_format("int8")
    activation = get_format("mxfp4")
    plain, filtered = (
        Inputs(stats_of(X), activation=of).round(weight, fmt, "search").dequantize()
        for of in (None, activation)
    )
    inputs = Inputs(stats_of(X), activation=activation)

    def expected(rounded):
        return inputs.error_energy(weight - rounded) + inputs.rounding_energy(rounded, 0.0)

    assert expected(filtered) < 0.8 * expected(plain)
    noisy = activation.for_rows().round(X)
    errors = [
        (X @ weight.mT - noisy @ rounded.mT).square().mean().item() for rounded in (plain, filtered)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_uncorrelated_inputs_leave_the_filter_nothing_but_to_shrink():
    weight, activation = gaussian(8, 32), get_format("int4")
    white = ActivationStats(10, torch.eye(32))
    rounded = Inputs(white, 0.0, activation).round(weight, get_format("bf16"), None).dequantize()
    noise = noise_powers(torch.ones(32).double(), activation)
    assert torch.allclose(rounded, (weight / (1 + noise)).float(), rtol=1e-2)


@pytest.mark.parametrize("activation", [None, "bf16", "mxfp4"])
def test_a_negative_damping_is_refused(activation):
    inputs = Inputs(stats_of(X), -0.5, activation and get_format(activation))
    with pytest.raises(SchemeError, match=r"A damping of -0\.5 is negative"):
        inputs.round(dit_like(24, 96), get_format("mxfp4"), "search")


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4", "mxint8", "int8"])
@pytest.mark.parametrize("width", [128, 70])
def test_noise_is_as_large_in_each_channel_as_rounding_makes_it(name, width):
    """Beside one channel that outshines its block, too: then a mean says little of the step."""
    fmt = get_format(name).for_rows()
    scales = torch.tensor([1.0, 1, 2, 2, 0.5, 1, 1, 1]).repeat(16)[:width]
    scales[[3, 40]] = 12.0
    x = gaussian(4000, width) * scales
    found = (x - fmt.round(x)).double().square().mean(0)
    powers = noise_powers(x.double().square().mean(0), fmt)
    assert (powers / found).log().abs().max() < 0.3
    assert powers.sum().item() == pytest.approx(found.sum().item(), rel=0.1)


def test_floats_of_16_bits_are_not_filtered():
    weight, fmt = dit_like(24, 96), get_format("mxfp4")
    plain, rounded = (
        Inputs(stats_of(X), activation=of).round(weight, fmt, "search")
        for of in (None, get_format("bf16"))
    )
    assert torch.equal(plain.packed, rounded.packed)


@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-15])
def test_the_best_branch_leaves_the_least_to_a_filtered_main_weight(scale):
    """What is left is min over M of tr((R − M) H (R − M)ᵀ) + tr(M Σ Mᵀ), taken here by a solver."""
    weight, activation, damping, rank = dit_like(24, 96), get_format("mxfp4"), 0.01, 5
    stats = stats_of(X * scale)
    moment = stats.second_moment.double()
    moment = moment / moment.diagonal().mean() + damping * torch.eye(96)
    sigma = noise_powers(moment.diagonal(), activation).diag()

    def left(up, down):
        rest = weight.double() - up.double() @ down.double()
        main = torch.linalg.solve(moment + sigma, moment @ rest.mT).mT
        error = rest - main
        return ((error @ moment * error).sum() + (main @ sigma * main).sum()).item()

    svd = truncated_svd(weight, rank, seed=0)
    best = Inputs(stats, damping, activation).best_branch(weight, svd, 0)
    metric = moment - moment @ torch.linalg.solve(moment + sigma, moment)
    tail = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(metric))[rank:]
    assert left(*best.to_balanced()) == pytest.approx(tail.square().sum().item(), rel=1e-3)
    assert left(*best.to_balanced()) < 0.97 * left(*svd.to_balanced())
