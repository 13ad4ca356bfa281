"""Outputs that count more: methods leave less error where it matters, and what is stored is what
was solved. Where formats cannot carry it, or nothing tells outputs apart, no byte changes.
"""

from dataclasses import replace

import pytest
import torch
from correlated_inputs import correlated, output_error, stats_of
from torch import Tensor

from benchmarks.worlds.matrices import dit_like, gaussian
from loraq.errors import CalibrationError
from loraq.methods import GPTQ, QERA, RTN, LoRaQ, SVDQuant
from loraq.methods.base import Method
from loraq.methods.fits import choose_row_exponents
from loraq.packed import LayerSolution
from loraq.recipe_names import parse_scheme

WEIGHT, X = dit_like(64, 96), correlated(1000, 96)
#: A few outputs count a hundred times as much as most.
SENSITIVITY = torch.exp(2 * gaussian(1, 64, 5)[0])
PLAIN = stats_of(X)
WEIGHED = replace(PLAIN, output_sensitivity=SENSITIVITY)
METHODS = [LoRaQ.at("fast"), GPTQ(rounds=20, rotate=True), GPTQ(refits=1), QERA()]


def weighed_error(solution: LayerSolution) -> float:
    """Squared output error, each output times what it counts, from the public result alone."""
    error = X.double() @ (WEIGHT.double() - solution.reconstruct().double()).mT
    return (error.square().sum(0) @ SENSITIVITY.double()).item()


def same_bytes(first: LayerSolution, second: LayerSolution) -> bool:
    a, b = first.packed.tensors, second.packed.tensors
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize(
    "name", ["int4-a16+bf16-r6", "mxfp4-a8+w8a8-r8", "int4-a4+w4a16-r12-s-h32"]
)
def test_less_error_where_it_counts(method: Method, name: str):
    scheme = parse_scheme(name)
    plain, weighed = (method.solve(WEIGHT, scheme, stats=s) for s in (PLAIN, WEIGHED))
    assert weighed_error(weighed) < 0.8 * weighed_error(plain)


@pytest.mark.parametrize("name", ["int4-a16+w8a8-r8", "mxfp4-a4+w4a8-r8-s-h32"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_what_is_said_is_of_the_rows_that_the_weight_came_with(method: Method, name: str):
    solution = method.solve(WEIGHT, parse_scheme(name), stats=WEIGHED)
    error = (WEIGHT.double() - solution.reconstruct().double()).norm() / WEIGHT.double().norm()
    assert solution.relative_error == pytest.approx(error.item(), rel=1e-5)
    told = solution.metrics["output_error"]
    assert told == pytest.approx(output_error(X, WEIGHT, solution), rel=1e-4)


def test_a_prepared_weight_is_solved_as_the_weight_itself():
    scheme = parse_scheme("int4-a16+w8a8-r8")
    method = LoRaQ.at("fast")
    prepared = method.prepare(WEIGHT, scheme, WEIGHED)
    assert same_bytes(
        method.solve(prepared, scheme, stats=WEIGHED), method.solve(WEIGHT, scheme, stats=WEIGHED)
    )
    assert torch.equal(WEIGHT, dit_like(64, 96))


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (LoRaQ.at("fast"), "nvfp4-a4+w8a8-r8"),
        (LoRaQ.at("fast"), "int4-a16+fp16-r8"),
        (GPTQ(), "int4-a16"),
        (RTN(), "int4-a16"),
        (SVDQuant(rounds=5), "int4-a16+w8a8-r8"),
    ],
    ids=repr,
)
def test_formats_and_methods_that_cannot_use_it_give_the_same_bytes(method: Method, name: str):
    scheme = parse_scheme(name)
    plain, weighed = (method.solve(WEIGHT, scheme, stats=s) for s in (PLAIN, WEIGHED))
    assert same_bytes(plain, weighed)


def test_outputs_that_count_alike_give_the_same_bytes():
    scheme = parse_scheme("int4-a16+w8a8-r8")
    alike = replace(PLAIN, output_sensitivity=torch.full((64,), 3.0))
    plain, weighed = (LoRaQ.at("fast").solve(WEIGHT, scheme, stats=s) for s in (PLAIN, alike))
    assert same_bytes(plain, weighed)


def test_a_weight_at_the_end_of_fp32_takes_outputs_alike():
    scheme = parse_scheme("int4-a16+w8a8-r8")
    huge = (WEIGHT.double() * 2.0**124).float()
    plain, weighed = (LoRaQ.at("fast").solve(huge, scheme, stats=s) for s in (PLAIN, WEIGHED))
    assert same_bytes(plain, weighed)


def test_sensitivities_of_another_layer_are_refused():
    other = replace(PLAIN, output_sensitivity=torch.ones(32))
    with pytest.raises(CalibrationError, match="sensitivities of 32 outputs, the weight has 64"):
        LoRaQ().solve(WEIGHT, parse_scheme("int4-a16+w8a8-r8"), stats=other)


@pytest.mark.parametrize(
    ("sensitivity", "exponents"),
    [
        # 2^4, 2^8, 2^12 to the power of a quarter, around their mean.
        ([16.0, 256.0, 4096.0], [-1, 0, 1]),
        ([0.0, 0.0], [0, 0]),
        # What hardly counts counts as a ten-thousandth of the mean: (5e-5)^¼ is 2^-3.6.
        ([0.0, 1.0], [-2, 2]),
    ],
)
def test_rows_are_multiplied_by_powers_of_two(sensitivity: list[float], exponents: list[int]):
    found: Tensor = choose_row_exponents(torch.tensor(sensitivity))
    assert found.tolist() == exponents
