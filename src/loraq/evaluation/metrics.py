"""This file holds the numbers we judge approximations by, as pure functions of tensors.

All sums run in float64, so a metric never adds an error of its own.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def relative_error(reference: Float[Tensor, "*shape"], approximation: Float[Tensor, "*shape"]) -> float:
    """Return ‖reference − approximation‖ / ‖reference‖ in the Frobenius norm, without unit.

    An all-zero reference gives 0 when the approximation is equal and infinity otherwise.
    """
    exact = reference.double()
    error = (exact - approximation.double()).norm().item()
    if error == 0:
        return 0.0
    size = exact.norm().item()
    return error / size if size > 0 else math.inf


def sqnr_db(reference: Float[Tensor, "*shape"], approximation: Float[Tensor, "*shape"]) -> float:
    """Return the signal-to-quantization-noise ratio in dB, −20 log10 of the relative error.

    Equal tensors give infinity.
    """
    error = relative_error(reference, approximation)
    return -20 * math.log10(error) if error > 0 else math.inf


def psnr_db(
    reference: Float[Tensor, "batch *image"], image: Float[Tensor, "batch *image"], data_range: float
) -> Float[Tensor, " batch"]:
    """Return the peak signal-to-noise ratio of each image in dB.

    Args:
        reference: exact images.
        image: images to compare, in the same order.
        data_range: largest minus smallest possible pixel, 2 for images in [-1, 1].

    Returns:
        One float64 value for each image; equal images give infinity.
    """
    mean_square = (reference.double() - image.double()).flatten(start_dim=1).square().mean(dim=1)
    return 10 * torch.log10(data_range**2 / mean_square)


def frechet_distance(features_a: Float[Tensor, "count_a width"], features_b: Float[Tensor, "count_b width"]) -> float:
    """Return the squared Fréchet distance of the Gaussians fitted to two sets of features.

    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½), with roots through symmetric eigendecompositions, so rank
    deficient covariances are fine. It is biased upwards for few samples: compare sets of equal size only.

    Args:
        features_a: one row for each sample, at least two rows.
        features_b: the other set, at least two rows.
    """
    a, b = features_a.double(), features_b.double()
    covariance_a, covariance_b = torch.atleast_2d(torch.cov(a.T)), torch.atleast_2d(torch.cov(b.T))
    root_a = _symmetric_root(covariance_a)
    cross = _symmetric_root(root_a @ covariance_b @ root_a)
    distance = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    distance = distance + covariance_a.trace() + covariance_b.trace() - 2 * cross.trace()
    return max(distance.item(), 0.0)


def _symmetric_root(matrix: Tensor) -> Tensor:
    """Square root of a positive semidefinite matrix; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
