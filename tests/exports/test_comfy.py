"""`comfy`: layers that are joined, what ComfyUI reads of them, and what stays dense."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small.models import small_model

import loraq
from loraq.exports.joined import join_factors, join_weights
from loraq.exports.layer import Factors, Head, Layer
from loraq.formats import get_format
from loraq.formats.scales import view_bytes
from loraq.recipe import Recipe
from loraq.scheme import Scheme
from tests.exports.models import save_quantized

diffusers = pytest.importorskip("diffusers")
NVFP4 = get_format("nvfp4")


def export(source, target, **options):
    return loraq.export(source, target, to="comfy", progress=False, **options)


def test_matrices_are_joined_under_the_largest_global_scale(rng):
    parts = [NVFP4.quantize(size * torch.randn(16, 32, generator=rng)) for size in (1.0, 0.3, 9.0)]
    joined = join_weights(parts)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert view_bytes(joined.global_scale, torch.float32) == max(
        view_bytes(part.global_scale, torch.float32) for part in parts
    )


def test_branches_are_joined_side_by_side(rng):
    heights, ranks = (4, 8, 6), (2, 0, 3)
    layers = []
    for height, rank in zip(heights, ranks, strict=True):
        main = NVFP4.quantize(torch.randn(height, 16, generator=rng))
        up, down = (torch.randn(*size, generator=rng) for size in ((height, rank), (rank, 16)))
        head = Head("layer", "layer", (height, 16), Scheme("nvfp4"), (height, 16))
        layers.append(Layer(head, main, Factors(up, down) if rank else None))
    joined = join_factors(layers)
    wanted = [
        torch.zeros(8, 16) if layer.branch is None else layer.branch.up @ layer.branch.down
        for layer in layers
    ]
    assert joined.rank == 5
    assert torch.allclose(joined.up @ joined.down, torch.cat(wanted), atol=1e-6)
    assert join_factors(layers[1:2]) is None


def test_layers_of_16_bit_activations_are_multiplied_in_16_bits(tmp_path):
    rules = [{"match": "*norm*.linear", "activation": "bf16"}]
    recipe = {"scheme": "nvfp4-a4+bf16-r16", "rules": rules}
    save_quantized("flux", recipe, tmp_path / "quantized")
    export(tmp_path / "quantized", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    said = {
        name: json.loads(bytes(written[f"{name}.comfy_quant"].tolist()))
        for name in ("double_blocks.0.img_mod.lin", "double_blocks.0.img_attn.qkv")
    }
    assert list(said.values()) == [
        {"format": "nvfp4", "full_precision_matrix_mult": True},
        {"format": "nvfp4"},
    ]


def test_the_workflow_loads_both_files_with_the_bypass_node(tmp_path):
    save_quantized("flux", "nvfp4+bf16-r16", tmp_path / "quantized")
    export(tmp_path / "quantized", tmp_path / "mine")
    nodes = json.loads((tmp_path / "mine/workflow.json").read_text())
    assert nodes["1"]["inputs"]["unet_name"] == "mine/model.safetensors"
    assert nodes["2"]["class_type"] == "LoraLoaderBypassModelOnly"
    assert nodes["2"]["inputs"]["lora_name"] == "mine/branch.safetensors"
    assert nodes["2"]["inputs"]["strength_model"] == 1.0


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"match": "*attn.to_q", "skip": True}, "of its 3 parts are quantized"),
        ({"match": "*attn.to_q", "weight": "mxfp4"}, "quantized in several formats"),
        ({"match": "*attn.to_q", "activation": "bf16"}, "quantized in several formats"),
    ],
)
def test_parts_that_do_not_join_are_dense(tmp_path, rule, reason):
    recipe = {"scheme": "nvfp4+bf16-r16", "rules": [rule]}
    model = save_quantized("flux", recipe, tmp_path / "quantized")
    done = export(tmp_path / "quantized", tmp_path / "out", allow_dense=True, dtype="float32")
    dense = {layer.name: layer.reason for layer in done.layers if layer.fate == "dense"}
    name = "double_blocks.0.img_attn.qkv"
    assert dense.keys() == {name, "single_blocks.0.linear1"}
    assert reason in dense[name]
    written = load_file(tmp_path / "out/model.safetensors")
    loraq.dequantize_(model)
    attention = model.transformer_blocks[0].attn
    parts = [attention.to_q, attention.to_k, attention.to_v]
    assert torch.equal(written[f"{name}.weight"], torch.cat([part.weight for part in parts]))
    assert torch.equal(written[f"{name}.bias"], torch.cat([part.bias for part in parts]))


def test_global_scales_of_old_folders_do_not_join(tmp_path):
    model = save_quantized("flux", "nvfp4+bf16-r16", tmp_path / "first")
    scale = model.transformer_blocks[0].attn.to_q.weight_global_scale
    scale.data = (view_bytes(scale.data, torch.float32) * 1.1).view(torch.uint8)
    loraq.save(model, tmp_path / "quantized")
    done = export(tmp_path / "quantized", tmp_path / "out")
    dense = {layer.name: layer.reason for layer in done.layers if layer.fate == "dense"}
    assert dense == {
        "double_blocks.0.img_attn.qkv": "the global scales of its parts are no powers of two, or "
        "far apart"
    }


def test_a_final_layer_whose_rows_are_turned_is_dense(tmp_path):
    rules = [{"match": "norm_out.linear|proj_out", "skip": False}]
    recipe = {"scheme": "nvfp4+bf16-r8", "rules": rules}
    save_quantized("flux", recipe, tmp_path / "quantized")
    done = export(tmp_path / "quantized", tmp_path / "out")
    dense = {layer.name: layer.reason for layer in done.layers if layer.fate == "dense"}
    assert dense == {
        "final_layer.adaLN_modulation.1": "its rows stand in another order there",
        "final_layer.linear": "ComfyUI tells models apart by the sizes of layers outside of the "
        "blocks",
    }


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "ZImageTransformer2DModel"])
def test_other_classes(tmp_path, name):
    model = small_model(getattr(diffusers, name))
    recipe = {"scheme": "nvfp4", "method": "rtn", "keep": "float"}
    loraq.quantize_(model, Recipe.from_dict(recipe), progress=False)
    loraq.save(model, tmp_path / "quantized")
    done = export(tmp_path / "quantized", tmp_path / "out", allow_dense=True)
    assert done.counts["exact"]
