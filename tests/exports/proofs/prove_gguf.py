"""`gguf`: every block by gguf-py, whole models by diffusers' loader and PEFT."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import loraq
from loraq.checkpoint.inspect import DenseWeights
from loraq.integrations.diffusers import _quiet_diffusers
from tests.exports.models import MODELS, distance, exact_output, output, save_quantized
from tests.exports.proofs.cards import run_card

MIXED = {"scheme": "int4-a16+bf16-r16", "rules": [{"match": "*single*", "branch": {"rank": 8}}]}
RECIPES = [MIXED, "int4_b32-a16+w8a8-r32", "mxint4-a16+w6a6-r32", "mxint8-a16+w8a8-r16"]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_whole_flux_is_the_exact_weight_only_forward(tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    model = save_quantized("flux", recipe, tmp_path / "quantized")
    report = loraq.export(tmp_path / "quantized", tmp_path / "out", to="gguf", progress=False)
    assert report.counts["exact"] == len(report.layers)
    loaded, wanted = run_card(tmp_path / "out")["model"], exact_output(model, "flux")
    layer = loaded.get_submodule(report.layers[0].name)
    assert "GGUF" in type(layer.base_layer).__name__
    assert distance(output(loaded, "flux"), wanted) < 1e-6
    loaded.disable_adapters()
    assert distance(output(loaded, "flux"), wanted) > 1e-2


def test_a_sana_whose_convolutions_are_dense(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save_quantized("sana", "int4-a16+bf16-r16", tmp_path / "quantized")
    with pytest.raises(loraq.LoraqError, match=r"convolution.*'gguf-q4_0'"):
        loraq.export(tmp_path / "quantized", tmp_path / "out", to="gguf", progress=False)
    loraq.export(
        *(tmp_path / "quantized", tmp_path / "out"),
        **{"to": "gguf", "allow_dense": True, "dtype": "float32", "progress": False},
    )
    loaded, wanted = run_card(tmp_path / "out")["model"], exact_output(model, "sana")
    assert distance(output(loaded, "sana"), wanted) < 1e-6
    loaded.disable_adapters()
    assert distance(output(loaded, "sana"), wanted) > 1e-2


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_second_lora_switches_the_branch_off_unless_both_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    """The trap in the model card, and the way out of it."""
    model = save_quantized("flux", MIXED, tmp_path / "quantized")
    loraq.export(tmp_path / "quantized", tmp_path / "out", to="gguf", progress=False)
    loaded, wanted = run_card(tmp_path / "out")["model"], exact_output(model, "flux")
    name = "transformer.transformer_blocks.0.attn.to_q.lora"
    zeros = {f"{name}_A.weight": torch.zeros(4, 128), f"{name}_B.weight": torch.zeros(128, 4)}
    save_file(zeros, tmp_path / "style.safetensors", {"format": "pt"})
    loaded.load_lora_adapter("style.safetensors", prefix="transformer", adapter_name="style")
    assert distance(output(loaded, "flux"), wanted) > 1e-2
    loaded.set_adapters(["loraq", "style"])
    assert distance(output(loaded, "flux"), wanted) < 1e-6


@pytest.mark.parametrize(
    "recipe", ["int4-a16", "int4_b32-a16", "mxint4-a16", "int5-a16", "mxint8-a16", "int8_b64-a16"]
)
def test_gguf_py_reads_the_weights_bit_for_bit(tmp_path, recipe):
    save_quantized("flux", {"scheme": recipe, "method": "rtn"}, tmp_path / "quantized")
    loraq.export(tmp_path / "quantized", tmp_path / "out", to="gguf", progress=False)
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    ours = DenseWeights(tmp_path / "quantized")
    for name in ours.quantized:
        tensor = tensors[f"{name}.weight"]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found, ours.read(name).numpy())
    assert set(tensors) >= {"proj_out.weight", "proj_out.bias"}


def test_a_model_without_a_branch_is_loaded_without_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = {"scheme": "gguf-q8_0", "method": "rtn"}
    model = save_quantized("flux", asked, tmp_path / "quantized")
    loraq.export(tmp_path / "quantized", tmp_path / "out", to="gguf", progress=False)
    loaded = run_card(tmp_path / "out")["model"]
    assert distance(output(loaded, "flux"), exact_output(model, "flux")) < 1e-6


def test_diffusers_loads_no_gguf_of_a_pixart(tmp_path, monkeypatch):
    """Why the target refuses the class; once this fails, it need not."""
    monkeypatch.chdir(tmp_path)
    save_quantized("flux", MIXED, tmp_path / "quantized")
    loraq.export(tmp_path / "quantized", tmp_path / "out", to="gguf", progress=False)
    with _quiet_diffusers() as diffusers:
        assert not hasattr(diffusers.PixArtTransformer2DModel, "from_single_file")
    # `from_pretrained` would read a GGUF file that an index names as a shard, for any class, but
    # it cannot note such a configuration.
    names = {name: "model.gguf" for name in MODELS["flux"].build().state_dict()}
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    path = tmp_path / "out/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    with _quiet_diffusers(), pytest.raises(TypeError, match="dtype is not JSON serializable"):
        diffusers.FluxTransformer2DModel.from_pretrained("out", quantization_config=config)
