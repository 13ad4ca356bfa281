"""Promises that every method makes, in every main format and with every kind of branch."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.worlds.matrices import dit_like, gaussian, huge, outlier_columns, tiny, zeros
from loraq.errors import FormatError, SchemeError
from loraq.methods import LQER, RTN, LoRaQ, Method, SVDQuant
from loraq.packed import LayerSolution
from loraq.scheme import Branch, Scheme

MAIN_FORMATS = ["int4", "mxfp4", "nvfp4", "mxint4"]
BRANCH_FORMATS = ["bf16", "mxint8", "mxfp6_e2m3", "mxfp4"]
WITH_BRANCH: dict[str, Method] = {
    "lqer": LQER(),
    "svdquant": SVDQuant(),
    "svdquant_x10": SVDQuant(rounds=10),
    "loraq": LoRaQ(steps=8, refine_steps=4),
}
RANK = 8
SHAPE = (48, 96)

CASES = [pytest.param(RTN(), Scheme(main), id=f"rtn-{main}") for main in MAIN_FORMATS] + [
    pytest.param(method, Scheme(main, "bf16", Branch(RANK, branch)), id=f"{name}-{main}-{branch}")
    for name, method in WITH_BRANCH.items()
    for main in MAIN_FORMATS
    for branch in BRANCH_FORMATS
]
each_case = pytest.mark.parametrize(("method", "scheme"), CASES)
#: For what `Method.solve` checks before it looks at the formats: one scheme of each method will do.
each_method = pytest.mark.parametrize(
    ("method", "scheme"),
    [
        case
        for case in CASES
        if case.id.startswith("rtn-mxfp4") or case.id.endswith("-mxfp4-mxint8")
    ],
)
each_method_with_branch = pytest.mark.parametrize(
    "method", WITH_BRANCH.values(), ids=WITH_BRANCH.keys()
)


def of_rank(scheme: Scheme, rank: int) -> Scheme:
    return replace(scheme, branch=replace(scheme.branch, rank=rank)) if scheme.branch else scheme


def stored(solution: LayerSolution) -> list[torch.Tensor]:
    parts = [solution.packed.main]
    if solution.packed.branch is not None:
        parts += [solution.packed.branch.proj_up, solution.packed.branch.proj_down]
    return [tensor for part in parts for tensor in part.tensors.values()]


def measured_error(weight: torch.Tensor, solution: LayerSolution) -> float:
    """The relative error in double precision, from the public result alone."""
    error = torch.linalg.vector_norm(weight.double() - solution.reconstruct().double())
    return (error / torch.linalg.vector_norm(weight.double())).item()


def assert_same_bytes(one: LayerSolution, other: LayerSolution) -> None:
    assert len(stored(one)) == len(stored(other))
    assert all(torch.equal(a, b) for a, b in zip(stored(one), stored(other), strict=True))
    assert one.relative_error == other.relative_error


# --- what a solution says about itself ------------------------------------------------------------


@each_case
def test_every_figure_of_a_solution_is_true(method, scheme):
    weight = dit_like(*SHAPE)
    solution = method.solve(weight, scheme)
    dense = solution.reconstruct()
    assert isinstance(method, Method)
    assert solution.packed.scheme == scheme
    assert dense.shape == weight.shape
    assert dense.dtype == torch.float32
    assert dense.isfinite().all()
    assert solution.relative_error == pytest.approx(measured_error(weight, solution), rel=1e-4)
    assert 0 < solution.relative_error < 0.2
    assert solution.sqnr_db == pytest.approx(-20 * math.log10(solution.relative_error))
    assert (
        solution.nbytes
        == scheme.nbytes(SHAPE)
        == sum(tensor.numel() for tensor in stored(solution))
    )
    assert all(tensor.dtype == torch.uint8 for tensor in stored(solution))
    assert solution.bits_per_weight == 8 * solution.nbytes / weight.numel()
    assert solution.seconds > 0


@each_case
def test_the_parts_have_the_formats_and_shapes_of_the_scheme(method, scheme):
    solution = method.solve(dit_like(*SHAPE), scheme)
    assert solution.packed.main.format == scheme.weight_format
    assert solution.packed.main.shape == SHAPE
    assert (solution.packed.branch is None) == (scheme.branch is None)
    if scheme.branch is not None and solution.packed.branch is not None:
        assert (
            solution.packed.branch.proj_up.format
            == solution.packed.branch.proj_down.format
            == scheme.branch.weight_format
        )
        assert solution.packed.branch.proj_up.shape == (SHAPE[0], RANK)
        assert solution.packed.branch.proj_down.shape == (RANK, SHAPE[1])
        assert solution.packed.branch.reconstruct().shape == SHAPE


@each_case
def test_equal_seeds_give_equal_bytes(method, scheme):
    weight = dit_like(*SHAPE)
    assert_same_bytes(method.solve(weight, scheme, seed=7), method.solve(weight, scheme, seed=7))


@each_method_with_branch
def test_equal_seeds_give_equal_bytes_where_the_decomposition_starts_at_random(method):
    # Matrices no larger than twice the subspace are decomposed exactly; this one is larger.
    weight, scheme = dit_like(96, 160), Scheme("mxfp4", "bf16", Branch(RANK, "mxint8"))
    assert_same_bytes(method.solve(weight, scheme, seed=7), method.solve(weight, scheme, seed=7))


@each_method_with_branch
def test_another_seed_gives_nearly_the_same_error(method):
    weight, scheme = dit_like(96, 160), Scheme("int4", "bf16", Branch(RANK, "mxint8"))
    errors = [method.solve(weight, scheme, seed=seed).relative_error for seed in (0, 1)]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)


# --- what goes in ---------------------------------------------------------------------------------


@each_case
def test_the_weight_is_never_modified_and_its_strides_do_not_matter(method, scheme):
    weight = dit_like(*SHAPE)
    transposed = weight.T.contiguous().T
    before = transposed.clone()
    assert not transposed.is_contiguous()
    assert_same_bytes(method.solve(transposed, scheme), method.solve(weight, scheme))
    assert torch.equal(transposed, before)
    assert torch.equal(weight, before)


@each_case
def test_a_bfloat16_weight_is_solved_as_its_fp32_values(method, scheme):
    weight = dit_like(*SHAPE).bfloat16()
    before = weight.clone()
    assert_same_bytes(method.solve(weight, scheme), method.solve(weight.float(), scheme))
    assert torch.equal(weight, before)


@each_method_with_branch
def test_other_float_dtypes_are_solved_as_their_fp32_values(method):
    scheme = Scheme("mxfp4", branch=Branch(RANK, "mxint8"))
    for dtype in (torch.float16, torch.float64):
        weight = dit_like(*SHAPE).to(dtype)
        assert_same_bytes(method.solve(weight, scheme), method.solve(weight.float(), scheme))


@each_method_with_branch
def test_a_parameter_with_a_gradient_is_solved_without_one(method):
    weight = torch.nn.Parameter(dit_like(*SHAPE))
    solution = method.solve(weight, Scheme("nvfp4", branch=Branch(RANK)))
    assert not solution.reconstruct().requires_grad
    assert weight.grad is None


@each_case
def test_a_value_that_is_not_finite_is_an_error_that_names_its_place(method, scheme):
    for bad in (math.nan, math.inf, -math.inf):
        weight = dit_like(*SHAPE)
        weight[3, 5] = bad
        with pytest.raises(FormatError, match=rf"the value at \(3, 5\) is {bad}"):
            method.solve(weight, scheme)


@each_method
def test_only_a_matrix_with_values_is_a_weight(method, scheme):
    for shape in [(96,), (2, 48, 96), (0, 96), (48, 0)]:
        with pytest.raises(SchemeError, match=r"A matrix \(out, in\) is required"):
            method.solve(torch.zeros(shape), scheme)


# --- the scheme -----------------------------------------------------------------------------------


@each_method_with_branch
def test_a_rank_above_the_smaller_side_is_an_error(method):
    with pytest.raises(SchemeError, match=r"rank 49 is larger than min.* at most 48"):
        method.solve(dit_like(*SHAPE), Scheme("int4", branch=Branch(49)))


@each_method_with_branch
def test_a_rank_that_is_still_open_is_an_error(method):
    with pytest.raises(SchemeError, match="no rank yet"):
        method.solve(dit_like(*SHAPE), Scheme("int4", branch=Branch(0)))


@each_method_with_branch
def test_a_missing_branch_is_an_error(method):
    with pytest.raises(SchemeError, match="fits a low-rank branch, but the scheme has none"):
        method.solve(dit_like(*SHAPE), Scheme("int4"))


def test_round_to_nearest_refuses_a_branch():
    with pytest.raises(SchemeError, match="'rtn' has no branch"):
        RTN().solve(dit_like(*SHAPE), Scheme("int4", branch=Branch(RANK)))


@each_method_with_branch
def test_every_rank_up_to_the_smaller_side_is_possible(method):
    weight = dit_like(24, 40)
    for rank in (1, 23, 24):
        solution = method.solve(weight, Scheme("mxfp4", branch=Branch(rank, "mxint8")))
        assert solution.relative_error == pytest.approx(measured_error(weight, solution), rel=1e-3)
        assert solution.relative_error < 0.2


@each_case
def test_odd_shapes_are_solved(method, scheme):
    wrong = {}
    for shape, rank in [((33, 85), 5), ((1, 64), 1), ((64, 1), 1), ((1, 1), 1)]:
        weight, here = gaussian(*shape), of_rank(scheme, rank)
        solution = method.solve(weight, here)
        n_bytes = sum(tensor.numel() for tensor in stored(solution))
        measured = pytest.approx(measured_error(weight, solution), rel=1e-3, abs=1e-6)
        promises = {
            "shape": solution.reconstruct().shape == shape,
            "bytes": solution.nbytes == here.nbytes(shape) == n_bytes,
            "error as measured": solution.relative_error == measured,
            "small error": solution.relative_error < 0.35,
        }
        if broken := [promise for promise, kept in promises.items() if not kept]:
            wrong[shape] = broken
    assert not wrong


# --- hard weights ---------------------------------------------------------------------------------


@each_case
def test_a_zero_weight_is_stored_exactly(method, scheme):
    solution = method.solve(zeros(*SHAPE), scheme)
    assert not solution.reconstruct().any()
    assert solution.relative_error == 0
    assert solution.sqnr_db == math.inf


@each_case
def test_tiny_and_huge_weights_are_finite_and_priced_honestly(method, scheme):
    # Their squares leave the range of fp32.
    for matrix in (tiny, huge):
        weight = matrix(*SHAPE)
        solution = method.solve(weight, scheme)
        error, measured = solution.relative_error, measured_error(weight, solution)
        assert solution.reconstruct().isfinite().all(), matrix
        assert error == pytest.approx(measured, rel=1e-3), matrix
        assert error <= 0.25, matrix


@each_case
def test_an_outlier_column_spoils_only_its_blocks(method, scheme):
    weight = dit_like(*SHAPE)
    weight[:, 40] *= 100
    solution = method.solve(weight, scheme)
    assert solution.relative_error == pytest.approx(measured_error(weight, solution), rel=1e-3)
    assert solution.relative_error < 0.15


@each_case
def test_many_outlier_columns_are_solved(method, scheme):
    weight = outlier_columns(*SHAPE)
    solution = method.solve(weight, scheme)
    assert solution.relative_error == pytest.approx(measured_error(weight, solution), rel=1e-3)
    assert solution.relative_error < 0.15


@each_case
def test_zero_rows_and_columns_stay_small(method, scheme):
    weight = dit_like(*SHAPE)
    weight[5], weight[:, 64:] = 0, 0
    solution = method.solve(weight, scheme)
    assert solution.reconstruct().isfinite().all()
    assert solution.relative_error == pytest.approx(measured_error(weight, solution), rel=1e-3)
    assert solution.relative_error < 0.2
