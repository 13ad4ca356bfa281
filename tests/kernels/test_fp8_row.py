"""`fp8_row`: what is folded is folded exactly, or refused; the arithmetic is emulated on a CPU."""

import pytest
import torch

from benchmarks.worlds.matrices import dit_like, gaussian, heavy_tailed, outlier_columns
from loraq.errors import KernelError
from loraq.formats import get_format
from loraq.kernels import LayerSpec, choose
from loraq.kernels.fp8_row import Fp8Row, encode_tokens, fold, sums_fast
from loraq.nn import QuantizedLinear
from loraq.packed import PackedWeight
from loraq.pipeline.module import quantize_weight
from loraq.recipe_names import parse_scheme

CPU = torch.device("cpu")


def layer_of(name: str, shape: tuple[int, int] = (48, 96)) -> QuantizedLinear:
    layer = QuantizedLinear.from_packed(
        quantize_weight(dit_like(*shape), name, method="svdquant").packed
    )
    layer.backend = "fp8_row"
    return layer


def two_scales(binades: int) -> torch.Tensor:
    """Rows of two blocks: all of E2M1's values, and the same `binades` binades lower."""
    values = get_format("mxfp4").element.grid()
    return torch.cat([values.repeat(2), values.repeat(2) * 2.0**-binades]).repeat(2, 1)


@pytest.mark.parametrize("binades", [0, 5, 14])
def test_mxfp4_folds_exactly_within_fourteen_binades(binades):
    w = two_scales(binades)
    codes, scale = fold(w)
    assert torch.equal(codes.float() * scale, w)
    assert torch.equal(scale, torch.exp2(scale.log2().round()))
    packed = PackedWeight(parse_scheme("mxfp4-amxfp4"), get_format("mxfp4").quantize(w))
    operands = Fp8Row().prepare(packed, packed.scheme, torch.float32)
    assert torch.equal(operands.codes.float() * operands.scale[:, None], w)


def test_a_row_with_a_wider_span_is_refused():
    stored = get_format("mxfp4").quantize(torch.cat([two_scales(16), two_scales(2)]))
    scheme = parse_scheme("mxfp4-amxfp4")
    with pytest.raises(
        KernelError, match="2 of 4 rows of the weight in 'mxfp4' do not fit e4m3 exactly"
    ):
        Fp8Row().prepare(PackedWeight(scheme, stored), scheme, torch.float32)


def test_zero_tiny_and_huge_rows_fold():
    w = torch.stack(
        [torch.zeros(32), torch.full((32,), 2.0**-120), torch.full((32,), 1.75 * 2.0**126)]
    )
    codes, scale = fold(w)
    assert torch.equal(codes.float() * scale, w)


@pytest.mark.parametrize("name", ["mxfp4", "mxint4", "mxfp6_e2m3", "mxfp6_e3m2"])
def test_activations_of_up_to_six_bits_fold_exactly(name):
    x, fmt = outlier_columns(16, 256), get_format(name)
    codes, scale = encode_tokens(x, fmt)
    assert torch.equal(codes.float() * scale, fmt.round(x))


def test_mxfp8_activations_change_by_less_than_100_db():
    fmt = get_format("mxfp8_e4m3")
    for x in (gaussian(16, 512), heavy_tailed(16, 512), outlier_columns(16, 512)):
        codes, scale = encode_tokens(x, fmt)
        expected = fmt.round(x)
        assert (codes.float() * scale - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_fp8_tokens_are_those_of_the_format(dtype):
    x = torch.cat([heavy_tailed(50, 96), torch.zeros(1, 96), 1e-30 * gaussian(1, 96)]).to(dtype)
    stored = get_format("fp8_e4m3").quantize(x)
    codes, scale = encode_tokens(x, get_format("fp8_e4m3"))
    assert torch.equal(codes.view(torch.uint8), stored.packed)
    assert torch.equal(scale.view(torch.uint8), stored.scale)


@pytest.mark.parametrize(
    ("scheme", "what"),
    [
        ("mxfp4-a8", "activation format 'mxint8'"),
        ("int4-amxfp4", "weight format 'int4'"),
        ("nvfp4-a4", "weight format 'nvfp4'"),
        ("mxint8-amxfp8_e4m3", "weight format 'mxint8'"),
        ("mxfp4-a16", "activation format 'bf16'"),
    ],
)
def test_it_refuses_formats_that_do_not_fit(scheme, what):
    with pytest.raises(KernelError, match=f"'fp8_row' cannot run .*its {what} does not fit e4m3"):
        choose("fp8_row", LayerSpec((parse_scheme(scheme),), (16, 64), CPU))


def test_the_gradient_is_that_of_the_reconstruction():
    layer, x = layer_of("mxfp4-amxfp8_e4m3+w8a8-r8"), gaussian(3, 96).requires_grad_()
    toward = gaussian(3, 48, 8)
    (layer(x) * toward).sum().backward()
    assert (x.grad - toward @ layer.reconstruct()).norm() <= 1e-2 * x.grad.norm()


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=str)
def test_any_leading_shape(leading):
    x = torch.randn((*leading, 96), generator=torch.Generator().manual_seed(0))
    assert layer_of("mxfp4-amxfp4+w8a8-r8")(x).shape == (*leading, 48)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("n_in", [1152, 3072, 6144])
def test_on_a_gpu_it_keeps_its_bound(n_in):
    layer = layer_of("mxfp4-amxfp8_e4m3+w8a8-r32", (256, n_in)).cuda()
    x = gaussian(128, n_in).bfloat16().cuda()
    with torch.no_grad():
        y = layer(x).double()
        layer.backend = "reference"
        expected = layer(x).double()
    assert (y - expected).norm() <= Fp8Row().bound(layer.scheme, x.dtype) * expected.norm()


def test_sums_stay_fast_up_to_pixarts_widest_layer():
    assert sums_fast(4608)
    assert not sums_fast(4609)


#: Largest magnitude of a token: around the smallest scale (2^-126 times 448), and where it is cut.
EDGES = (448 * 2.0**-126, 448 * 2.0**-127, 0.99 * torch.finfo(torch.float32).max)


@pytest.mark.parametrize("largest", EDGES)
def test_tokens_at_the_edges_of_fp32_are_those_of_the_format(largest):
    fmt, shape = get_format("fp8_e4m3").for_rows(), torch.tensor([1.0, -0.5, 0.3, 0.01])
    for factor in (0.999, 1.0, 1.001, 2.0):
        x = (factor * largest * shape.double()).clamp(max=torch.finfo(torch.float32).max)
        x = x.float()[None]
        codes, scale = encode_tokens(x, get_format("fp8_e4m3"))
        expected = fmt.round(x)
        torch.testing.assert_close(codes.float() * scale, expected, rtol=1e-6, atol=0)
