"""The numbers that approximations are judged by, as pure functions of tensors.

All sums run in float64, so a metric never adds an error of its own.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraq.evaluation.libraries import torchmetrics

#: Wang et al. 2004: pixels and standard deviation of the window of `ssim`.
_WINDOW, _SIGMA = 11, 1.5


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

    Raises:
        MissingLibraryError: torchmetrics is not installed.
    """
    _, places = torchmetrics().functional.image.structural_similarity_index_measure(
        image.double(),
        reference.double(),
        sigma=_SIGMA,
        kernel_size=_WINDOW,
        data_range=data_range,
        reduction="none",
        return_full_image=True,
    )
    border = _WINDOW // 2  # it pads images by this, and its own mean counts what it padded
    fitting: Tensor = places[..., border:-border, border:-border]
    return fitting.flatten(start_dim=1).mean(dim=1)


def frechet_distance(
    features_a: Float[Tensor, "count_a width"], features_b: Float[Tensor, "count_b width"]
) -> float:
    """Return the squared Fréchet distance of the Gaussians fitted to two sets of features.

    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), by torchmetrics; rank deficient covariances are
    fine. It is biased upwards for few samples: compare sets of equal size only.

    Args:
        features_a: one row for each sample, at least two rows.
        features_b: the other set, at least two rows.

    Raises:
        MissingLibraryError: torchmetrics is not installed.
    """
    identity = nn.Identity()
    identity.num_features = features_a.shape[1]  # type: ignore[assignment]
    metric = torchmetrics().image.fid.FrechetInceptionDistance(feature=identity)
    metric.update(features_a.double(), real=True)
    metric.update(features_b.double(), real=False)
    return max(float(metric.compute()), 0.0)  # rounding takes that of equal sets below 0
