"""Inputs as a weight lets expect them: those of statistics with the same moments, and of use."""

import pytest
import torch
from correlated_inputs import output_error, run_error
from torch import Tensor

from benchmarks.worlds.matrices import dit_like, gaussian
from loraq.formats import get_format
from loraq.linalg import truncated_svd
from loraq.methods import LoRaQ, SVDQuant
from loraq.methods.expected import ExpectedInputs
from loraq.methods.inputs import Inputs
from loraq.recipe_names import parse_scheme
from loraq.stats import ActivationStats

WEIGHT = dit_like(80, 96)
#: Singular triplets that are told from the rest, and how much power they have.
RANK, PRIOR = 8, 20.0


def expected(weight: Tensor, activation: str = "bf16") -> ExpectedInputs:
    svd = truncated_svd(weight, RANK, seed=0)
    return ExpectedInputs.of(weight, svd, PRIOR, get_format(activation))


def moment_of(weight: Tensor) -> Tensor:
    """H of the module text, by dense algebra, with a mean power of 1."""
    _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    values, right = values[:RANK], right[:RANK]
    n = weight.shape[1]
    moment = torch.eye(n).double() + PRIOR * n * (right.mT * values.square()) @ right / (
        weight.double().square().sum()
    )
    return moment * n / moment.trace()


def dense(weight: Tensor, activation: str = "bf16") -> Inputs:
    """The same inputs, told by statistics."""
    stats = ActivationStats(1000, moment_of(weight).float())
    return Inputs(stats, activation=get_format(activation))


def test_prices_are_those_of_statistics_with_the_same_moments():
    ours, theirs, matrix = expected(WEIGHT, "int4"), dense(WEIGHT, "int4"), gaussian(24, 96)
    for price in ("error_energy", "noise_energy", "size"):
        assert getattr(ours, price)(matrix) == pytest.approx(
            getattr(theirs, price)(matrix), rel=1e-4
        ), price
    assert ours.rounding_energy(matrix, 0.0) == pytest.approx(
        theirs.rounding_energy(matrix, 0.0), rel=1e-4
    )
    torch.testing.assert_close(ours.importance(0.3), theirs.importance(0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("main", ["int4", "mxfp4", "nvfp4", "bf16"])
def test_it_rounds_as_statistics_with_the_same_moments_let_round(main, activation):
    fmt = get_format(main)
    ours, theirs = (
        inputs.round(WEIGHT, fmt, "search").dequantize()
        for inputs in (expected(WEIGHT, activation), dense(WEIGHT, activation))
    )
    same = torch.isclose(ours, theirs, rtol=1e-4, atol=1e-7).float().mean().item()
    assert same > 0.98  # a code near a tie takes later ones of its row with it
    if main != "bf16":
        nearest = fmt.quantize(WEIGHT, "search").dequantize()
        assert not torch.equal(ours, nearest)


@pytest.mark.parametrize("weight", [torch.zeros(24, 32), torch.ones(24, 32)], ids=["zero", "one"])
def test_weights_without_a_spectrum_are_no_trouble(weight):
    rounded = expected(weight, "int8").round(weight, get_format("int4"), "search").dequantize()
    assert rounded.isfinite().all()
    assert expected(torch.zeros(24, 32)).size(torch.zeros(4, 32)) == 1


@pytest.mark.parametrize("method", [LoRaQ(steps=12, refine_steps=6), SVDQuant()], ids=str)
@pytest.mark.parametrize("name", ["int4-a16+w8a8-r8", "int4-aint8+int8-r8", "nvfp4-a16+w8a8-r8"])
def test_outputs_of_inputs_that_are_as_expected_are_nearer(method, name):
    with_prior = type(method)(**{**vars(method), "input_prior": PRIOR})
    x = gaussian(4000, 96, seed=5) @ torch.linalg.cholesky(moment_of(WEIGHT)).float().mT
    white, ours = (
        output_error(x, WEIGHT, each.solve(WEIGHT, parse_scheme(name), seed=0))
        for each in (method, with_prior)
    )
    assert ours < 0.95 * white


@pytest.mark.parametrize("method", [LoRaQ(steps=12, refine_steps=6), SVDQuant()], ids=str)
@pytest.mark.parametrize("main", ["int4", "int6", "mxint8"])
def test_the_noise_of_four_bit_activations_is_filtered_beside_any_main_weight(method, main):
    x = gaussian(4000, 96, seed=5) @ torch.linalg.cholesky(moment_of(WEIGHT)).float().mT
    scheme = parse_scheme(f"{main}-aint4+w8a16-r8-h0")
    white, ours = (
        run_error(WEIGHT, each.solve(WEIGHT, scheme, seed=0), x)
        for each in (method, type(method)(**{**vars(method), "input_prior": PRIOR}))
    )
    assert ours < 0.97 * white


def test_statistics_are_believed_before_the_weight():
    stats = ActivationStats(1000, torch.rand(96, generator=torch.Generator().manual_seed(0)) + 0.5)
    scheme = parse_scheme("int4-a16+w8a8-r8")
    first, second = (
        LoRaQ(steps=3, refine_steps=2, input_prior=prior).solve(WEIGHT, scheme, stats=stats).packed
        for prior in (0.0, 1.0)
    )
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
