"""Truncated SVD against the full one, and the factored forms."""

import pytest
import torch

from benchmarks.worlds.matrices import (
    dit_like,
    gaussian,
    heavy_tailed,
    low_rank,
    outlier_columns,
    zeros,
)
from loraq.errors import SchemeError
from loraq.linalg import damped_cholesky, inverse_of_lower, svd_of_product, truncated_svd

FAMILIES = {
    "dit_like": dit_like,
    "gaussian": gaussian,
    "heavy_tailed": heavy_tailed,
    "outliers": outlier_columns,
}
each_family = pytest.mark.parametrize("matrix", FAMILIES.values(), ids=FAMILIES.keys())


def remaining(matrix: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    return torch.linalg.vector_norm(matrix - up @ down).item()


def least(matrix: torch.Tensor, rank: int) -> float:
    """What the best matrix of a rank leaves over, by the full decomposition in double precision."""
    return torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt().item()


def assert_orthonormal(columns: torch.Tensor) -> None:
    torch.testing.assert_close(columns.T @ columns, torch.eye(columns.shape[1]), rtol=0, atol=2e-5)


@each_family
@pytest.mark.parametrize(
    ("shape", "rank"), [((256, 256), 8), ((160, 480), 16), ((480, 160), 32)], ids=str
)
def test_truncation_leaves_hardly_more_than_the_best_matrix_of_its_rank(matrix, shape, rank):
    weight = matrix(*shape)
    svd = truncated_svd(weight, rank, seed=0)
    assert remaining(weight, *svd.to_canonical()) < 1.005 * least(weight, rank)
    assert_orthonormal(svd.left)
    assert_orthonormal(svd.right.T)
    assert (svd.values.diff() <= 0).all()


def test_more_iterations_are_better():
    weight = gaussian(256, 256)  # no gap in the spectrum: the hardest case
    errors = [
        remaining(weight, *truncated_svd(weight, 16, seed=0, iterations=n).to_canonical())
        for n in (0, 1, 8)
    ]
    assert errors[2] < errors[1] < errors[0]


def test_directions_of_an_earlier_call_save_iterations():
    weight = gaussian(256, 256)
    start = truncated_svd(weight, 16, seed=0).right.mT
    cold = truncated_svd(weight, 16, seed=1, iterations=1)
    warm = truncated_svd(weight, 16, seed=1, iterations=1, start=start)
    assert remaining(weight, *warm.to_canonical()) < remaining(weight, *cold.to_canonical())
    assert remaining(weight, *warm.to_canonical()) < 1.005 * least(weight, 16)


@pytest.mark.parametrize(
    ("shape", "rank"), [((48, 96), 8), ((7, 5), 5), ((1, 64), 1), ((64, 1), 1)], ids=str
)
def test_a_small_matrix_is_decomposed_exactly(shape, rank):
    weight = gaussian(*shape)
    assert (
        remaining(weight, *truncated_svd(weight, rank, seed=0).to_canonical())
        <= 1e-5 + least(weight, rank) * 1.00001
    )


def test_a_matrix_of_low_rank_is_recovered():
    weight = low_rank(200, 300, 6)
    for rank in (6, 12):  # twelve: half of the directions lead nowhere
        svd = truncated_svd(weight, rank, seed=0)
        assert remaining(weight, *svd.to_canonical()) < 1e-5 * torch.linalg.vector_norm(weight)
        assert all(part.isfinite().all() for part in (svd.left, svd.values, svd.right))


@pytest.mark.parametrize("shape", [(48, 96), (200, 300)], ids=str)
def test_a_zero_matrix_has_finite_factors(shape):
    svd = truncated_svd(zeros(*shape), 4, seed=0)
    assert not svd.values.any()
    assert all(factor.isfinite().all() for factor in (*svd.to_balanced(), *svd.to_canonical()))


def test_the_seed_decides_every_bit():
    weight = dit_like(200, 300)
    one, same, other = (truncated_svd(weight, 8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.left, same.left)
    assert torch.equal(one.values, same.values)
    assert torch.equal(one.right, same.right)
    assert not torch.equal(one.left, other.left)


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    truncated_svd(gaussian(200, 300), 8, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_both_factored_forms_have_one_product():
    svd = truncated_svd(dit_like(96, 128), 8, seed=0)
    balanced, canonical = svd.to_balanced(), svd.to_canonical()
    torch.testing.assert_close(balanced[0] @ balanced[1], canonical[0] @ canonical[1])
    torch.testing.assert_close(balanced[0].norm(dim=0), balanced[1].norm(dim=1))
    assert_orthonormal(canonical[0])


@pytest.mark.parametrize(
    ("shape", "rank"), [((96, 128), 8), ((128, 96), 96), ((5, 7), 1), ((64, 1), 1)], ids=str
)
def test_the_svd_of_a_product_is_exact(shape, rank):
    up, down = gaussian(shape[0], rank), gaussian(rank, shape[1], seed=1)
    svd = svd_of_product(up, down)
    product = up @ down
    torch.testing.assert_close(
        (svd.left * svd.values) @ svd.right, product, rtol=0, atol=1e-5 * float(product.norm())
    )
    expected = torch.linalg.svdvals(product.double())[:rank].float()
    torch.testing.assert_close(svd.values, expected, rtol=0, atol=1e-5 * float(expected[0]))
    assert_orthonormal(svd.left)
    assert_orthonormal(svd.right.T)


def test_the_svd_of_a_product_may_lack_rank():
    up, down = gaussian(40, 6), gaussian(6, 50, seed=1)
    up[:, 3], down[5] = 0, 0
    svd = svd_of_product(up, down)
    torch.testing.assert_close((svd.left * svd.values) @ svd.right, up @ down, rtol=0, atol=1e-4)
    assert (svd.values[4:] < 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_damped_factor_is_that_of_the_damped_moment(dtype):
    x = gaussian(50, 12)
    moment = (x.mT @ x / 50).to(dtype)
    before = moment.clone()
    factor = damped_cholesky(moment, 0.1)
    damped = moment.double() + 0.1 * moment.double().diagonal().mean() * torch.eye(12)
    assert torch.allclose(factor @ factor.mT, damped, rtol=1e-9)
    assert torch.equal(factor, factor.tril())
    assert torch.equal(moment, before)


def test_the_factor_of_zeros_is_the_identity():
    assert torch.equal(damped_cholesky(torch.zeros(5, 5), 0.01), torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("damping", [0.0, 1e-9, 1e-4])
def test_a_moment_that_rounding_made_indefinite_has_a_factor(damping):
    least = -1e-3 / 8
    # Its mean square is about an eighth.
    moment = torch.diag(torch.tensor([1.0, *[0.0] * 6, least]))
    factor = damped_cholesky(moment, damping)
    assert factor.isfinite().all()
    added = (factor @ factor.mT - moment.double()).diagonal()
    assert torch.allclose(added, added[:1])
    assert -least <= added[0] < 11 * -least


def test_a_negative_damping_is_refused():
    with pytest.raises(SchemeError, match=r"damping of -0\.1 is negative"):
        damped_cholesky(torch.eye(4), -0.1)


@pytest.mark.parametrize("n", [1, 512, 513, 1300])
def test_a_triangular_matrix_times_its_inverse_is_the_identity(n):
    matrix = gaussian(n, n).double().tril(-1) / n + torch.eye(n).double()
    inverse = inverse_of_lower(matrix)
    torch.testing.assert_close(matrix @ inverse, torch.eye(n).double())
    assert not inverse.triu(1).any()
