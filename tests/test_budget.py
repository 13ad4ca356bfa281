"""Budgets: how they are written, and the rank that they buy."""

from dataclasses import replace

import pytest

from loraq.budget import DEFAULT_BUDGET, Budget, with_rank
from loraq.errors import SchemeError
from loraq.scheme import Branch, Scheme

BRANCH_FORMATS = ["bf16", "fp16", "int8", "int4", "mxint8", "mxint6", "mxint4"]
BRANCH_FORMATS += ["mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", "nvfp4"]
SHAPES = [(1152, 1152), (4608, 1152), (192, 192)]


def with_branch_rank(scheme: Scheme, rank: int) -> Scheme:
    assert scheme.branch is not None
    return replace(scheme, branch=replace(scheme.branch, rank=rank))


def rank_of(scheme: Scheme) -> int:
    assert scheme.branch is not None
    return scheme.branch.rank


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight", BRANCH_FORMATS)
def test_a_branch_fills_the_bytes_of_a_16_bit_one_and_not_more(weight, shape):
    scheme = with_rank(Scheme("mxfp4", "mxfp4", Branch(0, weight, "mxint8")), shape)
    allowed = Branch(32).nbytes(shape)
    assert scheme.branch is not None
    assert scheme.branch.nbytes(shape) <= allowed
    rank = rank_of(scheme)
    assert rank == min(shape) or replace(scheme.branch, rank=rank + 1).nbytes(shape) > allowed
    assert scheme == with_branch_rank(Scheme("mxfp4", "mxfp4", Branch(0, weight, "mxint8")), rank)


@pytest.mark.parametrize(
    ("weight", "rank"), [("bf16", 32), ("mxint8", 62), ("mxfp6_e2m3", 81), ("mxfp4", 120)]
)
def test_ranks_at_width_1152_count_the_scales(weight, rank):
    # 64, 85 and 128 if they did not.
    assert rank_of(with_rank(Scheme("int4", branch=Branch(0, weight)), (1152, 1152))) == rank


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight", BRANCH_FORMATS)
@pytest.mark.parametrize("bits", [4.75, 5.25])
def test_a_layer_fills_its_bits_per_weight_and_not_more(weight, shape, bits):
    scheme = with_rank(
        Scheme("mxfp4", branch=Branch(0, weight)), shape, Budget(bits_per_weight=bits)
    )
    allowed = bits * shape[0] * shape[1] / 8
    assert scheme.nbytes(shape) <= allowed
    rank = rank_of(scheme)
    assert rank == min(shape) or with_branch_rank(scheme, rank + 1).nbytes(shape) > allowed


def test_a_rank_that_is_given_and_a_missing_branch_stay():
    for scheme in (Scheme("int4"), Scheme("int4", branch=Branch(7, "mxint8"))):
        assert with_rank(scheme, (64, 64)) is scheme


def test_the_rank_never_exceeds_the_smaller_side():
    assert (
        rank_of(with_rank(Scheme("int4", branch=Branch(0)), (16, 4096), Budget(rank_16bit=1000)))
        == 16
    )


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("5.25", Budget(bits_per_weight=5.25)),
        (5.25, Budget(bits_per_weight=5.25)),
        (5, Budget(bits_per_weight=5.0)),
        ("r16=32", Budget(rank_16bit=32)),
        (" r16=5 ", Budget(rank_16bit=5)),
        (DEFAULT_BUDGET, DEFAULT_BUDGET),
    ],
)
def test_a_budget_is_read_from_bits_or_from_a_16_bit_rank(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("budget", [Budget(bits_per_weight=5.25), Budget(rank_16bit=32)], ids=str)
def test_a_budget_is_read_back_from_its_own_text(budget):
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text",
    ["", "much", "r16", "r16=", "r16=0", "r16=-3", "r16=2.5", "r8=32", "0", "-5", "nan", "inf"],
)
def test_what_is_neither_is_an_error_that_shows_both_forms(text):
    with pytest.raises(SchemeError, match=rf"Cannot read the budget '{text}'.*'5.25'.*'r16=32'"):
        Budget.parse(text)


def test_a_budget_below_rank_one_says_what_it_takes():
    scheme = Scheme("int4", branch=Branch(0))
    needed = r"4\.1 leaves 0 bytes .*1152×1152 .*'int4'.* rank 1 in 'bf16' it takes 4\.28 bits"
    needed += r" per weight.*Raise"
    with pytest.raises(SchemeError, match=needed):
        with_rank(scheme, (1152, 1152), Budget(bits_per_weight=4.1))
    assert rank_of(with_rank(scheme, (1152, 1152), Budget(bits_per_weight=4.28))) == 1
