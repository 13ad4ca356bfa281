"""LQER: the branch is the truncated SVD of the rounding error."""

import pytest
import torch

from benchmarks.worlds.matrices import dit_like, gaussian, outlier_columns
from loraq.methods import LQER, RTN
from loraq.scheme import Branch, Scheme

FAMILIES = {"dit_like": dit_like, "gaussian": gaussian, "outliers": outlier_columns}
each_family = pytest.mark.parametrize("matrix", FAMILIES.values(), ids=FAMILIES.keys())
each_main = pytest.mark.parametrize("main", ["int4", "mxfp4", "nvfp4", "mxint4"])


@each_main
@each_family
def test_more_rank_is_never_worse_with_a_16_bit_branch(matrix, main):
    weight = matrix(64, 96)
    errors = [
        LQER().solve(weight, Scheme(main, branch=Branch(rank))).relative_error
        for rank in (1, 4, 16, 48, 64)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] <= RTN().solve(weight, Scheme(main)).relative_error


@each_main
def test_full_rank_in_16_bits_leaves_nearly_no_error(main):
    solution = LQER().solve(dit_like(64, 96), Scheme(main, branch=Branch(64)))
    assert solution.relative_error < 1e-3


@each_main
@pytest.mark.parametrize("rule", [None, "search"])
def test_the_main_weight_is_the_one_of_round_to_nearest(main, rule):
    weight = dit_like(64, 96)
    solution = LQER(scale_rule=rule).solve(weight, Scheme(main, branch=Branch(8, "mxint8")))
    plain = RTN(scale_rule=rule).solve(weight, Scheme(main))
    assert torch.equal(solution.packed.main.packed, plain.packed.main.packed)
    assert solution.relative_error < plain.relative_error


def test_the_branch_is_the_best_approximation_of_the_error():
    weight = dit_like(64, 96)
    solution = LQER().solve(weight, Scheme("int4", branch=Branch(8)))
    error = weight - solution.packed.main.dequantize()
    left, values, right = torch.linalg.svd(error.double(), full_matrices=False)
    best = ((left[:, :8] * values[:8]) @ right[:8]).float()
    assert solution.packed.branch is not None
    torch.testing.assert_close(
        solution.packed.branch.reconstruct(), best, rtol=0, atol=0.01 * float(best.abs().max())
    )
