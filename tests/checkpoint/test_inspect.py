"""Looking into folders without a model: dense weights of any folder, and the difference of two."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loraq
from loraq.checkpoint.folder import file_sha256
from loraq.checkpoint.inspect import DenseWeights, compare, measure_memory, read_checked
from loraq.errors import CheckpointError
from loraq.layers import quantized_layers
from loraq.recipe import Recipe
from loraq.rules import Rule


def net(*, width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 48), nn.Linear(48, 40, bias=False), nn.Linear(40, 8))


def quantized(recipe: str, *, width: int = 32, **changes) -> nn.Module:
    model = net(width=width)
    loraq.quantize_(
        model, replace(Recipe.named(recipe), **{"method": "lqer", **changes}), progress=False
    )
    return model


def saved(model: nn.Module, folder: Path, **options) -> Path:
    if quantized_layers(model):
        loraq.save(model, folder, **options)
    else:
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("shard_bytes", [2_000_000_000, 500])
@pytest.mark.parametrize(
    "recipe",
    ["mxfp4", "mxfp4+w6a6-r7", "nvfp4+nvfp4-r4", "int4+bf16-r3", "fp8_e4m3", "nvfp4-a16+bf16-r5"],
)
def test_dense_weights_are_what_the_layers_reconstruct(tmp_path, recipe, shard_bytes):
    model = quantized(recipe)
    weights = DenseWeights(saved(model, tmp_path / "a", shard_bytes=shard_bytes))
    assert weights.quantized == ["0", "1", "2"]
    for name, layer in quantized_layers(model).items():
        dense = weights.read(name)
        assert dense.dtype == torch.float32
        assert torch.equal(dense, layer.reconstruct())


def test_dense_weights_of_a_float_folder_are_its_weights(tmp_path):
    model = net().bfloat16()
    weights = DenseWeights(saved(model, tmp_path / "a"))
    assert weights.quantized == []
    assert torch.equal(weights.read("1"), model[1].weight.float())


def test_a_layer_that_stayed_is_read_as_it_is(tmp_path):
    model = quantized("mxfp4", rules=(Rule(match="1", skip=True),))
    weights = DenseWeights(saved(model, tmp_path / "a"))
    assert weights.quantized == ["0", "2"]
    assert torch.equal(weights.read("1"), model[1].weight)


def test_a_layer_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tensor 'ghost\.weight'"):
        DenseWeights(saved(quantized("mxfp4"), tmp_path / "a")).read("ghost")


def test_the_difference_to_the_float_folder_is_the_error_of_the_layer(tmp_path):
    model = quantized("mxfp4+w8a8-r4")
    differences = compare(saved(net(), tmp_path / "float"), saved(model, tmp_path / "a"))
    assert [d.name for d in differences] == ["0", "1", "2"]
    assert [d.shape for d in differences] == [(48, 32), (40, 48), (8, 40)]
    for d in differences:
        assert d.relative_error == pytest.approx(
            model.get_submodule(d.name).record["relative_error"], rel=1e-5
        )


def test_a_folder_does_not_differ_from_itself(tmp_path):
    folder = saved(quantized("nvfp4+w8a8-r4"), tmp_path / "a")
    assert {d.relative_error for d in compare(folder, str(folder))} == {0.0}


def test_two_quantized_folders_and_layers_that_only_one_quantized(tmp_path):
    a = saved(quantized("mxfp4", rules=(Rule(match="0", skip=True),)), tmp_path / "a")
    b = saved(quantized("mxfp4+w8a8-r4", rules=(Rule(match="1", skip=True),)), tmp_path / "b")
    differences = {d.name: d.relative_error for d in compare(a, b)}
    assert set(differences) == {"0", "1", "2"}
    assert all(0 < error < 0.3 for error in differences.values())


def test_an_all_zero_layer_has_a_difference_too(tmp_path):
    model = net()
    nn.init.zeros_(model[0].weight)
    a = saved(model, tmp_path / "a")
    differences = compare(a, saved(quantized("mxfp4"), tmp_path / "b"))
    assert differences[0].relative_error > 0
    loraq.quantize_(model, replace(Recipe.named("mxfp4"), method="rtn"), progress=False)
    assert compare(a, saved(model, tmp_path / "c"))[0].relative_error == 0


def test_two_float_folders_are_nothing_to_compare(tmp_path):
    a, b = saved(net(), tmp_path / "a"), saved(net(), tmp_path / "b")
    with pytest.raises(CheckpointError, match="is quantized: there is nothing to compare"):
        compare(a, b)


def test_folders_of_other_models_are_refused(tmp_path):
    a = saved(quantized("mxfp4"), tmp_path / "a")
    with pytest.raises(
        CheckpointError, match=r"Layer '0' has shape \(48, 32\) in '.*a' and \(48, 64\) in '.*b'"
    ):
        compare(a, saved(quantized("mxfp4", width=64), tmp_path / "b"))
    with pytest.raises(CheckpointError, match=r"has no tensor '0\.weight'"):
        compare(a, saved(nn.Embedding(2, 2), tmp_path / "c"))
    with pytest.raises(CheckpointError, match="is not a folder"):
        compare(a, tmp_path / "nowhere")


def test_a_convolution_is_compared_as_a_matrix(tmp_path):
    def conv() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(40, 24, 1))

    model = conv()
    loraq.quantize_(model, "mxfp4", progress=False)
    folders = saved(conv(), tmp_path / "a"), saved(model, tmp_path / "b")
    assert DenseWeights(folders[0]).read("0").shape == (24, 40)
    (difference,) = compare(*folders)
    assert difference.shape == (24, 40)
    assert difference.relative_error == pytest.approx(model[0].record["relative_error"], rel=1e-5)


def edited(folder: Path, change_tensors=lambda tensors: None, change_layer=lambda layer: None):
    """Change a folder as somebody who makes its hashes right again."""
    file, manifest = folder / "model.safetensors", folder / "loraq.json"
    tensors, content = load_file(file), json.loads(manifest.read_text())
    change_tensors(tensors)
    save_file(tensors, file)
    change_layer(content["layers"]["0"])
    content["files"] = {
        file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)},
    }
    manifest.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("tensors", "layer", "match"),
    [
        (lambda t: t.pop("0.weight_scale"), {}, r"1 tensors are missing: 0\.weight_scale"),
        (lambda t: t.update({"0.weight": torch.ones(48, 32)}), {}, r"'0\.weight' is no part of"),
        (lambda t: t.update({"0.bias": torch.ones(47)}), {}, r"'0\.bias' is F32 of shape \(47,\)"),
        (lambda t: t.update({"0.bias": t["0.bias"].to(torch.float8_e4m3fn)}), {}, "is F8_E4M3"),
        (
            lambda t: t.update({"0.weight_packed": t["0.weight_packed"].flatten()}),
            {},
            r"'0\.weight_packed' is U8 of shape",
        ),
        (lambda t: t["0.weight_scale"].fill_(255), {}, "48 of 48 values that are not finite"),
        (lambda t: None, {"nbytes": 1}, "takes 816 bytes by its scheme and 1 as noted"),
        (lambda t: None, {"shape": [48, 30]}, "takes 768 bytes by its scheme and 816 as noted"),
    ],
)
def test_a_folder_that_contradicts_its_manifest_is_refused_by_name(tmp_path, tensors, layer, match):
    folder = saved(quantized("mxfp4"), tmp_path / "a")
    read_checked(folder)
    edited(folder, tensors, lambda entry: entry.update(layer))
    for look in (read_checked, measure_memory, lambda folder: compare(folder, folder)):
        with pytest.raises(CheckpointError, match=match):
            look(folder)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (torch.ones(48), r"'0\.weight' is F32 of shape \(48,\)"),
        (torch.ones(()), r"of shape \(\)"),
        (torch.ones(0, 32), r"of shape \(0, 32\)"),
        (torch.ones(48, 32, dtype=torch.complex64), "is C64 of shape"),
        (torch.ones(48, 32).to(torch.float8_e4m3fn), "is F8_E4M3 of shape"),
        (torch.full((48, 32), torch.nan), "has values that are not finite"),
        (torch.ones(48, 32, 2), r"has shape \(48, 64\) in"),
    ],
)
def test_a_weight_that_cannot_be_compared(tmp_path, weight, match):
    (tmp_path / "float").mkdir()
    save_file(net().state_dict() | {"0.weight": weight}, tmp_path / "float/model.safetensors")
    with pytest.raises(CheckpointError, match=match):
        compare(tmp_path / "float", saved(quantized("mxfp4"), tmp_path / "a"))
