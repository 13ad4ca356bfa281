"""SVDQuant: the branch is the truncated SVD of the weight, one-shot or alternated with rounding."""

import pytest
import torch

from benchmarks.worlds.matrices import dit_like, gaussian, outlier_columns, zeros
from loraq.formats import get_format
from loraq.methods import SVDQuant
from loraq.scheme import Branch, Scheme

FAMILIES = {"dit_like": dit_like, "gaussian": gaussian, "outliers": outlier_columns}
each_family = pytest.mark.parametrize("matrix", FAMILIES.values(), ids=FAMILIES.keys())
each_main = pytest.mark.parametrize("main", ["int4", "mxfp4", "nvfp4", "mxint4"])
each_branch = pytest.mark.parametrize("branch", ["bf16", "mxint8", "mxfp6_e2m3", "mxfp4"])
each_rule = pytest.mark.parametrize("rule", [None, "search"])


@each_main
def test_full_rank_in_16_bits_leaves_nearly_no_error(main):
    solution = SVDQuant().solve(dit_like(64, 96), Scheme(main, branch=Branch(64)))
    assert solution.relative_error < 1e-3


@each_rule
@each_main
@each_family
def test_alternation_is_never_worse_than_one_shot(matrix, main, rule):
    weight = matrix(64, 96)
    for branch in ("bf16", "mxint8", "mxfp4"):
        scheme = Scheme(main, branch=Branch(8, branch))
        one_shot = SVDQuant(scale_rule=rule).solve(weight, scheme).relative_error
        alternated = SVDQuant(rounds=8, scale_rule=rule).solve(weight, scheme).relative_error
        assert alternated <= one_shot * (1 + 1e-6)


@each_main
def test_alternation_gains_where_there_is_something_to_gain(main):
    weight, scheme = dit_like(96, 160), Scheme(main, branch=Branch(8))
    one_shot = SVDQuant().solve(weight, scheme).relative_error
    assert SVDQuant(rounds=30).solve(weight, scheme).relative_error < 0.97 * one_shot


@each_main
def test_searched_scales_are_better_than_direct_ones(main):
    weight, scheme = dit_like(96, 160), Scheme(main, branch=Branch(8))
    direct = SVDQuant(scale_rule=None).solve(weight, scheme).relative_error
    assert SVDQuant().solve(weight, scheme).relative_error < direct


@each_rule
@each_main
def test_one_shot_is_the_textbook_computation(main, rule):
    weight, fmt = dit_like(96, 160), get_format(main)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    branch = left[:, :8].bfloat16().float() @ (values[:8, None] * right[:8]).bfloat16().float()
    residual = weight - branch
    expected = torch.linalg.vector_norm(
        residual - fmt.round(residual, rule)
    ) / torch.linalg.vector_norm(weight)
    solution = SVDQuant(scale_rule=rule).solve(weight, Scheme(main, branch=Branch(8)))
    assert solution.relative_error == pytest.approx(expected.item(), rel=0.01)


@each_branch
@each_main
def test_the_main_weight_absorbs_the_rounding_of_the_branch(main, branch):
    weight, fmt = dit_like(64, 96), get_format(main)
    for rounds in (1, 10):
        solution = SVDQuant(rounds=rounds).solve(weight, Scheme(main, branch=Branch(8, branch)))
        assert solution.packed.branch is not None
        expected = fmt.quantize(weight - solution.packed.branch.reconstruct(), "search")
        assert torch.equal(solution.packed.main.packed, expected.packed)
        assert solution.packed.main.scale is not None
        assert torch.equal(solution.packed.main.scale, expected.scale)


def test_the_alternation_stops_when_nothing_is_gained():
    method = SVDQuant(rounds=100, patience=3)
    assert method.solve(zeros(32, 64), Scheme("int4", branch=Branch(4))).metrics["rounds"] == 4
    assert method.solve(dit_like(64, 96), Scheme("int4", branch=Branch(8))).metrics["rounds"] < 100
    assert (
        SVDQuant(rounds=5)
        .solve(dit_like(64, 96), Scheme("int4", branch=Branch(8)))
        .metrics["rounds"]
        == 5
    )
