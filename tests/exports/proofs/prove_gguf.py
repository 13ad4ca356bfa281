"""`gguf`: every block by gguf-py, whole models by diffusers' loader and PEFT."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import loraq
from loraq.checkpoint.inspect import DenseWeights
from loraq.integrations.diffusers import _quiet_diffusers
from tests.exports.models import MODELS, distance, exact_output, output, save_quantized

MIXED = {"scheme": "int4-a16+bf16-r16", "rules": [{"match": "*single*", "branch": {"rank": 8}}]}
RECIPES = [MIXED, "int4_b32-a16+w8a8-r32", "mxint4-a16+w6a6-r32", "mxint8-a16+w8a8-r16"]


def load(name, folder):
    with _quiet_diffusers() as diffusers:
        kind = getattr(diffusers, MODELS[name].class_name)
        config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
        return kind.from_single_file(
            str(folder / "model.gguf"),
            config=str(folder),
            quantization_config=config,
            torch_dtype=torch.float32,
        )


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_whole_flux_is_the_exact_weight_only_forward(tmp_path, recipe):
    model = save_quantized("flux", recipe, tmp_path / "quantized")
    report = loraq.export(tmp_path / "quantized", tmp_path / "out", to="gguf", progress=False)
    assert report.counts["exact"] == len(report.layers)
    loaded, wanted = load("flux", tmp_path / "out"), exact_output(model, "flux")
    assert "GGUF" in type(loaded.get_submodule(report.layers[0].name)).__name__
    without = output(loaded, "flux")
    loaded.load_lora_adapter(
        str(tmp_path / "out/branch.safetensors"), prefix="transformer", adapter_name="loraq"
    )
    assert distance(output(loaded, "flux"), wanted) < 1e-6
    assert distance(without, wanted) > 1e-2


def test_a_sana_whose_convolutions_are_dense(tmp_path):
    model = save_quantized("sana", "int4-a16+bf16-r16", tmp_path / "quantized")
    with pytest.raises(loraq.LoraqError, match=r"convolution.*'gguf-q4_0'"):
        loraq.export(tmp_path / "quantized", tmp_path / "out", to="gguf", progress=False)
    loraq.export(
        *(tmp_path / "quantized", tmp_path / "out"),
        **{"to": "gguf", "allow_dense": True, "dtype": "float32", "progress": False},
    )
    loaded, wanted = load("sana", tmp_path / "out"), exact_output(model, "sana")
    without = output(loaded, "sana")
    loaded.load_lora_adapter(
        str(tmp_path / "out/branch.safetensors"), prefix="transformer", adapter_name="loraq"
    )
    assert distance(output(loaded, "sana"), wanted) < 1e-6
    assert distance(without, wanted) > 1e-2


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_second_lora_switches_the_branch_off_unless_both_are_named(tmp_path):
    """The trap in the model card, and the way out of it."""
    model = save_quantized("flux", MIXED, tmp_path / "quantized")
    loraq.export(tmp_path / "quantized", tmp_path / "out", to="gguf", progress=False)
    loaded, wanted = load("flux", tmp_path / "out"), exact_output(model, "flux")
    name = "transformer.transformer_blocks.0.attn.to_q.lora"
    zeros = {f"{name}_A.weight": torch.zeros(4, 128), f"{name}_B.weight": torch.zeros(128, 4)}
    save_file(zeros, tmp_path / "style.safetensors", {"format": "pt"})
    for file, adapter in (("out/branch", "loraq"), ("style", "style")):
        loaded.load_lora_adapter(
            str(tmp_path / f"{file}.safetensors"), prefix="transformer", adapter_name=adapter
        )
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
