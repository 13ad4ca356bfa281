"""Layers of Nunchaku Lite: the same numbers here, as the published formulas of its kernels say."""

import pytest
import torch
from torch import nn

from loraq.errors import CheckpointError, ExportError
from loraq.exports.lite import find_layers, lay_bias_back
from loraq.exports.nunchaku import vector_tiling
from loraq.nn import QuantizedLinear
from tests.exports.proofs.nunchaku_kernels import Kernels

N, K, RANK = 128, 256, 16


class Files:
    """Tensors in memory, as a reader has them."""

    def __init__(self, tensors):
        self.tensors = tensors

    @property
    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        from loraq.safetensors.header import DTYPE_NAMES

        return DTYPE_NAMES[self.tensors[name].dtype]

    def read(self, name):
        return self.tensors[name].clone()


def rand(rng, *shape, dtype=torch.bfloat16):
    return (0.1 * torch.randn(*shape, generator=rng)).to(dtype)


def svdq(rng, precision, dtype=torch.bfloat16):
    """Return an SVDQ layer with a smoothing vector and, of NVFP4, a scale of each row."""
    groups = K // (64 if precision == "int4" else 16)
    made = {
        "qweight": torch.randint(-128, 128, (N, K // 2), generator=rng, dtype=torch.int8),
        "smooth_factor": rand(rng, K, dtype=dtype) + 0.5,
        "proj_down": rand(rng, K, RANK, dtype=dtype),
        "proj_up": rand(rng, N, RANK, dtype=dtype),
        "wscales": rand(rng, groups, N).to(dtype),
        "bias": rand(rng, N, dtype=dtype),
    }
    if precision == "nvfp4":
        scales = torch.rand(groups, N, generator=rng) * 400
        made["wscales"] = scales.to(torch.float8_e4m3fn)
        made["wtscale"] = rand(rng, 1, dtype=dtype)
        made["wcscales"] = rand(rng, N, dtype=dtype) + 1
    return {f"layer.{name}": tensor for name, tensor in made.items()}


def awq(rng, *, signed):
    scales = rand(rng, K // 64, N)
    made = {
        "qweight": torch.randint(-(2**31), 2**31, (N // 4, K // 2), generator=rng).int(),
        "wscales": scales,
        "wzeros": -8 * scales if signed else rand(rng, K // 64, N),
        "bias": rand(rng, N),
    }
    return {f"layer.{name}": tensor for name, tensor in made.items()}


def settle(tensors, section, **settings):
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(K, N, device="meta"))
    settings = {"targets": ["layer"], "rank": RANK, **settings}
    config = {"quantization_config": {"quant_method": "nunchaku_lite", section: settings}}
    return find_layers(config, model, Files(tensors))[0]


def build(tensors, section, **settings):
    layer = settle(tensors, section, **settings)
    bias = lay_bias_back(layer, tensors["layer.bias"]).float()
    return QuantizedLinear.from_packed(layer.make(Files(tensors)), bias), layer.scheme


def by_formulas(tensors, x, *, is_fp4):
    """Return what the kernels compute, without the rounding of activations."""
    t, kernels = {name.removeprefix("layer."): each for name, each in tensors.items()}, Kernels()
    out, low = torch.empty(len(x), N), torch.empty(len(x), RANK)
    kernels.quantize_w4a4_act_fuse_lora(
        x, None, None, t["proj_down"], low, t["smooth_factor"], None, is_fp4
    )
    rest: list = [None] * 15
    rest[5], rest[13], rest[14] = t["bias"], t.get("wtscale"), t.get("wcscales")
    kernels.gemm_w4a4(
        *(None, t["qweight"], out, None, None, t["wscales"], None, None, low, t["proj_up"]), *rest
    )
    return out


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(
    ("precision", "rows", "weight"),
    [("int4", False, "int4"), ("nvfp4", True, "nvfp4_rows"), ("nvfp4", False, "nvfp4")],
)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_svdq_layers_are_the_same_function(rng, precision, rows, weight, smooth, backend):
    tensors = svdq(rng, precision)
    if not smooth:
        tensors["layer.smooth_factor"].fill_(1)
    if precision == "nvfp4" and not rows:
        tensors["layer.wcscales"].fill_(1.5)
    layer, scheme = build(tensors, "svdq_w4a4", precision=precision)
    assert scheme.weight == weight + "_columns" * smooth
    layer.backend = backend
    x = torch.randn(8, K, generator=rng)
    wanted = by_formulas(tensors, x, is_fp4=precision == "nvfp4")
    with torch.no_grad():
        assert (layer(x) - wanted).norm() < 1e-6 * wanted.norm()
        assert (layer.dequantize()(x) - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("signed", [True, False])
def test_awq_layers_are_the_same_function(rng, signed):
    tensors = awq(rng, signed=signed)
    layer, scheme = build(tensors, "awq_w4a16", precision="int4")
    assert scheme.weight == ("int4" if signed else "int5")
    x = torch.randn(8, K, generator=rng)
    parts = (tensors[f"layer.{part}"] for part in ("qweight", "wscales", "wzeros"))
    wanted = Kernels().awq_gemm_w4a16_g64_int32(x, *parts) + tensors["layer.bias"].float()
    with torch.no_grad():
        assert (layer(x) - wanted).norm() < 1e-6 * wanted.norm()


def test_factors_of_16_bits_stay_what_they_are(rng):
    tensors = svdq(rng, "nvfp4", torch.float16)
    layer, scheme = build(tensors, "svdq_w4a4", precision="nvfp4")
    assert scheme.branch.weight == "fp16"
    wanted = by_formulas(tensors, x := torch.randn(8, K, generator=rng), is_fp4=True)
    with torch.no_grad():
        assert (layer(x) - wanted).norm() < 1e-6 * wanted.norm()


def test_scales_that_bf16_does_not_have_are_refused(rng):
    tensors = svdq(rng, "int4", torch.float16)
    tensors["layer.wscales"][0, 0] = 1.001
    with pytest.raises(ExportError, match=r"scales of torch.float16 that are no numbers of bfloat"):
        settle(tensors, "svdq_w4a4", precision="int4")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("smooth_factor", 0.0, "has zeros"),
        ("smooth_factor", torch.nan, "no numbers in smooth_factor"),
        ("wscales", torch.inf, "no numbers in wscales"),
    ],
)
def test_numbers_that_cannot_be_are_refused(rng, part, value, message):
    tensors = svdq(rng, "int4")
    tensors[f"layer.{part}"].flatten()[3:4].fill_(value)
    with pytest.raises(CheckpointError, match=message):
        settle(tensors, "svdq_w4a4", precision="int4")


def test_a_factor_that_is_no_number_is_refused(rng):
    tensors = svdq(rng, "int4")
    tensors["layer.proj_up"][5, 7] = torch.nan
    layer = settle(tensors, "svdq_w4a4", precision="int4")
    with pytest.raises(CheckpointError, match="no numbers in the branch"):
        layer.make(Files(tensors))


def test_tensors_of_other_shapes_are_refused(rng):
    tensors = svdq(rng, "int4")
    with pytest.raises(CheckpointError, match=r"proj_down' is BF16 of \(256, 16\), and .* 32\)"):
        settle(tensors, "svdq_w4a4", precision="int4", rank=32)
    del tensors["layer.wscales"]
    with pytest.raises(CheckpointError, match=r"wscales' is missing"):
        settle(tensors, "svdq_w4a4", precision="int4")


def test_biases_are_in_the_order_of_the_rows(rng):
    tensors = svdq(rng, "int4")
    layer = settle(tensors, "svdq_w4a4", precision="int4")
    bias = torch.arange(N)
    assert torch.equal(lay_bias_back(layer, vector_tiling(N).lay(bias)), bias)
