"""Predictions of what a branch leaves, against what solvers leave."""

from dataclasses import replace

import pytest
import torch

from benchmarks.worlds.matrices import dit_like, gaussian, huge, low_rank, zeros
from loraq.errors import FormatError, SchemeError
from loraq.methods import LQER, RTN, LoRaQ, SVDQuant
from loraq.scheme import Branch, Scheme

SCHEME = Scheme("mxfp4", branch=Branch(8, "mxint8"))
METHODS = {"loraq": LoRaQ.at("fast"), "svdquant": SVDQuant(), "lqer": LQER()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rotation", [0, 32])
def test_rank_0_is_rounding_to_nearest_and_more_is_never_worse(method, rotation):
    weight = dit_like(96, 160)
    scheme = replace(SCHEME, rotation=rotation)
    prediction = METHODS[method].predict(weight, scheme, 96)
    assert prediction.relative_error(0) == pytest.approx(
        RTN().solve(weight, replace(scheme, branch=None)).relative_error, rel=1e-4
    )
    assert len(prediction.left) == 97
    assert all(a >= b for a, b in zip(prediction.left, prediction.left[1:], strict=False))
    assert prediction.energy == pytest.approx(weight.double().square().sum().item())


# Measured 0.87 to 1.05 for these; the bounds leave a little room. One-shot SVDQuant's scale search
# adds to it.
@pytest.mark.parametrize("factor", ["mxint8", "mxfp6_e2m3", "mxfp4"])
@pytest.mark.parametrize("method", ["loraq", "svdquant"])
def test_a_prediction_is_near_what_the_method_leaves(method, factor):
    for weight in (dit_like(192, 192), dit_like(192, 768), dit_like(768, 192)):
        for rank in (8, 16, 32):
            scheme = Scheme("mxfp4", branch=Branch(rank, factor))
            solved = METHODS[method].solve(weight, scheme, seed=0).relative_error
            assert METHODS[method].predict(weight, scheme, 64).relative_error(
                rank
            ) == pytest.approx(solved, rel=0.25)


def test_ranks_help_a_weight_with_leading_directions_more():
    leading, flat = (
        METHODS["loraq"].predict(w, SCHEME, 8)
        for w in (low_rank(96, 96, 4) + gaussian(96, 96), gaussian(96, 96))
    )
    assert leading.relative_error(8) / leading.relative_error(0) < 0.8 * flat.relative_error(
        8
    ) / flat.relative_error(0)


def test_extreme_weights_are_predicted_too():
    nothing = METHODS["loraq"].predict(zeros(32, 48), SCHEME, 32)
    assert set(nothing.left) == {0.0}
    assert nothing.relative_error(8) == 0
    large, plain = (
        METHODS["loraq"].predict(w, SCHEME, 8).relative_error(8)
        for w in (huge(64, 64), gaussian(64, 64))
    )
    assert large == pytest.approx(plain, rel=0.05)
    exact = METHODS["svdquant"].predict(low_rank(64, 64, 4), SCHEME, 64)
    assert exact.relative_error(4) < 1e-3


def test_what_cannot_be_quantized_cannot_be_predicted():
    with pytest.raises(FormatError, match="nan"):
        METHODS["loraq"].predict(torch.full((32, 32), torch.nan), SCHEME, 8)
    with pytest.raises(SchemeError, match="'lqer' fits a low-rank branch, but the scheme has none"):
        METHODS["lqer"].predict(gaussian(32, 32), Scheme("mxfp4"), 8)
