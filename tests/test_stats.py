"""Statistics of inputs: what is refused, and that a rewrite of a layer rewrites them alike."""

from dataclasses import replace

import pytest
import torch

from benchmarks.worlds.matrices import gaussian, outlier_columns
from loraq.errors import CalibrationError
from loraq.stats import ActivationStats
from loraq.transforms import rotate


def stats_of(x: torch.Tensor, *, full: bool = True) -> ActivationStats:
    moment = x.mT @ x / len(x) if full else x.square().mean(0)
    return ActivationStats(len(x), moment)


@pytest.mark.parametrize("rotation", [0, 4, 32])
def test_rotated_statistics_are_those_of_rotated_inputs(rotation):
    x = outlier_columns(200, 96)
    found, direct = stats_of(x).rotate(rotation), stats_of(rotate(x, rotation))
    largest = direct.second_moment.abs().max()
    assert (found.second_moment - direct.second_moment).abs().max() < 1e-5 * largest


def test_mean_squares_are_rotated_as_those_of_uncorrelated_channels():
    squares = torch.tensor([16.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    found = ActivationStats(5, squares).rotate(4)
    assert torch.allclose(found.second_moment, torch.tensor([4.0] * 4 + [1.0] * 4))


@pytest.mark.parametrize("seed", range(5))
def test_inputs_that_never_change_can_be_rotated(seed):
    # In a rotated basis their moment has zeros, which rounding turns into small numbers of either
    # sign.
    x = gaussian(1, 64, seed) if seed else torch.ones(1, 64)
    found = stats_of(x).rotate(32)
    assert (found.mean_square >= 0).all()
    assert found.mean_square.sum() == pytest.approx(float(x.square().sum()), rel=1e-5)


def test_statistics_of_any_dtype_are_used_in_fp32():
    wide = stats_of(gaussian(50, 8).double())
    assert wide.to(torch.device("cpu")).second_moment.dtype == torch.float32


def test_the_hash_sees_every_part():
    stats = stats_of(gaussian(50, 8))
    moment = stats.second_moment.clone()
    moment[3, 4] += 1
    others = [
        ActivationStats(51, stats.second_moment),
        ActivationStats(50, moment),
        stats_of(gaussian(50, 8), full=False),
        replace(stats, output_sensitivity=torch.ones(3)),
        replace(stats, output_sensitivity=torch.ones(4)),
    ]
    assert len({stats.sha256, *(other.sha256 for other in others)}) == 6


def test_the_mean_square_is_the_diagonal_of_the_second_moment():
    x = gaussian(50, 8)
    assert torch.allclose(stats_of(x).mean_square, stats_of(x, full=False).mean_square)
    assert stats_of(x).is_full
    assert not stats_of(x, full=False).is_full
    assert stats_of(x).width == 8


@pytest.mark.parametrize(
    ("tokens", "moment", "message"),
    [
        (0, torch.ones(4), "0 tokens say nothing"),
        (1, torch.ones(3, 4), r"shape \(3, 4\)"),
        (1, torch.ones(2, 2, 2), r"shape \(2, 2, 2\)"),
        (1, torch.tensor(1.0), r"shape \(\)"),
        (1, torch.tensor([1.0, torch.nan]), "not finite numbers"),
        (1, torch.tensor([1.0, torch.inf]), "not finite numbers"),
        (1, -torch.eye(2), "negative mean square"),
    ],
)
def test_what_cannot_be_statistics_is_refused(tokens, moment, message):
    with pytest.raises(CalibrationError, match=message):
        ActivationStats(tokens, moment)


def test_sensitivities_stay_whatever_happens_to_the_inputs():
    outputs = torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64)
    stats = replace(stats_of(gaussian(50, 8)), output_sensitivity=outputs)
    codes = torch.full((8,), 120, dtype=torch.uint8)
    for changed in (stats.rotate(4), stats.smooth(codes), stats.to(torch.device("cpu"))):
        assert changed.output_sensitivity.tolist() == outputs.tolist()
    assert stats.to(torch.device("cpu")).output_sensitivity.dtype == torch.float32


@pytest.mark.parametrize(
    "outputs",
    [torch.ones(2, 2), torch.ones(0), torch.tensor([1.0, torch.nan]), torch.tensor([1.0, -1.0])],
)
def test_what_cannot_be_sensitivities_is_refused(outputs):
    with pytest.raises(CalibrationError, match="output sensitivities of shape"):
        ActivationStats(1, torch.ones(4), outputs)
