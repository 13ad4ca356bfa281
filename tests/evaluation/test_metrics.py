import math
import sys

import pytest
import torch

from loraq.errors import LoraqError
from loraq.evaluation.metrics import frechet_distance, psnr_db, relative_error, sqnr_db, ssim


def test_relative_error_of_a_hand_computed_vector():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])) == pytest.approx(
        1 / 5
    )


def test_relative_error_of_a_zero_reference_is_zero_or_infinite():
    zero = torch.zeros(2, 3)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero, zero + 1) == math.inf


def test_relative_error_of_bfloat16_tensors_sums_in_float64():
    reference = torch.ones(100_000, dtype=torch.bfloat16)
    assert relative_error(reference, reference * 1.5) == pytest.approx(0.5, rel=1e-12)


def test_sqnr_is_20_db_for_an_error_of_one_tenth():
    reference = torch.tensor([[10.0, 0.0]])
    assert sqnr_db(reference, torch.tensor([[10.0, 1.0]])) == pytest.approx(20)
    assert sqnr_db(reference, reference) == math.inf


def test_psnr_is_computed_for_each_image():
    reference = torch.zeros(3, 1, 2, 2)
    image = reference.clone()
    image[0] = 0.2  # mean square 0.04, peak 2: 10 log10(4 / 0.04) = 20 dB
    image[1, 0, 0, 0] = 2.0  # mean square 1: 10 log10(4) dB
    torch.testing.assert_close(
        psnr_db(reference, image, 2.0),
        torch.tensor([20.0, 10 * math.log10(4), math.inf]).double(),
        rtol=1e-6,
        atol=0,
    )


def test_frechet_distance_of_a_set_to_itself_is_zero(generator):
    features = torch.randn(50, 6, generator=generator)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_a_shifted_set_is_the_squared_shift(generator):
    features = torch.randn(50, 3, generator=generator)
    assert frechet_distance(features, features + torch.tensor([1.0, 2.0, 0.0])) == pytest.approx(
        5, rel=1e-5
    )


def test_frechet_distance_of_a_scaled_set_has_the_analytic_value(generator):
    features = torch.randn(50, 3, generator=generator).double()
    features -= features.mean(dim=0)
    # (Σ^½ 9Σ Σ^½)^½ = 3Σ, so the distance is tr(Σ + 9Σ − 6Σ) = 4 tr Σ
    assert frechet_distance(features, 3 * features) == pytest.approx(
        4 * features.T.cov().trace().item()
    )


def test_frechet_distance_is_symmetric_and_takes_fewer_rows_than_columns(generator):
    a, b = torch.randn(4, 8, generator=generator), torch.randn(5, 8, generator=generator) + 1
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, b) > 0


def test_frechet_distance_takes_one_column(generator):
    features = torch.randn(9, 1, generator=generator)
    assert frechet_distance(features, features + 2) == pytest.approx(4, rel=1e-5)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_ssim_is_one_for_equal_images_and_symmetric(rng):
    image = torch.rand(2, 3, 16, 20, generator=rng)
    other = torch.rand(2, 3, 16, 20, generator=rng)
    assert ssim(image, image, 1.0).tolist() == pytest.approx([1, 1])
    assert torch.allclose(ssim(image, other, 1.0), ssim(other, image, 1.0))
    assert (ssim(image, other, 1.0) < 0.2).all()


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b = 0.25, 0.75
    x, y = (torch.full((1, 1, 11, 11), value, dtype=torch.float64) for value in (a, b))
    c1 = 0.01**2
    assert ssim(x, y, 1.0).item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))


def test_ssim_does_not_depend_on_the_unit(rng):
    x, y = torch.rand(1, 3, 12, 12, generator=rng), torch.rand(1, 3, 12, 12, generator=rng)
    assert ssim(255 * x, 255 * y, 255.0).item() == pytest.approx(ssim(x, y, 1.0).item(), rel=1e-6)


def ssim_of_a_window(x, y):
    weights = [
        [math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)
    ]
    w = torch.tensor(weights, dtype=torch.float64)
    w /= w.sum()
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, cov = (
        (w * (x - mx) ** 2).sum(),
        (w * (y - my) ** 2).sum(),
        (w * (x - mx) * (y - my)).sum(),
    )
    c1, c2 = 1e-4, 9e-4
    top, bottom = (2 * mx * my + c1) * (2 * cov + c2), (mx**2 + my**2 + c1) * (vx + vy + c2)
    return (top / bottom).item()


def test_ssim_of_one_window_is_the_formula(rng):
    x, y = torch.rand(11, 11, generator=rng).double(), torch.rand(11, 11, generator=rng).double()
    found = ssim(x.view(1, 1, 11, 11), y.view(1, 1, 11, 11), 1.0).item()
    assert found == pytest.approx(ssim_of_a_window(x, y))


def test_ssim_is_the_mean_over_the_places_where_the_window_fits(rng):
    x, y = torch.rand(1, 1, 13, 14, generator=rng), torch.rand(1, 1, 13, 14, generator=rng)
    windows = [
        ssim_of_a_window(*(image[0, 0, i : i + 11, j : j + 11].double() for image in (x, y)))
        for i in range(3)
        for j in range(4)
    ]
    assert ssim(x, y, 1.0).item() == pytest.approx(sum(windows) / 12, rel=1e-9)


def symmetric_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@pytest.mark.parametrize("n_rows", [20, 200])
def test_frechet_distance_is_the_formula_with_symmetric_roots(generator, n_rows):
    mix = torch.randn(32, 32, generator=generator)
    a = torch.randn(300, 32, generator=generator) @ mix
    b = 1.1 * torch.randn(n_rows, 32, generator=generator) @ mix + 0.3
    cov_a, cov_b = a.double().T.cov(), b.double().T.cov()
    root = symmetric_root(cov_a)
    cross = symmetric_root(root @ cov_b @ root).trace()
    shift = (a.double().mean(0) - b.double().mean(0)).square().sum()
    expected = shift + cov_a.trace() + cov_b.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("metric", [lambda x: ssim(x, x, 1.0), lambda x: frechet_distance(x, x)])
def test_without_torchmetrics_the_message_names_the_extra(metric, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(LoraqError, match=r'pip install "loraq\[evaluate\]"'):
        metric(torch.zeros(1, 1, 11, 11))
