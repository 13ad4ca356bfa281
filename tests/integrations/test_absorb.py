"""`absorb_lora`: touched layers become what quantizing W + ΔW gives, all else stays as it was."""

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from small.pixart import small_pixart, velocity
from test_diffusers import OTHERS, RECIPE, quantize
from torch import nn

import loraq
from loraq.checkpoint.manifest import Manifest
from loraq.cli import main
from loraq.errors import CheckpointError, LayerError, LoraqError
from loraq.integrations.diffusers import load_float
from loraq.integrations.lora import Lora
from loraq.safetensors.reader import ShardReader
from tests.folders import alone, components_of, files_of

pytest.importorskip("diffusers")

#: Two quantized layers, and one that is kept in floats.
TOUCHED = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2")
KEPT = "transformer_blocks.1.attn2.to_k"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_pixart()


@pytest.fixture(scope="module")
def source(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "transformer"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "transformer"
    quantize(source, folder)
    return folder


@pytest.fixture(scope="module")
def lora(model, tmp_path_factory) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in (*TOUCHED, KEPT):
        n_out, n_in = model.get_submodule(name).weight.shape
        tensors[f"transformer.{name}.lora_A.weight"] = (
            torch.randn(4, n_in, generator=generator) / n_in**0.5
        )
        tensors[f"transformer.{name}.lora_B.weight"] = (
            torch.randn(n_out, 4, generator=generator) / 4
        )
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(tensors, file)
    return file


def fused(model: nn.Module, lora: Path, scale: float = 1.0) -> nn.Module:
    """The float model with W + ΔW, rounded nowhere."""
    model = copy.deepcopy(model)
    for name, adapter in Lora.read(lora).adapters.items():
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach().float() + scale * adapter.delta())
    return model


def test_touched_layers_are_those_of_the_sum_and_all_others_stay(
    model, source, folder, lora, tmp_path
):
    absorbed = loraq.absorb_lora(folder, lora, source, target=tmp_path / "out", progress=False)
    assert [layer.name for layer in absorbed.layers] == list(TOUCHED)
    assert absorbed.kept == (KEPT,)
    expected = fused(model, lora)
    loraq.quantize_(expected, RECIPE, progress=False)
    before, after = (
        load_file(place / "diffusion_pytorch_model.safetensors")
        for place in (folder, tmp_path / "out")
    )
    wanted = expected.state_dict()
    assert list(before) == list(after)
    for name, tensor in after.items():
        if name.rpartition(".")[0] in TOUCHED:
            assert torch.equal(tensor, wanted[name])
            assert torch.equal(tensor, before[name]) == name.endswith("bias")
        elif name == f"{KEPT}.weight":
            assert torch.equal(tensor, wanted[name].to(tensor.dtype))
            assert not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])
            assert tensor.dtype == before[name].dtype


def test_it_does_what_the_lora_does_to_the_float_model(lora, tmp_path):
    model = small_pixart(torch.float32)
    model.save_pretrained(tmp_path / "float")
    quantized = copy.deepcopy(model)
    loraq.quantize_(quantized, "mxint8", progress=False)
    before = velocity(quantized)
    loraq.absorb_lora(quantized, lora, tmp_path / "float", progress=False)
    exact = velocity(fused(model, lora)) - velocity(model)
    ours = velocity(quantized) - before
    assert (ours - exact).norm() < 0.1 * exact.norm()


def test_scale_zero_changes_no_byte_of_the_weights(source, folder, lora, tmp_path):
    loraq.absorb_lora(folder, lora, source, scale=0.0, target=tmp_path / "out", progress=False)
    before, after = files_of(folder), files_of(tmp_path / "out")
    assert before.pop("loraq.json") != after.pop("loraq.json")
    assert before == after


def test_the_scale_counts(model, source, folder, lora):
    quantized = loraq.load(folder)
    loraq.absorb_lora(quantized, lora, source, scale=0.5, progress=False)
    expected = fused(model, lora, 0.5)
    loraq.quantize_(expected, RECIPE, progress=False)
    for name in TOUCHED:
        ours, theirs = quantized.get_submodule(name), expected.get_submodule(name)
        assert torch.equal(ours.weight_packed, theirs.weight_packed)
        assert torch.equal(ours.proj_up_packed, theirs.proj_up_packed)


def test_a_model_that_was_cast_while_loading_still_finds_its_source(model, source, lora):
    quantized = nn.Module.to(copy.deepcopy(model), torch.float32)
    loraq.quantize_(quantized, RECIPE, progress=False)
    assert len(loraq.absorb_lora(quantized, lora, source, progress=False).layers) == 2


def test_the_manifest_says_what_was_absorbed(source, folder, lora, tmp_path):
    loraq.absorb_lora(folder, lora, source, scale=0.25, target=tmp_path / "out", progress=False)
    manifest, before = Manifest.read(tmp_path / "out"), Manifest.read(folder)
    marks = {
        name: layer.record["absorbed"]
        for name, layer in manifest.layers.items()
        if "absorbed" in layer.record
    }
    assert list(marks) == list(TOUCHED)
    assert all(mark["scale"] == 0.25 and len(mark["sha256"]) == 64 for mark in marks.values())
    assert all(
        manifest.layers[name].record["source_sha256"] == before.layers[name].record["source_sha256"]
        for name in TOUCHED
    )
    with pytest.raises(LayerError, match="has absorbed a LoRA before"):
        loraq.absorb_lora(tmp_path / "out", lora, source, target=tmp_path / "twice", progress=False)
    assert not (tmp_path / "twice").exists()


def test_a_layer_that_statistics_made_is_refused(source, lora, tmp_path, no_work):
    model = load_float(source)
    recipe = loraq.Recipe.of("mxfp4+w8a8-r8")
    names = [layer.name for layer in loraq.plan_model(model, recipe).quantized]
    stats = {name: _white(model.get_submodule(name).weight.shape[1]) for name in names}
    loraq.quantize_checkpoint(
        source, tmp_path / "out", replace(recipe, effort="fast"), stats=stats, progress=False
    )
    with pytest.raises(LayerError, match="was quantized with activation statistics"):
        loraq.absorb_lora(
            tmp_path / "out", lora, source, target=tmp_path / "absorbed", progress=False
        )
    assert not (tmp_path / "absorbed").exists()


def _white(width: int) -> loraq.ActivationStats:
    return loraq.ActivationStats(1, torch.ones(width))


@pytest.mark.parametrize("where", ["model", "its transformer", "source"])
def test_a_link_out_is_refused_before_work(source, folder, lora, tmp_path, where):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folder, pipeline / "transformer")
    shutil.copytree(source, tmp_path / "float")
    index = {"transformer": ["diffusers", "PixArt"]}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "secret").write_bytes(b"private")
    places = {
        "model": pipeline / "key",
        "its transformer": pipeline / "transformer" / "config.json",
        "source": tmp_path / "float" / "config.json",
    }
    places[where].unlink(missing_ok=True)
    places[where].symlink_to(tmp_path / "secret")
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match=rf"'{places[where].name}' \(a link out of it"):
        loraq.absorb_lora(
            pipeline, lora, tmp_path / "float", target=tmp_path / "out", progress=False
        )
    assert files_of(tmp_path) == before


def test_a_lora_that_changes_while_it_is_read_is_refused(
    source, folder, lora, tmp_path, monkeypatch
):
    copied, read = Path(shutil.copy(lora, tmp_path)), Lora.read

    def change(*given: object) -> Lora:
        found = read(*given)
        copied.write_bytes(copied.read_bytes()[:-1] + b"x")
        return found

    monkeypatch.setattr(Lora, "read", change)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        loraq.absorb_lora(folder, copied, source, target=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_keeps_its_other_components(source, folder, lora, tmp_path):
    for name, place in (("float", source), ("quantized", folder)):
        for other, content in OTHERS.items():
            (tmp_path / name / other).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / other).write_bytes(content)
        shutil.copytree(place, tmp_path / name / "transformer")
    loraq.absorb_lora(
        tmp_path / "quantized", lora, tmp_path / "float", target=tmp_path / "out", progress=False
    )
    loraq.absorb_lora(folder, lora, source, target=tmp_path / "alone", progress=False)
    written = files_of(tmp_path / "out")
    inner = {name for name in written if name.startswith("transformer/")}
    assert {name: written[name] for name in written.keys() - inner} == OTHERS
    assert alone(tmp_path / "out" / "transformer") == files_of(tmp_path / "alone")
    manifest = json.loads(written["transformer/loraq.json"])
    assert manifest["components"] == components_of(OTHERS)


@pytest.fixture
def no_work(monkeypatch):
    def solved(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr("loraq.integrations.absorb.quantize_layer", solved)


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("transformer.nowhere.to_q", (32, 32), "1 layers that .* nowhere.to_q"),
        (f"transformer.{TOUCHED[0]}", (32, 31), r"Layer '.*to_q' has the shape \(32, 32\)"),
    ],
)
def test_layers_that_do_not_fit_are_listed(no_work, source, folder, tmp_path, name, shape, match):
    n_out, n_in = shape
    save_file(
        {
            f"{name}.lora_A.weight": torch.ones(2, n_in),
            f"{name}.lora_B.weight": torch.ones(n_out, 2),
        },
        tmp_path / "x.safetensors",
    )
    with pytest.raises(LayerError, match=match):
        loraq.absorb_lora(
            folder, tmp_path / "x.safetensors", source, target=tmp_path / "out", progress=False
        )
    assert not (tmp_path / "out").exists()


def test_another_source_is_refused(no_work, folder, lora, tmp_path):
    torch.manual_seed(5)
    other = small_pixart()
    with torch.no_grad():
        other.get_submodule(TOUCHED[1]).weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(LayerError, match=rf"'{TOUCHED[1]}' was not made from the weights in"):
        loraq.absorb_lora(folder, lora, tmp_path / "other", target=tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match="is quantized already"):
        loraq.absorb_lora(folder, lora, folder, target=tmp_path / "out", progress=False)


def test_a_target_belongs_to_a_folder_and_not_to_a_model(no_work, source, folder, lora, tmp_path):
    with pytest.raises(CheckpointError, match="Give the new folder as `target`"):
        loraq.absorb_lora(folder, lora, source)
    with pytest.raises(CheckpointError, match="changed in place"):
        loraq.absorb_lora(loraq.load(folder), lora, source, target=tmp_path / "out")
    with pytest.raises(CheckpointError, match="Source and target are both"):
        loraq.absorb_lora(folder, lora, source, target=folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        loraq.absorb_lora(folder, lora, source, target=tmp_path / "out")


def test_a_layer_without_its_history_is_refused(no_work, source, folder, lora):
    quantized = loraq.load(folder)
    quantized.get_submodule(TOUCHED[0]).record = {}
    with pytest.raises(LayerError, match="does not say how it was made"):
        loraq.absorb_lora(quantized, lora, source)


def test_the_command_writes_what_the_call_writes(source, folder, lora, tmp_path):
    arguments = ["absorb-lora", folder, lora, tmp_path / "a", "--source", source, "--scale", "0.5"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == "2 layers quantized again, 1 float layers changed."
    loraq.absorb_lora(folder, lora, source, scale=0.5, target=tmp_path / "b", progress=False)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    result = CliRunner().invoke(main, [*map(str, arguments), "--overwrite", "--json"])
    found = json.loads(result.stdout)
    assert [layer["name"] for layer in found["layers"]] == list(TOUCHED)
    assert found["kept"] == [KEPT]


def test_a_lora_that_is_not_finite_is_refused_also_for_layers_that_stay_float(
    source, folder, lora, tmp_path
):
    tensors = load_file(lora)
    broken = tmp_path / "broken.safetensors"
    for name in tensors:
        save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, broken)
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            loraq.absorb_lora(
                folder, broken, source=source, target=tmp_path / "out", progress=False
            )
    with pytest.raises(LoraqError, match=r"'scale' of `absorb_lora` is nan"):
        loraq.absorb_lora(
            folder, lora, source=source, target=tmp_path / "out", scale=math.nan, progress=False
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failure", [OSError("I/O error"), KeyboardInterrupt()])
def test_a_failure_at_any_reading_leaves_the_model_as_it_was(
    source, folder, lora, monkeypatch, failure
):
    model = loraq.load(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [id(module) for module in model.modules()]
    read, n_read, stop_at = ShardReader.read, [], [0]

    def fail_at_k(reader, name):
        n_read.append(name)
        if len(n_read) == stop_at[0]:
            raise failure
        return read(reader, name)

    monkeypatch.setattr(ShardReader, "read", fail_at_k)
    loraq.absorb_lora(copy.deepcopy(model), lora, source, progress=False)
    for k in range(1, len(n_read) + 1):
        stop_at[0] = k
        n_read.clear()
        with pytest.raises(type(failure)):
            loraq.absorb_lora(model, lora, source, progress=False)
        assert [id(module) for module in model.modules()] == modules
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
