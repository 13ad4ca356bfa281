"""Streaming without diffusers: the bytes that `quantize_` and `save` give, resumed runs, and
disks that refuse.
"""

import json
import math
import os
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loraq
from loraq.checkpoint.manifest import Manifest
from loraq.checkpoint.partial import PartialFolder
from loraq.errors import CheckpointError
from loraq.pipeline.source import Source
from loraq.recipe import Recipe
from loraq.safetensors.header import read_header
from loraq.safetensors.layout import write_shards
from tests.folders import files_of

RECIPE = "mxfp4+w8a8-r8"
N_LAYERS = 4


def net(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Linear(64, 48),
        nn.LayerNorm(48),
        nn.Linear(48, 96, bias=False),
        nn.Linear(96, 33),
        nn.Linear(33, 16),
    )
    return nn.Sequential(*layers).to(dtype)


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(net().state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def expected(source, tmp_path) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    quantize(source, tmp_path / "expected")
    return files_of(tmp_path / "expected")


def quantize(source: Path, target: Path, recipe=RECIPE, **options):
    recipe = (
        Recipe.from_dict({**Recipe.named(recipe).to_dict(), "method": "lqer"})
        if recipe == RECIPE
        else recipe
    )
    return loraq.quantize_checkpoint(source, target, recipe, **{"progress": False, **options})


def edit(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


class At:
    """A progress callback that does something after the n-th call."""

    def __init__(self, n: int, action) -> None:
        self.n, self.action, self.events = n, action, []

    def __call__(self, *event) -> None:
        self.events.append(event)
        if len(self.events) == self.n:
            self.action()


def interrupt() -> None:
    raise KeyboardInterrupt


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [2_000_000_000, 3000])
@pytest.mark.parametrize("recipe", ["mxfp4+w8a8-r8", "nvfp4-a16+bf16-r5", "int4", "mxint4+bf16-r3"])
def test_the_bytes_are_those_of_quantizing_in_memory(tmp_path, recipe, shard_bytes):
    model = net()
    # In the order of the model, as `save_pretrained` does.
    write_shards(model.state_dict(), tmp_path, "model")
    chosen = Recipe.from_dict({**Recipe.named(recipe).to_dict(), "method": "lqer"})
    quantize(tmp_path / "model.safetensors", tmp_path / "a", chosen, shard_bytes=shard_bytes)
    loraq.quantize_(model, chosen, progress=False)
    loraq.save(model, tmp_path / "b", shard_bytes=shard_bytes)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_file_without_a_class_gives_a_folder_to_load_into(tmp_path, dtype):
    save_file(net(dtype).state_dict(), tmp_path / "model.safetensors")
    report = quantize(tmp_path / "model.safetensors", tmp_path / "out")
    assert [layer.name for layer in report.layers] == ["0", "2", "3", "4"]
    loaded = net(dtype)
    loraq.load_into(loaded, tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {dtype, torch.uint8}
    assert sorted(files_of(tmp_path / "out")) == ["loraq.json", "model.safetensors"]


def test_a_1x1_convolution_is_a_matrix(tmp_path):
    weight = torch.randn(48, 32, 1, 1, generator=torch.Generator().manual_seed(0))
    save_file(
        {"conv.weight": weight, "deep.weight": torch.randn(8, 8, 3, 3)}, tmp_path / "a.safetensors"
    )
    save_file({"conv.weight": weight.view(48, 32)}, tmp_path / "b.safetensors")
    for name in "ab":
        quantize(tmp_path / f"{name}.safetensors", tmp_path / name)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert a["deep.weight"].shape == (8, 8, 3, 3)


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_a_byte(source, expected, tmp_path):
    quantize(source, tmp_path / "out", workers=2)
    assert files_of(tmp_path / "out") == expected


def test_workers_begin_with_the_largest_layer(source, tmp_path):
    progress = At(0, None)
    quantize(source, tmp_path / "out", progress=progress)
    assert [event[:3] for event in progress.events] == [
        (1, 4, "2"),
        (2, 4, "3"),
        (3, 4, "0"),
        (4, 4, "4"),
    ]


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(1, N_LAYERS + 1))
def test_an_interrupted_run_goes_on_where_it_was(source, expected, tmp_path, after):
    with pytest.raises(
        KeyboardInterrupt, match=rf"{after} of 4 layers are kept; run the same command to go on"
    ):
        quantize(source, tmp_path / "out", progress=At(after, interrupt))
    assert not (tmp_path / "out").exists()
    rest = At(0, None)
    report = quantize(source, tmp_path / "out", progress=rest)
    assert [event[0] for event in rest.events] == list(range(after + 1, N_LAYERS + 1))
    assert report.kept == after
    assert [layer.name for layer in report.layers] == ["0", "2", "3", "4"]
    assert files_of(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out", "source"]


def test_a_run_that_was_killed_right_after_its_last_rename_is_finished(
    source, expected, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(PartialFolder, "remove", lambda self: None)
        quantize(source, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "journal.jsonl").exists()
    report = quantize(source, tmp_path / "out", progress=At(1, interrupt))
    assert report.kept == N_LAYERS
    assert report.mean_relative_error > 0
    assert files_of(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out", "source"]


def test_a_run_that_has_ended_is_complete_whatever_else_it_may_do(source, expected, tmp_path):
    first = quantize(source, tmp_path / "out", progress=False)
    for options in ({}, {"overwrite": True}, {"workers": 2}, {"link": True}):
        again = quantize(source, tmp_path / "out", progress=At(1, interrupt), **options)
        assert again.already_complete
        assert [replace(layer, seconds=0.0) for layer in first.layers] == list(again.layers)
    assert again.kept == N_LAYERS
    assert files_of(tmp_path / "out") == expected
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", progress=At(1, interrupt), overwrite=True, restart=True)


CHANGES = {
    "weights": lambda source, out: save_file(
        {name: 2 * tensor for name, tensor in net().state_dict().items()},
        source / "model.safetensors",
    ),
    "a kept tensor": lambda source, out: save_file(
        {**net().state_dict(), "1.bias": torch.ones(48, dtype=torch.bfloat16)},
        source / "model.safetensors",
    ),
    "the weights in another dtype": lambda source, out: save_file(
        {name: tensor.view(torch.float16) for name, tensor in net().state_dict().items()},
        source / "model.safetensors",
    ),
    "a kept tensor in another shape": lambda source, out: save_file(
        {**net().state_dict(), "1.bias": net().state_dict()["1.bias"].view(4, 12)},
        source / "model.safetensors",
    ),
    "an absorbed LoRA": lambda source, out: edit_manifest(
        out, lambda m: m["layers"]["0"].update(absorbed={"sha256": "0" * 64, "scale": 1.0})
    ),
    "a byte of the target": lambda source, out: flip_a_byte(out / "model.safetensors"),
    "a version": lambda source, out: (out / "loraq.json").write_text(
        (out / "loraq.json").read_text().replace('"loraq": "', '"loraq": "9.')
    ),
    "the manifest": lambda source, out: (out / "loraq.json").write_text("{}"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_folder_is_not_complete_if_anything_differs(source, tmp_path, changed):
    quantize(source, tmp_path / "out")
    CHANGES[changed](source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not empty"):
        quantize(source, tmp_path / "out")


@pytest.mark.parametrize(
    "options", [{"recipe": "mxfp4+w6a6-r8"}, {"recipe": "mxfp4"}, {"shard_bytes": 2000}]
)
def test_a_folder_of_other_settings_is_not_complete(source, tmp_path, options):
    quantize(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not empty"):
        quantize(source, tmp_path / "out", **options)


def edit_manifest(folder: Path, edit) -> None:
    content = json.loads((folder / "loraq.json").read_text())
    edit(content)
    (folder / "loraq.json").write_text(json.dumps(content))


def test_what_somebody_puts_among_the_files_of_a_run_is_not_published(source, tmp_path):
    out = tmp_path / "out"

    def meddle(done, *_):
        files = out.with_name(".out.partial") / "files"
        if done == 1:
            (files / "model-late.safetensors").touch()
            (files / "empty").mkdir()
            (files / "link").symlink_to(tmp_path)

    quantize(source, out, progress=meddle)
    assert sorted(path.name for path in out.iterdir()) == ["loraq.json", "model.safetensors"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def interrupted(source: Path, target: Path, after: int = 2) -> Path:
    with pytest.raises(KeyboardInterrupt):
        quantize(source, target, progress=At(after, interrupt))
    return target.with_name(f".{target.name}.partial") / "files"


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (
            {"recipe": "nvfp4+bf16-r5"},
            r"Changed: recipe \(.*method: 'lqer' then, 'loraq' now.*layout",
        ),
        ({"shard_bytes": 1000}, r"Changed: layout \(.*1 files, .* then, .* files, .* now"),
    ],
)
def test_other_settings_are_refused(source, expected, tmp_path, changed, match):
    interrupted(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match=match):
        quantize(source, tmp_path / "out", **changed)
    assert quantize(source, tmp_path / "out").kept == 2
    assert files_of(tmp_path / "out") == expected


def test_a_changed_weight_of_a_finished_layer_is_refused(source, tmp_path):
    interrupted(source, tmp_path / "out")  # "2" and "3" are the largest

    edit(source / "model.safetensors", lambda tensors: tensors["3.weight"][0].mul_(2))
    with pytest.raises(
        CheckpointError, match=r"'3' is not what it was.*`--restart`.* 2 of 4 layers are kept"
    ):
        quantize(source, tmp_path / "out")
    assert quantize(source, tmp_path / "out", restart=True).kept == 0


def test_a_changed_weight_that_comes_later_is_used(source, tmp_path):
    interrupted(source, tmp_path / "out")
    edit(source / "model.safetensors", lambda tensors: tensors["4.weight"].mul_(2))
    edit(source / "model.safetensors", lambda tensors: tensors["1.weight"].mul_(3))
    quantize(source, tmp_path / "out")
    quantize(source, tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_a_source_with_other_tensors_is_refused(source, tmp_path):
    interrupted(source, tmp_path / "out")
    edit(source / "model.safetensors", lambda tensors: tensors.update(more=torch.zeros(3)))
    with pytest.raises(CheckpointError, match=r"Changed: source \(model\.safetensors: .*layout"):
        quantize(source, tmp_path / "out")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_finished_bytes_that_were_damaged_are_made_again(source, expected, tmp_path, damage):
    path = interrupted(source, tmp_path / "out", after=3) / "model.safetensors"
    content = bytearray(path.read_bytes())
    place = read_header(path).offsets["2.weight_packed"] + 5
    content[place] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:place] if damage == "truncate" else content)
    kept = quantize(source, tmp_path / "out").kept
    assert kept == 2 if damage == "flip" else kept < 3
    assert files_of(tmp_path / "out") == expected


def test_a_source_that_changes_while_it_is_read_is_noticed(source, tmp_path):
    def change() -> None:
        edit(source / "model.safetensors", lambda tensors: tensors["4.weight"].mul_(2))

    with pytest.raises(
        CheckpointError, match=r"'4' changed while it was read.* 3 of 4 layers are kept"
    ):
        quantize(source, tmp_path / "out", progress=At(1, change))


@pytest.mark.parametrize("how", ["remove", "truncate"])
def test_a_source_that_vanishes(source, expected, tmp_path, how):
    path = source / "model.safetensors"
    content = path.read_bytes()
    action = path.unlink if how == "remove" else lambda: path.write_bytes(content[:-50])
    with pytest.raises(
        CheckpointError, match=r"Cannot read '.*weight' from.* 1 of 4 layers are kept"
    ):
        quantize(source, tmp_path / "out", progress=At(1, action))
    assert not (tmp_path / "out").exists()
    path.write_bytes(content)
    assert quantize(source, tmp_path / "out").kept == 1
    assert files_of(tmp_path / "out") == expected


# --- disks --------------------------------------------------------------------------------------


def test_a_limit_on_the_size_of_files_in_the_middle(source, expected, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    place = math.ceil(os.stat(tmp_path / "expected" / "model.safetensors").st_size / 4)
    try:
        with pytest.raises(
            CheckpointError, match=r"Cannot write '.*out': .*File too large.* of 4 layers are kept"
        ):
            quantize(source, tmp_path / "out",
                     progress=At(1, lambda: resource.setrlimit(
                         resource.RLIMIT_FSIZE, (place, hard))))  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    assert quantize(source, tmp_path / "out").kept >= 1
    assert files_of(tmp_path / "out") == expected


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", place],
        capture_output=True,
        check=False,
    )
    if not mounted or mounted.returncode:
        pytest.skip("this user cannot mount a small disk")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_up_in_the_middle(source, expected, small_disk):
    def fill() -> None:
        with (small_disk / "filler").open("wb") as filler:
            while True:
                try:
                    os.write(filler.fileno(), bytes(1024))
                except OSError:
                    return

    with pytest.raises(
        CheckpointError, match=r"the disk is full\. Free space.* 4 of 4 layers are kept"
    ):
        # The place of every layer was reserved.
        quantize(source, small_disk / "out", progress=At(1, fill))
    assert sorted(path.name for path in small_disk.iterdir()) == [".out.partial", "filler"]
    (small_disk / "filler").unlink()
    assert quantize(source, small_disk / "out").kept == 4
    assert files_of(small_disk / "out") == expected


def test_a_disk_that_is_too_small_is_known_before_work(source, small_disk):
    (small_disk / "filler").write_bytes(bytes(120 * 1024))
    with pytest.raises(CheckpointError, match=r"GB free and about .* GB are needed"):
        quantize(source, small_disk / "out", progress=At(1, interrupt))
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.skipif(os.geteuid() == 0, reason="for root everything is writable")
def test_a_read_only_target(source, tmp_path):
    place = tmp_path / "place"
    place.mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="is read-only"):
        quantize(source, place / "out", progress=At(1, interrupt))


# --- nothing is written that was not checked ------------------------------------------------------


def test_a_kept_tensor_that_changes_after_it_was_checked_is_refused(source, tmp_path, monkeypatch):
    hash_weights = Source.hash_weights

    def change(self: Source) -> dict[str, str]:
        hashes = hash_weights(self)
        edit(source / "model.safetensors", lambda tensors: tensors["1.bias"].add_(1))
        return hashes

    monkeypatch.setattr(Source, "hash_weights", change)
    with pytest.raises(CheckpointError, match=r"'1\.bias' changed while it was read"):
        quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tensor", ["1.bias", "2.weight_packed", "4.weight_scale"])
@pytest.mark.parametrize("shard_bytes", [2_000_000_000, 3000])
def test_the_manifest_blesses_no_byte_that_changed_on_the_disk(
    source, tmp_path, tensor, shard_bytes
):
    def change_last(done: int, *_: object) -> None:
        if done == N_LAYERS:
            (folder,) = tmp_path.glob(".out*")
            for path in folder.rglob("*.safetensors"):
                if (header := read_header(path)).specs.get(tensor):
                    with path.open("r+b") as file:
                        file.seek(header.offsets[tensor])
                        byte = file.read(1)
                        file.seek(header.offsets[tensor])
                        file.write(bytes([byte[0] ^ 1]))

    with pytest.raises(CheckpointError, match=rf"has changed {tensor.rpartition('.')[0]}"):
        quantize(source, tmp_path / "out", shard_bytes=shard_bytes, progress=change_last)
    assert not (tmp_path / "out").exists()
    quantize(source, tmp_path / "out", shard_bytes=shard_bytes)
    quantize(source, tmp_path / "fresh", shard_bytes=shard_bytes)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_save_notes_what_it_wrote_and_not_what_is_found(tmp_path, monkeypatch):
    model = net()
    loraq.quantize_(model, "mxfp4-a16", progress=False)
    write = Manifest.write

    def change(self: Manifest, folder: Path, files: dict[str, str]) -> None:
        path = folder / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        write(self, folder, files)

    monkeypatch.setattr(Manifest, "write", change)
    loraq.save(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        loraq.load_into(net(), tmp_path / "out")
