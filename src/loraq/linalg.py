"""Norms, truncated SVD by subspace iteration, a rotation that spreads, and a Cholesky factor."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.errors import SchemeError

#: Rows of a triangular matrix that are solved for at once.
_SOLVED_AT_ONCE = 512
#: Numbers that `as_doubles` widens at a time.
_WIDENED = 1 << 18


@dataclass(frozen=True)
class TruncatedSVD:
    """The leading singular triplets of a matrix, W ≈ left · diag(values) · right."""

    #: Orthonormal columns.
    left: Float[Tensor, "out rank"]
    #: Descending.
    values: Float[Tensor, " rank"]
    #: Orthonormal rows.
    right: Float[Tensor, "rank in"]

    def to_balanced(self) -> tuple[Tensor, Tensor]:
        """Return (up, down) that share the singular values equally."""
        root = self.values.sqrt()
        return self.left * root, root[:, None] * self.right

    def to_canonical(self) -> tuple[Tensor, Tensor]:
        """Return (up, down) with an orthonormal `up`: all singular values are in `down`."""
        return self.left, self.values[:, None] * self.right


def truncated_svd(
    matrix: Float[Tensor, "out in"],
    rank: int,
    *,
    seed: int,
    iterations: int = 8,
    start: Tensor | None = None,
) -> TruncatedSVD:
    """Return the `rank` leading singular triplets by randomized subspace iteration.

    Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4, with 16 extra directions. Eight
    iterations leave about 0.1 % more error than the best rank-r matrix on weights of transformers;
    a matrix no larger than twice the subspace is decomposed exactly.

    Args:
        matrix: fp32.
        rank: number of triplets, at most min(out, in).
        seed: of the random start.
        iterations: passes over the matrix and its transpose.
        start: (in, k) directions to begin with in place of random ones, from an earlier call.
    """
    n_out, n_in = matrix.shape
    size = min(rank + 16, n_out, n_in)
    if min(n_out, n_in) <= 2 * size:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return _cut(left, values, right, rank)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    directions = torch.randn((n_in, size), generator=generator).to(matrix.device)
    if start is not None:
        directions[:, : start.shape[1]] = start
    basis = torch.linalg.qr(matrix @ directions).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return _cut(basis @ left, values, right, rank)


def svd_of_product(up: Float[Tensor, "out rank"], down: Float[Tensor, "rank in"]) -> TruncatedSVD:
    """Return the exact SVD of `up @ down` without forming the product."""
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    left, values, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    return TruncatedSVD(q_up @ left, values, right @ q_down.mT)


def frobenius(matrix: Tensor) -> Tensor:
    """Return the Frobenius norm in double precision, which holds squares of fp32 numbers."""
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64)


def as_doubles(
    shape: tuple[int, ...], device: torch.device, fill: Callable[[Tensor], object]
) -> Tensor:
    """Return a matrix of fp32 numbers as doubles on a CPU, where `frobenius` would copy it.

    The fp32 numbers are made in the memory of the doubles, and widened there from the last one on:
    no number is overwritten before it is read. Other devices widen each number as they sum it, so
    there the fp32 matrix itself is returned.

    Args:
        shape: of the matrix.
        device: where it is.
        fill: writes the numbers into the contiguous fp32 tensor that it is given.
    """
    n = math.prod(shape)
    room = torch.empty(2 * n if device.type == "cpu" else n, dtype=torch.float32, device=device)
    fill(room[:n].view(shape))
    if len(room) == n:
        return room.view(shape)
    doubles = room.view(torch.float64)
    for start in reversed(range(0, n, _WIDENED)):
        doubles[start : start + _WIDENED] = room[start : min(start + _WIDENED, n)].double()
    return doubles.view(shape)


def relative_error(exact: Tensor, approximation: Tensor) -> float:
    """Return ‖exact − approximation‖_F / ‖exact‖_F; the absolute error if `exact` is zero."""
    return frobenius(exact - approximation).item() / (frobenius(exact).item() or 1.0)


def energy(matrix: Tensor) -> Tensor:
    """Return the squared Frobenius norm in double precision.

    On a CPU it is summed in fp32 within a row, unless that leaves fp32's range: double precision
    takes several times as long there. Elsewhere it does not, and the host must not look.
    """
    if not matrix.is_cpu:
        return frobenius(matrix).square()
    total = torch.linalg.vector_norm(matrix, dim=-1).double().square().sum(-1)
    return total if 1e-24 < total < 1e60 or not matrix.any() else frobenius(matrix).square()


def spreading_rotation(size: int, *, seed: int) -> Float[Tensor, "size size"]:
    """Return an orthogonal matrix with entries of about one size: a DCT-II with random signs.

    It is a Hadamard matrix for sizes that have none: applied to a vector with one large entry, it
    spreads it evenly.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    rows, columns = torch.arange(size).double()[:, None], torch.arange(size).double()[None]
    cosines = torch.cos(torch.pi * (rows + 0.5) * columns / size) * (2 / size) ** 0.5
    cosines[:, 0] /= 2**0.5
    return (signs * cosines).float()


def damped_cholesky(moment: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """Return the lower Cholesky factor of a moment + damping · the mean of its diagonal · I.

    Zeros count as the identity. A moment that was summed or stored in fp32 may miss being positive
    by more than a small damping: then ten times as much is added until it is.

    Args:
        moment: symmetric, positive semi-definite but for rounding; any float dtype.
        damping: share of the diagonal's mean, not negative.

    Raises:
        SchemeError: the damping is negative.
    """
    require_damping(damping)
    mean = moment.diagonal().double().mean().item()
    ridge = damping * mean if mean > 0 else 1.0
    while True:
        damped = moment.to(torch.float64, copy=True)
        damped.diagonal().add_(ridge)
        factor, failed_at = torch.linalg.cholesky_ex(damped)
        if not failed_at:
            return factor
        ridge = max(10 * ridge, 1e-7 * mean)


def inverse_of_lower(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return the inverse of a lower triangular matrix.

    By halves, [A 0; B C]⁻¹ = [A⁻¹ 0; −C⁻¹ B A⁻¹ C⁻¹]: a solution for the identity multiplies
    zeros, and takes longer for thousands of rows.
    """
    n = len(matrix)
    if n <= _SOLVED_AT_ONCE:
        eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve_triangular(matrix, eye, upper=False)
    first, second = slice(n // 2), slice(n // 2, n)
    inverse = torch.zeros_like(matrix)
    inverse[first, first] = inverse_of_lower(matrix[first, first])
    inverse[second, second] = inverse_of_lower(matrix[second, second])
    below = matrix[second, first] @ inverse[first, first]
    torch.mm(inverse[second, second], below, out=inverse[second, first]).neg_()
    return inverse


def require_damping(damping: float) -> None:
    """Raise `SchemeError` for a negative damping."""
    if damping < 0:
        raise SchemeError(f"A damping of {damping} is negative. Use 0 or more; 0.01 is usual.")


def _cut(left: Tensor, values: Tensor, right: Tensor, rank: int) -> TruncatedSVD:
    return TruncatedSVD(left[:, :rank], values[:rank], right[:rank])
