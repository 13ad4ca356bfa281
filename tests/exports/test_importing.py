"""`import_checkpoint`: a folder of Nunchaku Lite as one of loraq, and what is refused."""

import json
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import loraq
from loraq.cli import main
from loraq.errors import CheckpointError
from loraq.formats import get_format
from loraq.layers import quantized_layers, replace_layer
from loraq.nn import QuantizedLinear
from loraq.packed import PackedWeight
from loraq.scheme import Scheme
from tests.exports.models import distance, exact_output, output, save_quantized
from tests.folders import files_of

pytest.importorskip("diffusers")

FILE = "diffusion_pytorch_model.safetensors"
RULES = [{"match": "*norm*.linear", "skip": True}]


def make(place, scheme, *, modulations=False):
    """Return a model, and folders of it: of loraq, and of Nunchaku Lite."""
    model = save_quantized("flux", {"scheme": scheme, "rules": RULES}, place / "first")
    floats = [name for name in dict(model.named_modules()) if re.search("norm.*linear$", name)]
    for name in floats if modulations else ():
        layer = model.get_submodule(name)
        plain = PackedWeight(Scheme("int4"), get_format("int4").quantize(layer.weight.detach()))
        replace_layer(model, name, QuantizedLinear.from_packed(plain, layer.bias))
    loraq.save(model, place / "ours")
    loraq.export(place / "ours", place / "lite", to="nunchaku-lite", progress=False)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("lite")
    make(place, "int4+bf16-r16")
    return place


def bring(source, target, **options):
    return loraq.import_checkpoint(source, target, progress=False, **options)


@pytest.mark.parametrize(
    ("scheme", "modulations"), [("int4+bf16-r16", True), ("nvfp4+bf16-r16", False)]
)
def test_what_was_exported_comes_back_byte_for_byte(tmp_path, scheme, modulations):
    model = make(tmp_path, scheme, modulations=modulations)
    report = bring(tmp_path / "lite", tmp_path / "back")
    loaded = loraq.load(tmp_path / "back")
    ours, back = quantized_layers(model), quantized_layers(loaded)
    assert {layer.name for layer in report.layers} == ours.keys() == back.keys()
    for name, layer in ours.items():
        wanted = layer.packed.tensors
        found = back[name].packed.tensors
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[part], wanted[part]) for part in wanted)
        assert back[name].scheme.is_weight_only
    state = loaded.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert distance(output(loaded, "flux"), exact_output(model, "flux")) < 1e-6


def test_a_folder_of_loraq_it_is(place, tmp_path):
    from diffusers import FluxTransformer2DModel

    import loraq.diffusers

    bring(place / "lite", tmp_path / "back")
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "back")
    assert quantized_layers(model)
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "back")])
    assert result.exit_code == 0, result.output
    again = loraq.export(tmp_path / "back", tmp_path / "sdnq", to="sdnq", progress=False)
    assert again.counts["exact"] == len(again.layers)


def test_a_smoothing_vector_is_a_scale_of_each_column(place, tmp_path, rng):
    shutil.copytree(place / "lite", tmp_path / "smooth")
    tensors = load_file(tmp_path / "smooth" / FILE)
    name = "transformer_blocks.0.attn.to_q"
    smooth = tensors[f"{name}.smooth_factor"]
    tensors[f"{name}.smooth_factor"] = torch.rand(smooth.shape, generator=rng).bfloat16() + 0.5
    save_file(tensors, tmp_path / "smooth" / FILE, {"format": "pt"})
    report = bring(tmp_path / "smooth", tmp_path / "back")
    assert {layer.scheme.weight for layer in report.layers} == {"int4", "int4_columns"}
    loaded = loraq.load(tmp_path / "back")
    assert loaded.get_submodule(name).scheme.weight == "int4_columns"
    refusal = r"a scale of each column"
    done = loraq.export(
        *(tmp_path / "back", tmp_path / "sdnq"), to="sdnq", allow_dense=True, progress=False
    )
    assert [layer.name for layer in done.layers if layer.fate == "dense"] == [name]
    assert [refusal[2:] in layer.reason for layer in done.layers if layer.fate == "dense"] == [True]


def test_the_rest_of_a_pipeline_goes_along(place, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(place / "lite", pipeline / "transformer")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (pipeline / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "X"]}))
    (pipeline / "vae").mkdir()
    (pipeline / "vae/model.safetensors").write_bytes(b"weights")
    bring(pipeline, tmp_path / "back")
    files = files_of(tmp_path / "back")
    assert files["vae/model.safetensors"] == b"weights"
    assert "transformer/loraq.json" in files
    assert "vae/model.safetensors" in json.loads(files["transformer/loraq.json"])["components"]


def test_the_command(place, tmp_path):
    asked = ["import", str(place / "lite"), str(tmp_path / "back")]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    assert "all of them the same numbers" in result.output
    result = CliRunner().invoke(main, [*asked, "--overwrite", "--json"])
    document = json.loads(result.stdout)
    assert document["layers"]["transformer_blocks.0.attn.to_q"]["rank"] == 16


# --- refusals -------------------------------------------------------------------------------------


def refused(source, target, **options):
    before = sorted(target.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        bring(source, target, **options)
    assert sorted(target.parent.iterdir()) == before
    return str(caught.value)


def test_only_folders_of_nunchaku_lite_are_imported(place, tmp_path):
    assert "quant_method: nunchaku_lite" in refused(place / "ours", tmp_path / "back")


def test_the_source_is_no_target(place, tmp_path):
    shutil.copytree(place / "lite", tmp_path / "lite")
    refused(tmp_path / "lite", tmp_path / "lite", overwrite=True)


def test_a_folder_with_other_tensors_is_refused(place, tmp_path):
    shutil.copytree(place / "lite", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / FILE)
    tensors["stranger"] = tensors.pop("proj_out.weight")
    save_file(tensors, tmp_path / "other" / FILE, {"format": "pt"})
    message = refused(tmp_path / "other", tmp_path / "back")
    assert "Missing keys: proj_out.weight. Unexpected keys: stranger" in message


def test_a_factor_that_is_no_number_leaves_nothing_behind(place, tmp_path):
    shutil.copytree(place / "lite", tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / FILE)
    name = "single_transformer_blocks.0.proj_out"
    tensors[f"{name}.proj_up"][3, 3] = torch.nan
    save_file(tensors, tmp_path / "broken" / FILE, {"format": "pt"})
    assert f"Layer '{name}' has values that are no numbers" in refused(
        tmp_path / "broken", tmp_path / "back"
    )


def test_a_layer_that_the_model_does_not_have_is_named(place, tmp_path):
    shutil.copytree(place / "lite", tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["quantization_config"]["svdq_w4a4"]["targets"].append("no.such.layer")
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    assert "names the layer 'no.such.layer'" in refused(tmp_path / "other", tmp_path / "back")


@pytest.mark.parametrize(
    "settings",
    [
        [1],
        {"precision": "int4", "rank": 16},
        {"precision": "int4", "rank": 16, "targets": None},
        {"precision": "int4", "rank": 16, "targets": "proj_out"},
        {"precision": "int4", "rank": 16, "targets": [1]},
        {"precision": "int4", "rank": 16, "targets": ["x_embedder", "x_embedder"]},
    ],
    ids=str,
)
def test_a_section_that_lists_no_layers_is_refused(place, tmp_path, settings):
    shutil.copytree(place / "lite", tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["quantization_config"]["svdq_w4a4"] = settings
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    assert "`targets` of `svdq_w4a4`" in refused(tmp_path / "other", tmp_path / "back")


@pytest.mark.parametrize("precision", [["int4"], None, 4, "int8"], ids=str)
def test_a_precision_that_is_none_is_refused(place, tmp_path, precision):
    shutil.copytree(place / "lite", tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["quantization_config"]["svdq_w4a4"]["precision"] = precision
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    assert "int4 or nvfp4 and a multiple" in refused(tmp_path / "other", tmp_path / "back")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("proj_out.weight", torch.zeros(3, 3)),
        ("proj_out.bias", torch.zeros(16, dtype=torch.int64)),
        ("transformer_blocks.0.attn.to_q.bias", torch.zeros(64)),
        ("transformer_blocks.0.attn.to_q.bias", torch.zeros(128, dtype=torch.int32)),
    ],
)
def test_a_tensor_of_another_shape_or_kind_is_refused_before_writing(place, tmp_path, name, tensor):
    shutil.copytree(place / "lite", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / FILE)
    save_file(tensors | {name: tensor}, tmp_path / "other" / FILE, {"format": "pt"})
    assert f"tensor '{name}'" in refused(tmp_path / "other", tmp_path / "back")
