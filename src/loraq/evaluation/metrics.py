"""This file holds the numbers we judge approximations by, as pure functions of tensors.

All sums run in float64, so a metric never adds an error of its own.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def relative_error(
    reference: Float[Tensor, "*shape"], approximation: Float[Tensor, "*shape"]
) -> float:
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
    reference: Float[Tensor, "batch *image"],
    image: Float[Tensor, "batch *image"],
    data_range: float,
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


def ssim(
    reference: Float[Tensor, "batch channel height width"],
    image: Float[Tensor, "batch channel height width"],
    data_range: float,
) -> Float[Tensor, " batch"]:
    """Return the structural similarity of each image, 1 for equal ones.

    Wang et al. 2004 with its constants: a Gaussian window of 11 pixels and σ = 1.5, K = (0.01,
    0.03), the mean over the places where the window fits and over channels.

    Args:
        reference: exact images, at least 11 pixels wide and high.
        image: images to compare, in the same order.
        data_range: largest minus smallest possible pixel.

    Returns:
        One float64 value for each image.
    """
    x, y = (images.double().flatten(0, 1).unsqueeze(1) for images in (reference, image))
    offset = torch.arange(11, dtype=torch.float64, device=x.device) - 5
    window = torch.exp(-offset.square() / (2 * 1.5**2))
    window = window / window.sum()

    def mean(values: Tensor) -> Tensor:
        rows = torch.nn.functional.conv2d(values, window.view(1, 1, 1, 11))
        return torch.nn.functional.conv2d(rows, window.view(1, 1, 11, 1))

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x.square(), mean(y * y) - mean_y.square()
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).view(reference.shape[0], -1).mean(dim=1)


def frechet_distance(
    features_a: Float[Tensor, "count_a width"], features_b: Float[Tensor, "count_b width"]
) -> float:
    """Return the squared Fréchet distance of the Gaussians fitted to two sets of features.

    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½), with roots through symmetric
    eigendecompositions, so rank deficient covariances are fine. It is biased upwards for few
    samples: compare sets of equal size only.

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
