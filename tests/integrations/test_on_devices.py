"""Files are quantized, loaded and run on every device of this machine, a GPU too (`make gpu`)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small.pixart import small_pixart, velocity

import loraq
from loraq.checkpoint.manifest import FILE_NAME
from loraq.devices import kind_of
from loraq.layers import quantized_layers
from loraq.recipe import Recipe
from tests.folders import files_of

pytest.importorskip("diffusers")

#: With everything that a solver does: a rotation, rounded activations, a branch, several steps.
ROTATED = replace(
    Recipe.named("int4-a4+w6a6-r8-h32"), options={"steps": 4, "refine_steps": 3}, keep="float"
)
PLAIN = replace(Recipe.named("mxfp4-a8+w6a8-r8"), options={"steps": 4, "refine_steps": 3})


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "transformer"
    small_pixart(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory) -> Path:
    """Quantized on the CPU; tests only read it."""
    folder = tmp_path_factory.mktemp("quantized") / "transformer"
    loraq.quantize_checkpoint(source, folder, ROTATED, device="cpu", progress=False)
    return folder


@pytest.mark.parametrize("recipe", [ROTATED, PLAIN], ids=["rotated", "plain"])
def test_a_folder_is_quantized_to_the_same_bytes_again(source, tmp_path, recipe, device):
    for name in ("one", "two"):
        loraq.quantize_checkpoint(source, tmp_path / name, recipe, device=device, progress=False)
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    layers = json.loads(one[FILE_NAME])["layers"].values()
    assert {layer["device"] for layer in layers} == {kind_of(device)}


def test_a_module_is_quantized_to_the_bytes_of_its_folder(source, tmp_path, device):
    loraq.quantize_checkpoint(source, tmp_path / "out", ROTATED, device=device, progress=False)
    model = small_pixart(torch.float32).to(device)
    loraq.quantize_(model, ROTATED, progress=False)
    stored, ours = loraq.load(tmp_path / "out", device=device).state_dict(), model.state_dict()
    assert stored.keys() == ours.keys()
    assert [name for name in stored if not torch.equal(stored[name], ours[name])] == []


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_folder_is_loaded_to_a_device_and_runs_there(folder, device, dtype):
    model = loraq.load(folder, device=device, dtype=dtype)
    tensors = [*model.state_dict().values(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {device.type}
    assert quantized_layers(model)
    y = velocity(model)
    assert (y.device.type, y.dtype) == (device.type, dtype or torch.float32)
    expected = velocity(loraq.load(folder, dtype=dtype))
    # The same sums in another order; activations of 4 bits that land on another code weigh more.
    assert (y.cpu() - expected).norm() <= 0.05 * expected.norm()
    moved = loraq.load(folder, dtype=dtype).to(device)
    assert torch.equal(velocity(moved), y)
