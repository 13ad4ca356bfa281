"""What LoRaQ has inside and rivals are given as options: rank-space rotation, alternation under
error feedback, the filter of activation noise. The benchmarks compare by them.
"""

from dataclasses import replace

import pytest
import torch
from correlated_inputs import correlated, output_error, run_error, stats_of
from torch import Tensor

from benchmarks.worlds.matrices import dit_like, gaussian
from loraq.methods import GPTQ, LQER, QERA, LoRaQ, SVDQuant
from loraq.methods.descent import Factors
from loraq.methods.inputs import Inputs
from loraq.packed import LayerSolution
from loraq.scheme import Branch, Scheme

SCHEME = Scheme("mxfp4", "mxint8", Branch(16, "mxint8", "mxint8", "int8"))


def intermediate_error(weight: Tensor, solution: LayerSolution, x: Tensor) -> float:
    """What rounding of the intermediate to `int8` alone adds to the branch's output."""
    branch = solution.packed.branch
    inner = x @ branch.proj_down.dequantize().mT
    rounded = SCHEME.branch.intermediate_format.for_rows().round(inner)
    up = branch.proj_up.dequantize().mT
    return (((rounded - inner) @ up).norm() / (inner @ up).norm()).item()


@pytest.mark.parametrize(
    "method", [SVDQuant(), SVDQuant(rounds=5), LQER(), GPTQ(), QERA()], ids=repr
)
def test_rotated_in_rank_space_the_weight_is_the_same_and_the_intermediate_loses_less(method):
    # A spectrum that falls steeply: the first rank direction would drown the others.
    weight, x = dit_like(64, 96), gaussian(200, 96)
    stats = stats_of(correlated(500, 96))
    plain, rotated = (
        replace(method, rotate=rotate).solve(weight, SCHEME, stats=stats)
        for rotate in (False, True)
    )
    assert rotated.relative_error == pytest.approx(plain.relative_error, rel=0.1)
    plain_loss, rotated_loss = (intermediate_error(weight, s, x) for s in (plain, rotated))
    assert rotated_loss < (1.0 if method.name in ("lqer", "qera") else 0.9) * plain_loss


def zero(factor: Tensor) -> Tensor:
    return torch.zeros_like(factor)


def test_alternation_before_the_feedback_helps_and_one_round_is_one_shot():
    weight, x = dit_like(64, 96), correlated(1000, 96)
    scheme, stats = Scheme("int4", branch=Branch(8)), stats_of(x)
    errors = [
        output_error(x, weight, GPTQ(rounds=rounds).solve(weight, scheme, stats=stats))
        for rounds in (1, 30)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("branch", [None, Branch(8)], ids=["plain", "branch"])
# Plain rounding to 8 bits leaves less of the weight than a filter does, and more of the noise.
@pytest.mark.parametrize("main", ["int4", "int6", "mxint8"])
def test_the_noise_filter_lowers_what_four_bit_activations_cost(main, branch):
    weight, x = dit_like(64, 96), correlated(1000, 96)
    scheme, stats = Scheme(main, "int4", branch), stats_of(x)
    plain, filtered = (
        run_error(weight, GPTQ(noise_filter=noise).solve(weight, scheme, stats=stats), x)
        for noise in (False, True)
    )
    assert filtered < plain


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_with_all_of_it_svdquant_is_the_candidate_that_loraq_compares_itself_with(
    seed, monkeypatch
):
    # Without results of its own, the start is the best candidate.
    monkeypatch.setattr(LoRaQ, "_refine", lambda _, __, factors, *___: Factors(*map(zero, factors)))
    monkeypatch.setattr(Inputs, "best_branch", lambda _, weight, start, seed: start)
    weight = dit_like(64, 96, seed)
    stats = stats_of(correlated(1000, 96))
    scheme = Scheme("int4", "int4", Branch(16, "mxint8", "mxint8", "int8"))
    ours = LoRaQ(steps=0, refine_steps=0).solve(weight, scheme, stats=stats)
    theirs = GPTQ(rotate=True, noise_filter=True, refits=LoRaQ.refits).solve(
        weight, scheme, stats=stats
    )
    assert ours.metrics["optimized"] == 0
    for name, tensor in ours.packed.tensors.items():
        assert torch.equal(tensor, theirs.packed.tensors[name])


def test_it_says_whether_the_optimized_branch_is_stored():
    scheme = Scheme("int4", branch=Branch(8, "mxint8", "mxint8"))
    assert LoRaQ().solve(dit_like(64, 96), scheme).metrics["optimized"] == 1
    grid = scheme.weight_format.round(gaussian(64, 96))  # nothing is left to optimize
    assert LoRaQ(steps=0, refine_steps=0).solve(grid, scheme).metrics["optimized"] == 0
