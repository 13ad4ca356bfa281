"""`export`: what is written, what becomes of each layer, and what is refused before writing."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small.models import small_model
from small.pixart import small_pixart

import loraq
from loraq.checkpoint.inspect import DenseWeights
from loraq.errors import CheckpointError, ExportError, MissingLibraryError
from loraq.exports import onnx_graph, openvino_graph
from loraq.exports.sdnq import Sdnq
from loraq.exports.table import TARGETS
from loraq.integrations.diffusers import empty_model
from loraq.layers import quantized_layers
from loraq.recipe import Recipe
from tests.exports.models import MODELS, save_quantized
from tests.folders import files_of

pytest.importorskip("diffusers")

#: A recipe for each target that it holds without a loss.
RECIPES = {
    "sdnq": "int4-a16+bf16-r16",
    "gguf": "int4_b32-a16+bf16-r16",
    "nunchaku-lite": {
        "scheme": "int4+bf16-r16",
        "rules": [{"match": "*norm*.linear", "skip": True}],
    },
    "onnx": "int4-a16+w8a8-r32",
    "openvino": "mxfp4-a8+w6a6-r33",  # filled up to 64
    "torchao": "nvfp4-a16+bf16-r16",
    "comfy": "nvfp4+bf16-r16",
    "dense": "mxfp4-a4+w8a8-r16-h32",
}


#: Targets whose configuration is that of a float model.
FLOATS = ("gguf", "onnx", "openvino", "comfy", "dense")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("exports")
    for name, recipe in RECIPES.items():
        save_quantized("flux", recipe, place / name)
    return place


@pytest.fixture(autouse=True)
def graph(monkeypatch):
    """Their packages are not needed here: `make test-exports` builds and runs the graphs."""
    monkeypatch.setattr("loraq.exports.onnx.build_graph", lambda *_: b"graph")
    made = {"graph": b"graph", "constants": b"numbers"}
    monkeypatch.setattr(
        "loraq.exports.openvino.build_graph", lambda *given: replace(given[-1], **made)
    )


def export(source: Path, target: Path, to: str, **options):
    return loraq.export(source, target, to=to, progress=False, **options)


def test_every_target_has_a_recipe_here():
    assert RECIPES.keys() == TARGETS.keys()


@pytest.mark.parametrize("to", RECIPES)
def test_a_target_holds_every_layer_of_its_recipe(place, tmp_path, to):
    report = export(place / to, tmp_path / "out", to)
    wanted = "dense" if to == "dense" else "exact"
    assert {layer.fate for layer in report.layers} == {wanted}
    assert report.largest_change == 0.0 or to == "dense"
    assert report.nbytes == sum(
        size
        for name, size in report.files.items()
        if name.endswith(("tensors", "gguf", "onnx", "data", "xml", "bin"))
    )
    assert all((tmp_path / "out" / name).stat().st_size == n for name, n in report.files.items())
    config = json.loads((tmp_path / "out/config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    assert method == ({"nunchaku-lite": "nunchaku_lite"} | dict.fromkeys(FLOATS)).get(to, to)
    document = json.loads((tmp_path / "out/loraq_export.json").read_text())
    assert document["target"] == to
    names = {part for layer in document["layers"].values() for part in layer["layers"]}
    assert names == DenseWeights(place / to).manifest.layers.keys()


@pytest.mark.parametrize("to", RECIPES)
def test_a_plan_is_what_happens(place, tmp_path, to):
    planned = loraq.plan_export(place / to, to=to)
    done = export(place / to, tmp_path / "out", to)
    assert [(n.name, n.fate, n.nbytes) for n in planned.layers] == [
        (n.name, n.fate, n.nbytes) for n in done.layers
    ]
    assert planned.nbytes == done.nbytes


@pytest.mark.parametrize("to", RECIPES)
def test_the_same_bytes_come_out_twice(place, tmp_path, to):
    for name in ("a", "b"):
        export(place / to, tmp_path / name / "out", to)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize("to", RECIPES)
def test_the_card_says_how_to_load_and_what_goes_wrong(place, tmp_path, to):
    export(place / to, tmp_path / "out", to)
    text = (tmp_path / "out/README.md").read_text()
    loads = {
        "onnx": "InferenceSession(",
        "openvino": "Core().compile_model(",
        "comfy": "models/diffusion_models/out/",
    }
    assert loads.get(to, "FluxTransformer2DModel.from_") in text
    assert ("/out/" if to == "comfy" else '"out') in text
    assert str(tmp_path) not in text  # the card may be published
    about = TARGETS[to].about
    assert all(trap in text for trap in about.traps)
    assert ("branch.safetensors" in text) == (about.branch_file is not None)


def test_dense_weights_are_the_effective_ones(place, tmp_path):
    export(place / "dense", tmp_path / "out", "dense", dtype="float32")
    written = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    ours = DenseWeights(place / "dense")
    for name in ours.quantized:
        assert torch.equal(written[f"{name}.weight"], ours.read(name))
    assert written.keys() == empty_model(tmp_path / "out").state_dict().keys()


def test_a_class_that_takes_no_lora_gets_its_branch_by_peft(tmp_path):
    rules = [{"match": "*attn2.to_q", "branch": {"rank": 4}}]
    recipe = {"scheme": "nvfp4-a16+bf16-r8", "rules": rules}
    save_quantized("pixart", recipe, tmp_path / "quantized")
    done = export(tmp_path / "quantized", tmp_path / "out", "torchao")
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    ranks = {name: t.shape[0] for name, t in written.items() if name.endswith("lora_A.weight")}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["target_modules"]) == {layer.name for layer in done.layers}
    for name, rank in ranks.items():
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        found = [
            r for key, r in config["rank_pattern"].items() if re.match(f"(.*\\.)?({key})$", layer)
        ]
        assert found == ([4] if layer.endswith("attn2.to_q") else [])
        assert rank == (4 if found else 8)
    text = (tmp_path / "out/README.md").read_text()
    assert "peft.PeftModel.from_pretrained(" in text
    assert "branch.safetensors" not in text


def test_a_model_without_a_branch_says_nothing_of_one(tmp_path):
    save_quantized("flux", {"scheme": "mxint8-a16", "method": "rtn"}, tmp_path / "quantized")
    done = export(tmp_path / "quantized", tmp_path / "out", "gguf")
    assert done.branch_file is None
    assert done.traps == ()
    assert "branch.safetensors" not in (tmp_path / "out/README.md").read_text()
    assert not (tmp_path / "out/branch.safetensors").exists()


def test_the_report_counts_what_is_rounded(tmp_path):
    save_quantized("flux", "int4-a16+int8-r32", tmp_path / "quantized")
    report = export(tmp_path / "quantized", tmp_path / "out", "sdnq")
    assert report.counts["rounded"] == len(report.layers)
    assert {layer.reason for layer in report.layers} == {"int8 factors rounded to bfloat16"}
    assert 0 < report.largest_change < 4e-3
    exact = export(tmp_path / "quantized", tmp_path / "fp32", "sdnq", dtype="float32")
    assert exact.counts["exact"] == len(exact.layers)


@pytest.mark.parametrize("branch", ["bf16", "mxint8", "mxfp6_e2m3", "mxfp4", "nvfp4"])
def test_branches_that_bf16_holds(tmp_path, branch):
    save_quantized("flux", f"int4-a16+{branch}-r16-h0", tmp_path / "quantized")
    planned = loraq.plan_export(tmp_path / "quantized", to="sdnq")
    done = export(tmp_path / "quantized", tmp_path / "out", "sdnq")
    assert planned.counts == done.counts == {"exact": 20, "rounded": 0, "dense": 0}


def test_one_format_a_file_and_the_rest_is_dense(tmp_path):
    rules = [{"match": "*attn.to_q", "weight": "mxfp4"}]
    save_quantized("flux", {"scheme": "int4-a16+bf16-r16", "rules": rules}, tmp_path / "quantized")
    report = export(tmp_path / "quantized", tmp_path / "out", "sdnq")
    dense = [layer for layer in report.layers if layer.fate == "dense"]
    assert [layer.name.rpartition(".")[2] for layer in dense] == ["to_q", "to_q"]
    assert dense[0].reason == "float4_e2m1fn in blocks of 32 beside int4 of 64"
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert f"{dense[0].name}.weight" in config["modules_to_not_convert"]
    written = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    assert written[f"{dense[0].name}.weight"].dtype == torch.bfloat16


# --- refusals -------------------------------------------------------------------------------------


def refused(source: Path, target: Path, to: str, **options) -> str:
    """Return the message of an export that must be refused, with nothing written."""
    before = sorted(target.parent.iterdir())
    with pytest.raises(ExportError) as caught:
        export(source, target, to, **options)
    assert sorted(target.parent.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize("to", [name for name in RECIPES if name != "dense"])
def test_a_rotation_is_refused_with_the_way_out(place, tmp_path, to):
    message = refused(place / "dense", tmp_path / "out", to)
    assert "are rotated" in message
    assert f"Quantize with the recipe '{TARGETS[to].about.recipes[0]}'" in message
    assert "--to dense" in message


@pytest.mark.parametrize("to", ["gguf", "nunchaku-lite", "onnx", "torchao", "comfy"])
def test_too_much_that_would_be_dense_is_refused_with_the_recipe(tmp_path, to):
    save_quantized("flux", "mxfp4-a16+w8a8-r16", tmp_path / "quantized")
    message = refused(tmp_path / "quantized", tmp_path / "out", to)
    assert "100% of the quantized weights as floats" in message
    assert f"Quantize with the recipe '{TARGETS[to].about.recipes[0]}'" in message
    report = export(tmp_path / "quantized", tmp_path / "out", to, allow_dense=True)
    assert report.dense_share == 1.0


def test_one_rank_is_required_or_filled_up(tmp_path):
    rules = [
        {"match": "*norm*.linear", "skip": True},
        {"match": "*single*", "branch": {"rank": 8}},
    ]
    recipe = {"scheme": "int4+bf16-r24", "rules": rules}
    save_quantized("flux", recipe, tmp_path / "quantized")
    message = refused(tmp_path / "quantized", tmp_path / "out", "nunchaku-lite")
    assert "one rank for all layers, a multiple of 16, and there are 8, 24" in message
    assert "(`--pad-rank`). Quantize with the recipe 'nunchaku-int4'" in message
    report = export(tmp_path / "quantized", tmp_path / "out", "nunchaku-lite", pad_rank=True)
    assert report.counts["exact"] == len(report.layers)
    written = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    assert {t.shape[1] for name, t in written.items() if name.endswith("proj_up")} == {32}


def test_modulations_with_a_branch_are_not_put_on_4_bit_activations(tmp_path):
    save_quantized("flux", "int4+bf16-r16", tmp_path / "quantized")
    message = refused(tmp_path / "quantized", tmp_path / "out", "nunchaku-lite")
    assert "a modulation would run on 4-bit activations there" in message


@pytest.mark.parametrize(
    ("to", "reason"),
    [("gguf", "from a single file"), ("comfy", "ComfyUI's names")],
)
def test_a_class_that_the_target_does_not_take(tmp_path, to, reason):
    model = small_pixart(num_layers=1)
    loraq.quantize_(model, "int4-a16+bf16-r8", effort="fast", progress=False)
    loraq.save(model, tmp_path / "quantized")
    message = refused(tmp_path / "quantized", tmp_path / "out", to)
    assert "PixArtTransformer2DModel" in message
    assert reason in message
    assert "--to sdnq" in message


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "int8"}, "'int8' is none of"),
        ({"dtype": "float32"}, "holds its floats in bfloat16 or float16, and not in"),
    ],
)
def test_dtypes_that_cannot_be(place, tmp_path, options, reason):
    assert reason in refused(place / "nunchaku-lite", tmp_path / "out", "nunchaku-lite", **options)


def test_an_unknown_target_is_named_with_the_closest(place, tmp_path):
    assert "Did you mean 'sdnq'?" in refused(place / "sdnq", tmp_path / "out", "sdqn")


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_graph_needs_packages_that_are_named(place, tmp_path, monkeypatch, to):
    module = {"onnx": onnx_graph, "openvino": openvino_graph}[to]
    monkeypatch.setattr(f"loraq.exports.{to}.build_graph", module.build_graph)
    for library in ("onnxscript", "onnx_ir", "openvino"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingLibraryError, match=rf'pip install "loraq\[{to}\]"'):
        export(place / to, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_the_inputs_of_a_class_must_be_known(tmp_path, to):
    model = small_pixart(num_layers=1, use_additional_conditions=True)
    loraq.quantize_(model, "int4_b32-a16+bf16-r8", effort="fast", progress=False)
    loraq.save(model, tmp_path / "quantized")
    message = refused(tmp_path / "quantized", tmp_path / "out", to)
    assert "The inputs of PixArtTransformer2DModel with this configuration are not known" in message


def test_a_float_folder_is_no_source(place, tmp_path):
    export(place / "dense", tmp_path / "float", "dense")
    with pytest.raises(CheckpointError, match="is not a loraq checkpoint"):
        export(tmp_path / "float", tmp_path / "out", "sdnq")


def test_a_damaged_source_is_no_source(place, tmp_path):
    shutil.copytree(place / "sdnq", tmp_path / "damaged")
    file = tmp_path / "damaged/diffusion_pytorch_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="changed after it was written"):
        export(tmp_path / "damaged", tmp_path / "out", "sdnq")


def test_a_wrong_order_of_values_is_not_shipped(place, tmp_path, monkeypatch):
    original = Sdnq.tensors

    def swapped(self, layer):
        made = original(self, layer)
        name = f"{layer.head.name}.weight"
        return made | {name: (made[name] & 15) << 4 | made[name] >> 4}

    monkeypatch.setattr(Sdnq, "tensors", swapped)
    assert "would be another weight in the target" in refused(
        place / "sdnq", tmp_path / "out", "sdnq"
    )


# --- folders --------------------------------------------------------------------------------------


def test_an_export_is_replaced_and_nothing_else(place, tmp_path):
    export(place / "gguf", tmp_path / "out", "gguf")
    with pytest.raises(CheckpointError, match="the folder is not empty"):
        export(place / "sdnq", tmp_path / "out", "sdnq")
    export(place / "sdnq", tmp_path / "out", "sdnq", overwrite=True)
    assert not (tmp_path / "out/model.gguf").exists()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"it also holds mine\.txt"):
        export(place / "sdnq", tmp_path / "out", "sdnq", overwrite=True)


@pytest.mark.parametrize("link", [False, True])
def test_the_rest_of_a_pipeline_goes_along(place, tmp_path, link):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(place / "sdnq", pipeline / "transformer")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (pipeline / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "X"]}))
    (pipeline / "README.md").write_text("the model's own")
    (pipeline / "vae").mkdir()
    (pipeline / "vae/model.safetensors").write_bytes(b"weights")
    for _ in range(2):
        report = export(pipeline, tmp_path / "out", "sdnq", link=link, overwrite=True)
    files = files_of(tmp_path / "out")
    assert files["README.md"] == b"the model's own"
    assert "out/transformer" in files["transformer/README.md"].decode()
    assert "transformer/loraq.json" not in files
    assert report.files.keys() | {"loraq_export.json"} == files.keys()
    vae = tmp_path / "out/vae/model.safetensors"
    assert vae.samefile(pipeline / "vae/model.safetensors") == link


def test_shards(place, tmp_path):
    report = export(place / "sdnq", tmp_path / "out", "sdnq", shard_bytes=300_000)
    shards = [name for name in report.files if name.startswith("diffusion_pytorch_model-")]
    assert len(shards) > 1
    assert "diffusion_pytorch_model.safetensors.index.json" in report.files


def test_a_layer_that_stands_in_two_places_is_written_twice(tmp_path, monkeypatch):
    def share(model):
        block = model.transformer_blocks[0].attn
        block.to_k = block.to_q
        return model

    model = share(MODELS["flux"].build())
    loraq.quantize_(model, "int4-a16", keep="float", progress=False)
    loraq.save(model, tmp_path / "quantized")
    monkeypatch.setattr(
        "loraq.exports.source.empty_model", lambda folder: share(empty_model(folder))
    )
    report = export(tmp_path / "quantized", tmp_path / "out", "sdnq")
    assert report.counts["exact"] == len(report.layers)
    written = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    first, second = (
        {n.removeprefix(name): t for n, t in written.items() if n.startswith(name)}
        for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k")
    )
    assert first.keys() == second.keys() > {".bias"}
    assert all(torch.equal(first[part], second[part]) for part in first)


@pytest.mark.parametrize("to", ["sdnq", "gguf"])
def test_layers_that_the_class_keeps_in_8_bits_may_be_dense(tmp_path, to):
    recipe = {"scheme": "int4_b32-a16+bf16-r16", "keep": "int8"}
    model = save_quantized("flux", recipe, tmp_path / "quantized")
    kept = {name for name, layer in quantized_layers(model).items() if layer.record.get("kept")}
    assert kept
    done = export(tmp_path / "quantized", tmp_path / "out", to)
    assert {layer.name for layer in done.layers if layer.is_kept} == kept
    wanted = "exact" if to == "gguf" else "dense"
    assert {layer.fate for layer in done.layers if layer.is_kept} == {wanted}
    assert done.dense_share == 0.0


def test_a_lora_that_was_appended_before_is_a_part_of_the_branch(place, tmp_path, rng):
    name = "transformer_blocks.0.attn.to_q"
    factors = {
        f"transformer.{name}.lora_A.weight": torch.randn(4, 128, generator=rng),
        f"transformer.{name}.lora_B.weight": torch.randn(128, 4, generator=rng) * 0.05,
    }
    save_file(factors, tmp_path / "style.safetensors", {"format": "pt"})
    changed, file = tmp_path / "changed", tmp_path / "style.safetensors"
    loraq.append_lora(place / "sdnq", file, target=changed, progress=False)
    done = export(changed, tmp_path / "out", "sdnq")
    assert done.counts["exact"] == len(done.layers)
    written = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    assert written[f"{name}.svd_up"].shape == (128, 24)


def test_stacked_experts_are_dense_in_the_shape_of_the_model(tmp_path):
    from loraq.integrations.diffusers import _quiet_diffusers

    with _quiet_diffusers() as diffusers:
        model = small_model(diffusers.NucleusMoEImageTransformer2DModel)
    rules = [{"match": "*experts*|*.0.attn.to_q", "skip": False}, {"match": "*", "skip": True}]
    recipe = Recipe.from_dict(
        {"scheme": "int4_b32-a16", "method": "rtn", "keep": "float", "rules": rules}
    )
    loraq.quantize_(model, recipe, progress=False)
    loraq.save(model, tmp_path / "quantized")
    message = refused(tmp_path / "quantized", tmp_path / "out", "sdnq")
    assert "no layer of sdnq holds stacked experts" in message
    done = export(tmp_path / "quantized", tmp_path / "out", "sdnq", allow_dense=True)
    assert {layer.fate for layer in done.layers if len(layer.shape) == 3} == {"dense"}
    export(tmp_path / "quantized", tmp_path / "float", "dense", dtype="float32")
    loraq.dequantize_(model)
    wanted = model.state_dict()
    written = load_file(tmp_path / "float/diffusion_pytorch_model.safetensors")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name].float()) for name in wanted)


def test_several_quantized_models_of_a_pipeline_are_exported_one_by_one(place, tmp_path):
    pipeline = tmp_path / "pipeline"
    names = ("transformer", "transformer_2")
    for name in names:
        shutil.copytree(place / "sdnq", pipeline / name)
    index = {name: ["diffusers", "FluxTransformer2DModel"] for name in names}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    message = refused(pipeline, tmp_path / "out", "sdnq")
    assert "has 2 quantized models: transformer, transformer_2" in message
    assert "Export each from its own folder" in message
    export(pipeline / "transformer_2", tmp_path / "out", "sdnq")


# --- LoRAs ----------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path, rng) -> Path:
    """A LoRA on a quantized layer and on one that stays float."""
    tensors = {}
    for name, (n, k) in {
        "transformer_blocks.0.attn.to_q": (128, 128),
        "proj_out": (16, 128),
    }.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(4, k, generator=rng)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(n, 4, generator=rng) * 0.05
    save_file(tensors, tmp_path / "style.safetensors", {"format": "pt"})
    return tmp_path / "style.safetensors"


def delta(lora: Path, name: str) -> torch.Tensor:
    tensors = load_file(lora)
    down, up = (tensors[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
    return up @ down


@pytest.mark.parametrize("to", RECIPES)
def test_a_lora_is_stacked_onto_the_branch(place, tmp_path, lora, to):
    options = {"pad_rank": True} if to == "nunchaku-lite" else {"dtype": "float32"}
    done = export(place / to, tmp_path / "out", to, lora=[(lora, 0.5)], **options)
    plain = export(place / to, tmp_path / "plain", to, **options)
    changed = [a.name for a, b in zip(done.layers, plain.layers, strict=True) if a != b]
    name = "transformer_blocks.0.attn.to_q"
    assert to == "nunchaku-lite" or changed in ([name], ["double_blocks.0.img_attn.qkv"], [])
    if to == "sdnq":
        written = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
        branch = written[f"{name}.svd_up"] @ written[f"{name}.svd_down"]
        before = load_file(tmp_path / "plain/diffusion_pytorch_model.safetensors")
        base = before[f"{name}.svd_up"] @ before[f"{name}.svd_down"]
        assert torch.allclose(branch - base, 0.5 * delta(lora, name), atol=1e-5)
        assert torch.allclose(
            written["proj_out.weight"] - before["proj_out.weight"],
            0.5 * delta(lora, "proj_out"),
            atol=1e-5,
        )
    elif to == "dense":
        written, before = (
            load_file(tmp_path / folder / "diffusion_pytorch_model.safetensors")[f"{name}.weight"]
            for folder in ("out", "plain")
        )
        assert torch.allclose(written - before, 0.5 * delta(lora, name), atol=1e-5)
    elif TARGETS[to].about.branch_file:
        written = load_file(tmp_path / "out/branch.safetensors")
        native = "diffusion_model.double_blocks.0.img_attn.qkv"
        down = native if to == "comfy" else f"transformer.{name}"
        rank = 3 * 16 + 4 if to == "comfy" else 20
        assert written[f"{down}.lora_A.weight"].shape == (rank, 128)


def test_a_lora_for_another_model_is_refused(place, tmp_path, rng):
    names = {"transformer_blocks.0.attn.to_q": 64, "no.such.layer": 128}
    for name, width in names.items():
        tensors = {
            f"transformer.{name}.lora_A.weight": torch.randn(4, width, generator=rng),
            f"transformer.{name}.lora_B.weight": torch.randn(128, 4, generator=rng),
        }
        save_file(tensors, tmp_path / "other.safetensors", {"format": "pt"})
        with pytest.raises(loraq.LoraqError):
            export(place / "sdnq", tmp_path / "out", "sdnq", lora=[tmp_path / "other.safetensors"])
        assert not (tmp_path / "out").exists()


def test_memory_holds_one_layer(place, tmp_path, monkeypatch):
    """Every layer is written before the next one is read."""
    from loraq.exports.source import ExportSource
    from loraq.safetensors.layout import ShardLayout

    steps = []
    read, write = ExportSource.read_layer, ShardLayout.write

    def reading(self, head):
        steps.append("read")
        return read(self, head)

    def writing(self, folder, tensors, **options):
        steps.append("write")
        return write(self, folder, tensors, **options)

    monkeypatch.setattr(ExportSource, "read_layer", reading)
    monkeypatch.setattr(ShardLayout, "write", writing)
    report = export(place / "sdnq", tmp_path / "out", "sdnq")
    assert steps[: 2 * len(report.layers)] == ["read", "write"] * len(report.layers)


@pytest.mark.parametrize(("recipe", "rank"), [("int4-a8+w8a16-r33", 64), ("int4-a8+int8-r15", 16)])
def test_openvino_has_codes_of_a_branch_of_any_rank(tmp_path, monkeypatch, recipe, rank):
    held = {}

    def build(*given):
        held.update(given[-1].specs)
        return replace(given[-1], graph=b"graph", constants=b"numbers")

    monkeypatch.setattr("loraq.exports.openvino.build_graph", build)
    save_quantized("flux", recipe, tmp_path / "quantized")
    report = export(tmp_path / "quantized", tmp_path / "out", "openvino")
    assert {layer.fate for layer in report.layers} == {"exact"}
    made = {spec.shape[1] for name, spec in held.items() if name.endswith(".up_codes")}
    assert made == {rank}  # filled up to whole blocks, or to an even one
    assert not [name for name in held if name.endswith(".up")]
