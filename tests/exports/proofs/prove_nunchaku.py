"""`nunchaku-lite`: permutations by cache-dit, whole models by diffusers' loader and layers.

No CPU runs the CUDA kernels: they are emulated, and nothing else is.
"""

import importlib.metadata
import importlib.util
from types import SimpleNamespace

import pytest
import torch

import loraq
from loraq.exports import nunchaku as ours
from loraq.exports.codes import join_low_first
from loraq.integrations.diffusers import _quiet_diffusers
from loraq.layers import quantized_layers, replace_layer
from loraq.nn import QuantizedLinear
from loraq.safetensors.reader import ShardReader
from tests.exports.models import distance, exact_output, output, save_quantized
from tests.exports.proofs.cards import run_card
from tests.exports.proofs.nunchaku_kernels import Kernels


@pytest.fixture
def emulated(monkeypatch, tmp_path):
    """Let diffusers call the formulas instead of the kernels."""
    import kernels

    with _quiet_diffusers():
        from diffusers.quantizers.nunchaku.nunchaku_quantizer import NunchakuLiteQuantizer
        from diffusers.utils import constants
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    monkeypatch.setattr(kernels, "get_kernel", lambda *_, **__: SimpleNamespace(ops=Kernels()))
    monkeypatch.setattr(NunchakuLiteQuantizer, "validate_environment", lambda *_, **__: None)


@pytest.mark.parametrize("recipe", ["int4+bf16-r16", "int4-a4+w8a8-r32-h0", "nvfp4+bf16-r16"])
def test_a_whole_flux_is_the_exact_weight_only_forward(tmp_path, emulated, recipe):
    asked = {"scheme": recipe, "rules": [{"match": "*norm*.linear", "skip": True}]}
    model = save_quantized("flux", asked, tmp_path / "quantized")
    check(tmp_path, model)


def test_a_sana_whose_convolutions_are_left_alone(tmp_path, emulated):
    asked = {"scheme": "int4+bf16-r16", "rules": [{"match": "*conv*", "skip": True}]}
    check(tmp_path, save_quantized("sana", asked, tmp_path / "quantized"), "sana")


def test_modulations_without_a_branch_run_on_16_bit_activations(tmp_path, emulated):
    model = save_quantized("flux", "int4+bf16-r16", tmp_path / "first")
    for name, layer in quantized_layers(model).items():
        if "norm" in name:
            plain = loraq.quantize_weight(layer.packed.reconstruct(), "int4-a16")
            replace_layer(model, name, QuantizedLinear.from_packed(plain.packed, layer.bias))
    loraq.save(model, tmp_path / "quantized")
    loaded = check(tmp_path, model)
    names = {type(module).__name__ for module in loaded.modules()}
    assert {"AWQW4A16Linear", "SVDQW4A4Linear"} <= names


def check(tmp_path, model, name="flux"):
    out = tmp_path / "out"
    report = loraq.export(tmp_path / "quantized", out, to="nunchaku-lite", progress=False)
    assert report.counts["dense"] == 0
    loaded = run_card(out)["model"]
    from diffusers.quantizers.nunchaku.utils import check_strict_state_dict_match

    reader = ShardReader(out)
    check_strict_state_dict_match(loaded, {name: reader.read(name) for name in reader.names})
    found, wanted = output(loaded, name), exact_output(model, name)
    assert distance(found, wanted) < 1e-6
    assert distance(exact_output(model, name, branch=False), found) > 1e-2
    return loaded


@pytest.fixture(scope="module")
def packer():
    files = importlib.metadata.files("cache-dit") or []
    file = next(f for f in files if str(f).endswith("quantization/svdquant/packing.py"))
    spec = importlib.util.spec_from_file_location("packing", file.locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SVDQWeightPacker(bits=4)


def test_the_permutations_are_those_of_cache_dit(packer, rng):
    n, k, rank = 256, 384, 32
    codes = torch.randint(-8, 8, (n, k), generator=rng, dtype=torch.int32)
    packed = join_low_first(ours.codes_tiling(n, k).lay((codes & 15).to(torch.uint8)))
    assert torch.equal(packer.pack_weight(codes.clone()).flatten(), packed.view(torch.int8))

    scale = torch.randn(n, k // 64, generator=rng).bfloat16()
    found = packer.pack_scale(packer.pad_scale(scale.view(n, 1, -1, 1), 64), 64)
    assert torch.equal(found.flatten(), ours.vector_tiling(n, k // 64).lay(scale))
    bias = torch.randn(n, generator=rng).bfloat16()
    found = packer.pack_scale(bias.view(-1, 1), -1)
    assert torch.equal(found.flatten(), ours.vector_tiling(n).lay(bias))

    micro = torch.rand(n, k // 16, generator=rng).bfloat16()
    found = packer.pack_micro_scale(micro, 16).view(torch.uint8).flatten()
    raw = micro.to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(found, ours.micro_tiling(n, k // 16).lay(raw))

    down = torch.randn(rank, k, generator=rng).bfloat16()
    up = torch.randn(n, rank, generator=rng).bfloat16()
    found = packer.pack_lowrank_weight(down, down=True)
    assert torch.equal(found.flatten(), ours.down_tiling(rank, k).lay(down))
    found = packer.pack_lowrank_weight(up, down=False)
    assert torch.equal(found.flatten(), ours.up_tiling(n, rank).lay(up))
