"""Matrices with a stated property, for benchmarks and tests: fp32, fixed by a seed."""

import torch
from torch import Tensor


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    """Independent standard normal values: nothing low-rank, no outliers."""
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(m: int, n: int, seed: int = 0, degrees: int = 4) -> Tensor:
    """Student-t values: single values far outside, as in activations."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(m, n, generator=generator)
    chi_square = torch.randn(degrees, m, n, generator=generator).square().sum(0)
    return normal / (chi_square / degrees).sqrt()


def outlier_columns(m: int, n: int, seed: int = 0, factor: float = 30.0) -> Tensor:
    """Standard normal values, with every 16th column (the first one included) times `factor`."""
    x = gaussian(m, n, seed)
    x[:, ::16] *= factor
    return x


def low_rank(m: int, n: int, rank: int, seed: int = 0) -> Tensor:
    """A product of two standard normal factors: only `rank` singular values are not zero."""
    return gaussian(m, rank, seed) @ gaussian(rank, n, seed + 1)


def zeros(m: int, n: int) -> Tensor:
    """Nothing but zeros."""
    return torch.zeros(m, n)


def tiny(m: int, n: int, seed: int = 0) -> Tensor:
    """Normal values of size 1e-30: far below every weight, still normal fp32 numbers."""
    return gaussian(m, n, seed) * 1e-30


def huge(m: int, n: int, seed: int = 0) -> Tensor:
    """Normal values of size 1e30: their squares overflow fp32."""
    return gaussian(m, n, seed) * 1e30


def dit_like(m: int, n: int, seed: int = 0) -> Tensor:
    """Look-alike of a diffusion transformer's weight.

    A unit Gaussian bulk plus singular values 3 (√m + √n) k^-0.7; rows times exp(0.25 N), columns
    times exp(0.30 N), 0.5 % of the columns times another 3 to 8; all times 0.02.
    """
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    left, _ = torch.linalg.qr(torch.randn(m, k, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(n, k, generator=generator))
    spectrum = 3 * (m**0.5 + n**0.5) * torch.arange(1, k + 1) ** -0.7
    x = torch.randn(m, n, generator=generator) + (left * spectrum) @ right.T
    x *= torch.exp(0.25 * torch.randn(m, 1, generator=generator))
    x *= torch.exp(0.30 * torch.randn(1, n, generator=generator))
    chosen = torch.randperm(n, generator=generator)[: max(1, round(0.005 * n))]
    x[:, chosen] *= 3 + 5 * torch.rand(len(chosen), generator=generator)
    return x * 0.02
