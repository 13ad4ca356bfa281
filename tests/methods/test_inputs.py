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
    weight, fmt = (
        dit_like(24, 96),
        get_format("int8"),
    )
    noise = 0.02
    plain, filtered = (
        Inputs(stats_of(X), activation_noise=power).round(weight, fmt, "search").dequantize()
        for power in (0.0, noise)
    )
    inputs = Inputs(stats_of(X))

    def expected(rounded):
        return inputs.error_energy(weight - rounded) + noise * inputs.noise_energy(rounded)

    assert expected(filtered) < 0.8 * expected(plain)
    generator = torch.Generator().manual_seed(5)
    noisy = X + noise**0.5 * X.square().mean(0).sqrt() * torch.randn(X.shape, generator=generator)
    errors = [
        (X @ weight.mT - noisy @ rounded.mT).square().mean().item() for rounded in (plain, filtered)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_uncorrelated_inputs_leave_the_filter_nothing_but_to_shrink():
    weight, noise = gaussian(8, 32), 0.1
    white = ActivationStats(10, torch.eye(32))
    rounded = Inputs(white, 0.0, noise).round(weight, get_format("bf16"), None).dequantize()
    assert torch.allclose(rounded, weight / (1 + noise), rtol=1e-2)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_negative_damping_is_refused(noise):
    with pytest.raises(SchemeError, match=r"A damping of -0\.5 is negative"):
        Inputs(stats_of(X), -0.5, noise).round(dit_like(24, 96), get_format("mxfp4"), "search")


@pytest.mark.parametrize(("name", "other"), [("int4", None), ("mxfp4", "mxint4")])
def test_noise_spreads_over_channels_as_rounding_spreads_it(name, other):
    """Nearer than by the other rule: a float's step follows its channel, an integer's its block."""
    fmt = get_format(name).for_rows()
    x = gaussian(4000, 128) * torch.tensor([1.0, 1.0, 2.0, 2.0]).repeat(32)
    power = x.square().mean(0)

    def distance(spread):
        found = (x - fmt.round(x)).square().mean(0)
        return ((found / found.mean()).log() - (spread / spread.mean()).log()).abs().mean().item()

    wrong = noise_powers(power, other and get_format(other))
    assert distance(noise_powers(power, fmt)) < 0.9 * distance(wrong)


def test_blocks_of_noise_may_end_early_or_be_the_whole_row():
    power = torch.arange(1.0, 71)
    parts = noise_powers(power, get_format("int4"))
    assert torch.allclose(parts, torch.tensor([32.5] * 64 + [67.5] * 6))
    assert torch.allclose(noise_powers(power, get_format("int8")), torch.full((70,), 35.5))
    for fmt in (None, get_format("bf16")):
        assert torch.equal(noise_powers(power, fmt), power)


@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-15])
def test_the_best_branch_leaves_the_least_to_a_filtered_main_weight(scale):
    """What is left is min over M of tr((R − M) H (R − M)ᵀ) + tr(M Σ Mᵀ), taken here by a solver."""
    weight, noise, damping, rank = dit_like(24, 96), 0.02, 0.01, 5
    stats = stats_of(X * scale)
    moment = stats.second_moment.double()
    moment = moment / moment.diagonal().mean() + damping * torch.eye(96)
    sigma = noise * moment.diagonal().diag()

    def left(up, down):
        rest = weight.double() - up.double() @ down.double()
        main = torch.linalg.solve(moment + sigma, moment @ rest.mT).mT
        error = rest - main
        return ((error @ moment * error).sum() + (main @ sigma * main).sum()).item()

    svd = truncated_svd(weight, rank, seed=0)
    best = Inputs(stats, damping, noise).best_branch(weight, svd, 0)
    metric = moment - moment @ torch.linalg.solve(moment + sigma, moment)
    tail = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(metric))[rank:]
    assert left(*best.to_balanced()) == pytest.approx(tail.square().sum().item(), rel=1e-3)
    assert left(*best.to_balanced()) < 0.97 * left(*svd.to_balanced())
