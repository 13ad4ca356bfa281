import shutil

import pytest
import torch
from torch import nn

import loraq
from loraq.errors import SchemeError
from loraq.nn import QuantizedLinear
from loraq.scheme import Branch, Scheme
from loraq.transforms import block_side, rotate, signed_hadamard, unrotate


@pytest.mark.parametrize("side", [2, 8, 32, 1024])
def test_the_matrix_is_orthogonal_and_its_entries_have_one_magnitude(side):
    matrix = signed_hadamard(side).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(side).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, side**-0.5))


@pytest.mark.parametrize("side", [4, 16, 64, 256])
def test_a_block_of_equal_values_is_spread_evenly(side):
    magnitudes = rotate(torch.ones(side), side).abs()
    torch.testing.assert_close(magnitudes, torch.ones(side))


@pytest.mark.parametrize(
    ("n", "side", "found"), [(192, 64, 64), (96, 64, 32), (2240, 128, 64), (85, 32, 1), (64, 0, 1)]
)
def test_blocks_are_as_large_as_the_width_allows(n, side, found):
    assert block_side(n, side) == found


@pytest.mark.parametrize("n", [32, 96, 85])
def test_unrotate_inverts(n):
    x = torch.randn(3, 5, n)
    torch.testing.assert_close(unrotate(rotate(x, 32), 32), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotate(x, 32).norm(dim=-1), x.norm(dim=-1))


def test_only_blocks_mix():
    x = torch.zeros(1, 96)
    x[0, 40] = 1
    assert rotate(x, 32).nonzero()[:, 1].tolist() == list(range(32, 64))


def test_no_rotation_is_the_same_tensor():
    x = torch.randn(4, 64)
    assert rotate(x, 0) is x


def test_the_input_keeps_its_dtype():
    assert rotate(torch.randn(2, 64, dtype=torch.bfloat16), 64).dtype == torch.bfloat16


def test_a_gradient_is_rotated_back():
    x = torch.randn(2, 64, dtype=torch.double).float().requires_grad_()
    g = torch.randn(2, 64)
    rotate(x, 16).backward(g)
    torch.testing.assert_close(x.grad, unrotate(g, 16))


@pytest.mark.parametrize("rotation", [3, 48, 1, 2048, -2])
def test_other_sides_are_refused(rotation):
    with pytest.raises(SchemeError, match="power of two"):
        Scheme("mxfp4", rotation=rotation)


@pytest.mark.parametrize("method", ["rtn", "lqer", "svdquant", "loraq"])
def test_every_method_solves_the_rotated_weight_and_reconstructs_the_weight_itself(method):
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    scheme = Scheme("mxfp4", branch=None if method == "rtn" else Branch(8, "mxint8"), rotation=32)
    solution = loraq.quantize_weight(weight, scheme, method=method)
    error = ((weight - solution.reconstruct()).norm() / weight.norm()).item()
    assert error == pytest.approx(solution.relative_error, rel=1e-4)
    assert error < 0.2


@pytest.mark.parametrize("backend", ["reference", "resident", "low_memory"])
def test_a_rotated_layer_computes_with_its_effective_weight(backend):
    weight, bias, x = torch.randn(48, 96), torch.randn(48), torch.randn(7, 96)
    scheme = Scheme("mxint8", branch=Branch(8, "mxint8"), rotation=32)
    layer = QuantizedLinear.from_packed(loraq.quantize_weight(weight, scheme).packed, bias)
    layer.backend = backend
    torch.testing.assert_close(layer(x), x @ layer.reconstruct().T + bias, atol=1e-4, rtol=0)


def test_a_rotation_helps_four_bit_activations_with_an_outlier_channel():
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(64, 128, generator=generator),
        torch.randn(256, 128, generator=generator),
    )
    x[:, 5] *= 30
    errors = []
    for name in ("mxint4-a4+w8a8-r16-h0", "mxint4-a4+w8a8-r16-h32"):
        layer = QuantizedLinear.from_packed(loraq.quantize_weight(weight, name).packed)
        layer.ask_activations("stored", simulate=True)
        errors.append(((layer(x) - x @ weight.T).norm() / (x @ weight.T).norm()).item())
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's own compiler
def test_a_rotated_layer_compiles_without_a_break():
    layer = QuantizedLinear.from_packed(
        loraq.quantize_weight(torch.randn(32, 64), "mxfp4-a4+w8a8-r8-h32").packed
    )
    x = torch.randn(5, 64)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_rotation_survives_the_disk(tmp_path):
    model = nn.Sequential(nn.Linear(64, 48))
    loraq.quantize_(model, "mxfp4-a4+w8a8-r8-h32", progress=False)
    loraq.save(model, tmp_path / "saved")
    fresh = nn.Sequential(nn.Linear(64, 48))
    loraq.load_into(fresh, tmp_path / "saved")
    x = torch.randn(3, 64)
    assert fresh[0].scheme.rotation == 32
    assert torch.equal(fresh(x), model(x))
