"""QERA: its branch is the optimum of the weighted problem."""

import pytest
import torch
from correlated_inputs import correlated, output_error, stats_of

from benchmarks.worlds.matrices import dit_like, gaussian
from loraq.errors import CalibrationError, SchemeError
from loraq.methods import LQER, QERA
from loraq.methods.qera import weighted_svd
from loraq.scheme import Branch, Scheme
from loraq.stats import ActivationStats


def price(error: torch.Tensor, product: torch.Tensor, moment: torch.Tensor) -> float:
    left = (error - product).double()
    return float(((left @ moment.double()) * left).sum())


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_the_branch_is_the_closed_form_of_the_paper(rank):
    # Theorem 1 with the symmetric root, by the eigendecomposition; ours goes by Cholesky.
    error, moment = gaussian(20, 12), stats_of(correlated(500, 12)).second_moment
    values, vectors = torch.linalg.eigh(moment.double())
    root = (vectors * values.sqrt()) @ vectors.mT
    left, singular, right = torch.linalg.svd(error.double() @ root, full_matrices=False)
    expected = (left[:, :rank] * singular[:rank]) @ right[:rank] @ torch.linalg.inv(root)
    up, down = weighted_svd(error, moment, rank, damping=0.0, seed=0)
    assert torch.allclose((up @ down).double(), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("full", [True, False])
def test_no_other_branch_of_this_rank_is_better(full):
    error, rank = gaussian(20, 12), 3
    moment = stats_of(correlated(500, 12)).second_moment
    moment = moment if full else torch.diag(moment.diagonal())
    up, down = weighted_svd(error, moment if full else moment.diagonal(), rank, damping=0.0, seed=0)
    best = price(error, up @ down, moment)
    # A generic optimizer from ten random starts and from ours finds nothing below.
    for start in range(10):
        a = (up + 0.1 * gaussian(20, rank, start)).double().contiguous().requires_grad_()
        b = (down + 0.1 * gaussian(rank, 12, start + 50)).double().contiguous().requires_grad_()
        optimizer = torch.optim.LBFGS([a, b], max_iter=100, line_search_fn="strong_wolfe")

        def closure(a=a, b=b, optimizer=optimizer):
            optimizer.zero_grad()
            left = error.double() - a @ b
            loss = ((left @ moment.double()) * left).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found = price(error, (a @ b).detach(), moment)
        assert found >= best * (1 - 1e-6)
    plain = torch.linalg.svd(error)
    assert best < price(error, (plain.U[:, :rank] * plain.S[:rank]) @ plain.Vh[:rank], moment)


def test_white_inputs_make_it_lqer():
    weight, scheme = dit_like(24, 64), Scheme("mxfp4", branch=Branch(6))
    stats = ActivationStats(1, torch.eye(64))
    white = LQER().solve(weight, scheme).reconstruct()
    for method in (QERA(), QERA(exact=False)):
        assert torch.allclose(
            method.solve(weight, scheme, stats=stats).reconstruct(),
            white,
            atol=1e-3 * white.abs().max(),
        )


@pytest.mark.parametrize("branch", ["bf16", "mxint8"])
@pytest.mark.parametrize("rotation", [0, 32])
def test_exact_beats_diagonal_beats_none_on_correlated_inputs(branch, rotation):
    weight, x = dit_like(64, 96), correlated(2000, 96)
    scheme = Scheme("mxfp4", "mxfp4", Branch(8, branch), rotation)
    exact, diagonal, none = (
        output_error(x, weight, method.solve(weight, scheme, stats=stats_of(x)))
        for method in (QERA(), QERA(exact=False), LQER())
    )
    assert exact < 0.95 * diagonal
    assert exact < 0.9 * none
    if not rotation:
        assert diagonal < none


def test_the_output_error_it_tells_is_that_of_the_inputs():
    weight, x = dit_like(32, 64), correlated(800, 64)
    scheme = Scheme("int4", branch=Branch(4, "mxint8"))
    solution = QERA().solve(weight, scheme, stats=stats_of(x))
    assert solution.metrics["output_error"] == pytest.approx(
        output_error(x, weight, solution), rel=1e-3
    )


def test_mean_squares_are_enough_for_the_diagonal_form():
    weight, x = dit_like(32, 64), correlated(800, 64)
    scheme = Scheme("mxfp4", branch=Branch(4))
    one, other = (
        QERA(exact=False).solve(weight, scheme, stats=stats_of(x, full=full))
        for full in (True, False)
    )
    assert torch.equal(one.packed.branch.proj_down.packed, other.packed.branch.proj_down.packed)
    with pytest.raises(CalibrationError, match="'qera' needs full second moments"):
        QERA().solve(weight, scheme, stats=stats_of(x, full=False))


@pytest.mark.parametrize("exact", [True, False])
def test_dead_channels_and_few_tokens_are_no_problem(exact):
    weight, x = dit_like(32, 64), correlated(10, 64)
    x[:, 7] = 0
    solution = QERA(exact=exact).solve(
        weight, Scheme("mxfp4", branch=Branch(4, "mxint8")), stats=stats_of(x)
    )
    assert solution.reconstruct().isfinite().all()
    assert solution.metrics["output_error"] < 0.1
    assert solution.relative_error < 1


def test_statistics_and_a_branch_are_required():
    with pytest.raises(CalibrationError, match="Method 'qera' needs activation statistics"):
        QERA().solve(dit_like(24, 64), Scheme("mxfp4", branch=Branch(4)))
    with pytest.raises(SchemeError, match="fits a low-rank branch"):
        QERA().solve(dit_like(24, 64), Scheme("mxfp4"), stats=stats_of(correlated(50, 64)))
