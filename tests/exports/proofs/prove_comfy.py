"""`comfy`: every layer by comfy-kitchen's eager layout, and with these layers a whole model."""

import json

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreNVFP4Layout
from safetensors.torch import load_file

import loraq
from loraq.exports.native import find_native_names
from loraq.layers import quantized_layers
from tests.exports.models import MODELS, distance, exact_output, output, save_quantized
from tests.exports.proofs.cards import run_shell

MIXED = {"scheme": "nvfp4+bf16-r16", "rules": [{"match": "*single*", "branch": {"rank": 8}}]}


@pytest.fixture(autouse=True)
def eager():
    with comfy_kitchen.use_backend("eager"):
        yield


def read_layers(file):
    """Return the weights that ComfyUI makes of a file, by layer, as its loader does."""
    tensors = load_file(file)
    layers = {}
    for name in tensors:
        if not name.endswith(".comfy_quant"):
            continue
        layer = name.removesuffix(".comfy_quant")
        assert json.loads(bytes(tensors[name].tolist()))["format"] == "nvfp4"
        weight = tensors[f"{layer}.weight"]
        params = TensorCoreNVFP4Layout.Params(
            scale=tensors[f"{layer}.weight_scale_2"],
            block_scale=tensors[f"{layer}.weight_scale"],
            orig_dtype=torch.float32,
            orig_shape=(weight.shape[0], 2 * weight.shape[1]),
        )
        layers[layer] = QuantizedTensor(weight, "TensorCoreNVFP4Layout", params)
    return layers


@pytest.mark.parametrize("recipe", [MIXED, "nvfp4-a16+w8a8-r32"], ids=str)
def test_a_whole_flux_is_the_exact_weight_only_forward(tmp_path, recipe):
    model = save_quantized("flux", recipe, tmp_path / "quantized")
    report = loraq.export(tmp_path / "quantized", tmp_path / "out", to="comfy", progress=False)
    assert report.counts["exact"] == len(report.layers)
    # What the card copies, as the nodes of the workflow find it.
    run_shell(tmp_path / "out")
    nodes = json.loads((tmp_path / "out/workflow.json").read_text()).values()
    names = {node["class_type"]: node["inputs"] for node in nodes}
    folder = tmp_path / "ComfyUI/models"
    model_file = folder / "diffusion_models" / names["UNETLoader"]["unet_name"]
    branch_file = folder / "loras" / names["LoraLoaderBypassModelOnly"]["lora_name"]
    layers = read_layers(model_file)
    assert len(layers) == len(report.layers)

    # Codes and scales, bit for bit, in the rows of the native layers; all else as it was.
    ours = {name: layer.packed.main.dequantize() for name, layer in quantized_layers(model).items()}
    floats = MODELS["flux"].build().state_dict()
    native = find_native_names("FluxTransformer2DModel", floats)
    rows = {layer: [part.name.removesuffix(".weight") for part in native[f"{layer}.weight"]]
            for layer in layers}  # fmt: skip
    for layer, weight in layers.items():
        assert torch.equal(weight.dequantize(), torch.cat([ours[name] for name in rows[layer]]))
    written = load_file(model_file)
    for name, parts in native.items():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(written[name], torch.cat([p.of(floats[p.name]) for p in parts]))

    # The layer with its bypass node: base(x) + (x Aᵀ) Bᵀ on the raw input.
    branch = load_file(branch_file)
    dense, bare = {}, {}
    for layer, weight in layers.items():
        down, up = (branch[f"diffusion_model.{layer}.lora_{part}.weight"].float() for part in "AB")
        x = torch.eye(weight.shape[1])
        base = torch.nn.functional.linear(x, weight).mT
        sizes = [len(ours[name]) for name in rows[layer]]
        bare |= dict(zip(rows[layer], base.split(sizes), strict=True))
        dense |= dict(zip(rows[layer], (base + up @ down).split(sizes), strict=True))

    wanted = exact_output(model, "flux")
    assert distance(run(dense), wanted) < 1e-6
    assert distance(run(bare), wanted) > 1e-2


def run(weights):
    """Return what the float model makes of its inputs with other weights."""
    dense = MODELS["flux"].build()
    with torch.no_grad():
        for name, weight in weights.items():
            dense.get_submodule(name).weight.copy_(weight)
    return output(dense, "flux")
