"""Damaged, foreign and mismatched folders, and disks that refuse: one clear error each."""

import copy
import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loraq
from loraq import disk
from loraq.checkpoint.folder import file_sha256
from loraq.checkpoint.inspect import DenseWeights, compare
from loraq.checkpoint.manifest import Manifest
from loraq.checkpoint.partial import atomic_folder
from loraq.errors import CheckpointError
from loraq.recipe import Recipe
from loraq.rules import Rule


class Net(nn.Module):
    def __init__(self, *, width: int = 32, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width, bias=bias)
        self.norm = nn.LayerNorm(2 * width)
        self.last = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 4)


RECIPE = replace(
    Recipe.named("mxfp4+w8a8-r4"), method="lqer", rules=(Rule(match="head", skip=True),)
)


def net(seed: int = 0, **config) -> Net:
    torch.manual_seed(seed)
    return Net(**config)


@pytest.fixture(scope="module")
def model() -> Net:
    model = net()
    loraq.quantize_(model, RECIPE, progress=False)
    return model


@pytest.fixture(scope="module")
def pristine(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    loraq.save(model, folder / "one")
    loraq.save(model, folder / "shards", shard_bytes=3000)
    return folder


@pytest.fixture
def one(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine / "one", tmp_path / "one"))


@pytest.fixture
def shards(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine / "shards", tmp_path / "shards"))


def refused(
    folder: Path, match: str, *, target: nn.Module | None = None, verify: bool = True
) -> None:
    """Loading gives a `CheckpointError` with this message, and changes nothing in the target."""
    target = net(1) if target is None else target
    kinds = {name: type(module) for name, module in target.named_modules()}
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        loraq.load_into(target, folder, verify=verify)
    assert {name: type(module) for name, module in target.named_modules()} == kinds
    after = target.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def edit(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(path: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    relist(path.parent)


def relist(folder: Path) -> None:
    """Make the manifest agree with the files, as somebody who edits a folder on purpose would."""

    def change(content: dict) -> None:
        content["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in folder.iterdir()
            if path.name != "loraq.json"
        }

    edit(folder / "loraq.json", change)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 4, 100, -1])
@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file(one, left, verify):
    path = one / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    refused(one, r"'.*model\.safetensors' has \d+ bytes, \d+ are expected", verify=verify)


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_truncated_file_is_also_found_without_its_entry(one, left):
    path = one / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    relist(one)
    refused(one, r"'.*model\.safetensors' is truncated or not a safetensors file")


@pytest.mark.parametrize("place", [-1, -1000])
def test_a_flipped_bit(one, place):
    flip(one / "model.safetensors", place)
    refused(one, r"'.*model\.safetensors' was changed after it was written")
    loraq.load_into(net(1), one, verify=False)  # who says so gets what is there


def test_a_flipped_bit_in_a_later_shard(shards):
    flip(sorted(shards.glob("*.safetensors"))[-1], -1)
    refused(shards, r"'.*model-0000\d-of-0000\d\.safetensors' was changed")


def test_a_missing_file(one):
    (one / "model.safetensors").unlink()
    refused(one, r"'.*model\.safetensors' is missing\. Copy the whole folder")


def test_a_missing_shard(shards):
    lost = sorted(shards.glob("*.safetensors"))[1]
    lost.unlink()
    refused(shards, rf"'.*{lost.name}' is missing")
    relist(shards)
    refused(shards, rf"Shard '{lost.name}' is missing from '.*'")


def test_a_missing_index(shards):
    (shards / "model.safetensors.index.json").unlink()
    refused(shards, "index.json' is missing")
    relist(shards)
    refused(shards, "weight files and no index")


def test_two_indexes(shards):
    shutil.copy(shards / "model.safetensors.index.json", shards / "other.safetensors.index.json")
    refused(
        shards,
        r"has 2 index files: model\.safetensors\.index\.json, other\.safetensors\.index\.json\. "
        r"Keep one",
    )


def test_a_second_weight_file(one):
    shutil.copy(one / "model.safetensors", one / "model.fp16.safetensors")
    refused(one, r"holds weights that 'loraq\.json' does not list: model\.fp16\.safetensors")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda c: c["weight_map"].pop("norm.weight"),
            r"contradicts the shards .* on 1 tensors: norm\.weight",
        ),
        (
            lambda c: c["weight_map"].update(ghost=c["weight_map"]["norm.weight"]),
            "on 1 tensors: ghost",
        ),
        (
            lambda c: c["weight_map"].update({"norm.bias": c["weight_map"]["last.weight_packed"]}),
            r"on 1 tensors: norm\.bias",
        ),
        (
            lambda c: c["weight_map"].update(a="../other.safetensors"),
            r"names the file '\.\./other\.safetensors'",
        ),
        (lambda c: c["weight_map"].update(a="/etc/passwd"), "names the file '/etc/passwd'"),
        (
            lambda c: c["weight_map"].update(a="weights.bin"),
            r"Only \.safetensors files beside the index",
        ),
        (lambda c: c["weight_map"].update(a=3), "no usable 'weight_map'"),
        (lambda c: c.pop("weight_map"), "no usable 'weight_map'"),
        (lambda c: c.update(weight_map=["a"]), "no usable 'weight_map'"),
        (lambda c: c.update(weight_map={}), "contradicts the shards|no .safetensors"),
    ],
)
def test_an_index_that_is_wrong(shards, change, match):
    edit(shards / "model.safetensors.index.json", change)
    relist(shards)
    refused(shards, match)


def test_a_foreign_folder(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    refused(
        tmp_path,
        r"is not a loraq checkpoint: it has no 'loraq\.json'\. `loraq quantize SRC DST` makes one",
    )


def test_no_folder_and_a_file_in_its_place(tmp_path):
    (tmp_path / "file").touch()
    refused(tmp_path / "nowhere", "is not a loraq checkpoint")
    refused(tmp_path / "file", "is not a loraq checkpoint")


def test_pickle_files_are_never_read(one):
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        (one / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    loraq.load_into(net(1), one)
    (one / "model.safetensors").unlink()
    relist(one)
    refused(one, r"has no \.safetensors file\. Other weight files are not read")


# --- contents -------------------------------------------------------------------------------------


def test_missing_and_unexpected_keys_are_listed(one):
    def change(tensors):
        tensors["ghost.weight"] = tensors.pop("norm.weight")
        del tensors["first.proj_up_scale"]

    edit_weights(one / "model.safetensors", change)
    refused(
        one,
        r"does not fit Net\. Missing keys: first\.proj_up_scale, norm\.weight\. Unexpected keys: "
        r"ghost\.weight\.",
    )


@pytest.mark.parametrize(
    "name", ["first.weight_packed", "first.weight_scale", "norm.weight", "head.weight"]
)
def test_a_wrong_shape(one, name):
    edit_weights(
        one / "model.safetensors",
        lambda tensors: tensors.update({name: tensors[name][:-1].clone()}),
    )
    refused(one, rf"tensor '{name}' has shape \(\d+,.*\), the model wants \(\d+,.*\)")


@pytest.mark.parametrize(
    ("name", "dtype", "match"),
    [
        ("first.weight_packed", torch.int8, r"is I8\. Packed tensors are raw bytes \(U8\)"),
        ("last.proj_down_scale", torch.float32, r"is F32\. Packed tensors are raw bytes"),
        ("norm.weight", torch.int64, r"is I64, the model wants torch\.float32"),
        ("first.bias", torch.uint8, r"is U8, the model wants torch\.float32"),
        ("head.weight", torch.bool, "is BOOL, the model wants"),
        ("norm.weight", torch.float8_e4m3fn, r"is F8_E4M3, .* Float weights of 16 bits or more"),
        ("first.bias", torch.float8_e5m2, "is F8_E5M2, the model wants"),
        ("norm.bias", torch.complex64, "is C64, the model wants"),
    ],
)
def test_a_wrong_dtype(one, name, dtype, match):
    edit_weights(
        one / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(dtype)})
    )
    refused(one, f"tensor '{name}' {match}")


def test_a_buffer_of_another_kind(tmp_path):
    def counting() -> nn.Module:
        model = nn.Sequential(nn.Linear(32, 32))
        model.register_buffer("steps", torch.tensor([3]))
        model.register_buffer("mask", torch.tensor([True]))
        return model

    model = counting()
    loraq.quantize_(model, "int8-a16", progress=False)
    loraq.save(model, tmp_path / "a")
    loraq.load_into(counting(), tmp_path / "a")
    wrong = {"steps": (torch.ones(1), "F32"), "mask": (torch.ones(1, dtype=torch.uint8), "U8")}
    for name, (tensor, dtype) in wrong.items():
        folder = Path(shutil.copytree(tmp_path / "a", tmp_path / name))
        edit_weights(
            folder / "model.safetensors",
            lambda tensors, name=name, tensor=tensor: tensors.update({name: tensor}),
        )
        refused(folder, f"tensor '{name}' is {dtype}, the model wants", target=counting())


@pytest.mark.parametrize(
    ("recipe", "name", "code"),
    [
        ("mxfp4+w8a8-r4", "0.weight_scale", [255]),
        ("mxfp4+w8a8-r4", "0.weight_scale", [254]),  # 6 · 2^127 is infinite
        ("mxfp4+w8a8-r4", "0.proj_up_scale", [255]),
        ("nvfp4-a16", "0.weight_scale", [0x7F]),
        ("nvfp4-a16", "0.weight_global_scale", [0, 0, 0x80, 0x7F]),
        ("int4-a16+bf16-r4", "0.weight_scale", [0x80, 0x7F]),
        ("int4-a16+bf16-r4", "0.proj_down_packed", [0xC0, 0xFF]),
        ("int8-a16", "0.weight_scale", [0, 0, 0xC0, 0x7F]),
        ("fp8_e4m3-a16", "0.weight_packed", [0xFF]),
        ("mxfp8_e5m2-a16", "0.weight_packed", [0x7C]),
    ],
)
def test_bytes_that_stand_for_no_number(tmp_path, recipe, name, code):
    model = nn.Sequential(nn.Linear(64, 64))
    loraq.quantize_(model, replace(Recipe.named(recipe), method="lqer"), progress=False)
    loraq.save(model, tmp_path / "a")

    def break_one(tensors: dict) -> None:
        tensors[name].view(-1)[: len(code)] = torch.tensor(code, dtype=torch.uint8)

    edit_weights(tmp_path / "a/model.safetensors", break_one)
    refused(
        tmp_path / "a",
        rf"tensor '{name}' has 1 of \d+ values that are not finite",
        target=nn.Sequential(nn.Linear(64, 64)),
    )


def test_a_wrong_dtype_of_a_tied_tensor(tmp_path):
    tied = net()
    tied.norm.bias = tied.norm.weight
    loraq.quantize_(tied, RECIPE, progress=False)
    loraq.save(tied, tmp_path / "tied")
    assert Manifest.read(tmp_path / "tied").tied == {"norm.bias": "norm.weight"}
    edit_weights(
        tmp_path / "tied/model.safetensors",
        lambda t: t.update({"norm.weight": t["norm.weight"].long()}),
    )
    refused(tmp_path / "tied", "is I64")


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (lambda: nn.Sequential(nn.Linear(32, 64)), "The model has no layer 'first'"),
        (
            lambda: net(width=64),
            r"Layer 'first' is Linear\(in_features=64.*linear layer of shape \(64, 32\)",
        ),
        (lambda: net(bias=False), r"Unexpected keys: first\.bias"),
        (
            lambda: nn.ModuleDict({"first": nn.Conv2d(1, 1, 1), "last": nn.Linear(64, 32)}),
            "Layer 'first' is Conv2d",
        ),
        (
            lambda: nn.ModuleDict({**dict(net().named_children()), "more": nn.Linear(4, 4)}),
            r"Missing keys: more\.bias",
        ),
        (
            lambda: nn.ModuleDict({k: v for k, v in net().named_children() if k != "norm"}),
            r"Unexpected keys: norm\.",
        ),
    ],
)
def test_a_model_of_another_architecture(one, target, match):
    refused(one, match, target=target())


def test_a_quantized_model_of_another_architecture(one):
    target = net(width=64)
    loraq.quantize_(target, RECIPE, progress=False)
    refused(one, "Layer 'first'", target=target)


# --- the manifest ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, "1", None, [1], True, 1.0])
def test_another_format_version(one, version):
    edit(one / "loraq.json", lambda content: content.update(format_version=version))
    refused(one, r"has format version .*; this loraq reads 1\. Update loraq")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"text"',
        "\x00",
        '{"format_version": 1',
        "{'a': 1}",
        "[" * 100_000,
        "9" * 5000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_manifest_that_is_no_json_object(one, text):
    (one / "loraq.json").write_text(text)
    refused(one, r"loraq\.json")


def test_a_manifest_in_another_encoding(one):
    (one / "loraq.json").write_bytes(b"\xff\xfe{\x00}\x00")
    refused(one, "Cannot read '.*loraq.json'")


LAYER = ("layers", "first")
SCHEME = (*LAYER, "scheme")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("layers",), None),
        (("layers",), []),
        (("layers",), {"first": 3}),
        (("layers",), {"first": {}}),
        (("recipes",), 3),
        (("recipes",), []),
        (("tied",), 3),
        (("tied",), {"norm.bias": ["norm.weight"]}),
        (("files",), []),
        (("files",), {"model.safetensors": 3}),
        (("files",), {"model.safetensors": {"bytes": "many", "sha256": ""}}),
        (("files",), {"model.safetensors": {"bytes": float("inf"), "sha256": ""}}),
        (("files",), {"model.safetensors": {"bytes": float("nan"), "sha256": ""}}),
        ((*LAYER, "shape"), [64]),
        ((*LAYER, "shape"), [64, 32, 1]),
        ((*LAYER, "shape"), ["a", 32]),
        ((*LAYER, "shape"), [float("inf"), 32]),
        ((*LAYER, "shape"), [-64, 32]),
        ((*LAYER, "shape"), None),
        ((*LAYER, "recipe"), 7),
        ((*LAYER, "recipe"), -1),
        ((*LAYER, "recipe"), "0"),
        ((*LAYER, "recipe"), True),
        ((*LAYER, "shape"), [64.0, 32]),
        ((*LAYER, "shape"), [True, 32]),
        ((*LAYER, "relative_error"), "0.1"),
        ((*LAYER, "relative_error"), True),
        ((*LAYER, "source_sha256"), 3),
        ((*LAYER, "absorbed"), {"sha256": "a"}),
        ((*LAYER, "absorbed"), ["sha256", "scale"]),
        ((*SCHEME, "rotation"), True),
        ((*SCHEME, "rotation"), 32.0),
        ((*SCHEME, "branch", "rank"), True),
        ((*SCHEME, "branch", "intermediate"), 8),
        (("recipes",), [3]),
        (("tied",), {"a": "norm.weight", "b": "a"}),
        (("tied",), {"a": "b", "b": "a"}),
        (("tied",), {"a\x1b[31m": "norm.weight"}),
        (("files",), {"model.safetensors": {"bytes": True, "sha256": ""}}),
        (("files",), {"model.safetensors": {"bytes": 1.0, "sha256": ""}}),
        (("files",), {"model.safetensors": {"bytes": 1, "sha256": None}}),
        (("files",), {"x" * 300: {"bytes": 1, "sha256": ""}}),
        (("files",), {"a\0b": {"bytes": 1, "sha256": ""}}),
        (SCHEME, None),
        (SCHEME, {}),
        ((*SCHEME, "weight"), "mxfp5"),
        ((*SCHEME, "weight"), 4),
        ((*SCHEME, "weight"), ["mxfp4"]),
        ((*SCHEME, "activation"), None),
        ((*SCHEME, "ghost"), 1),
        ((*SCHEME, "branch"), 3),
        ((*SCHEME, "branch", "rank"), 0),
        ((*SCHEME, "branch", "rank"), 1000),
        ((*SCHEME, "branch", "rank"), "4"),
        ((*SCHEME, "branch", "rank"), 4.5),
        ((*SCHEME, "branch", "rank"), None),
        ((*SCHEME, "branch", "weight"), "nothing"),
        ((*SCHEME, "branch", "ghost"), 1),
    ],
    ids=lambda part: str(part)[:50],
)
def test_a_manifest_with_nonsense_in_it(one, path, value):
    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    edit(one / "loraq.json", change)
    # Infinities are no plain JSON, whatever they stand for.
    refused(
        one,
        r"'.*loraq\.json' is damaged: .*\. Quantize again, or restore the file"
        r"|Cannot read '.*loraq\.json': it has the number (inf|nan), and only finite",
    )


@pytest.mark.parametrize("key", ["layers", "recipes", "tied", "files"])
def test_a_manifest_without_one_of_its_parts(one, key):
    edit(one / "loraq.json", lambda content: content.pop(key))
    refused(one, f"is damaged: the manifest has no '{key}'")


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", ""]
)
def test_a_manifest_that_names_files_elsewhere(one, file):
    edit(
        one / "loraq.json",
        lambda content: content["files"].update({file: {"bytes": 1, "sha256": ""}}),
    )
    refused(one, "Only files beside it are read|is missing")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c["layers"].pop("first"), "Missing keys: first.weight"),
        (lambda c: c["layers"].update(ghost=c["layers"]["first"]), "no layer 'ghost'"),
        (lambda c: c["layers"].update({"": c["layers"]["first"]}), "Layer '' is Net"),
        (lambda c: c["layers"].update(norm=c["layers"]["first"]), "Layer 'norm' is LayerNorm"),
        (
            lambda c: c["layers"]["first"]["scheme"].update(weight="int4"),
            "tensor 'first.weight_scale' has shape",
        ),
        (
            lambda c: c["layers"]["first"]["scheme"].update(weight="nvfp4"),
            "Missing keys: first.weight_global_scale",
        ),
        (
            lambda c: c["layers"]["first"]["scheme"].update(branch=None),
            "Unexpected keys: first.proj_down_packed",
        ),
        (
            lambda c: c["layers"]["first"]["scheme"]["branch"].update(rank=3),
            "first.proj_.* has shape",
        ),
        (lambda c: c["tied"].update(ghost="norm.weight"), "Unexpected keys: ghost"),
        (lambda c: c["tied"].update(ghost="nowhere"), "tied to tensors that are missing: nowhere"),
        (
            lambda c: c["tied"].update({"norm.bias": "norm.weight"}),
            r"stored and tied too: norm\.bias",
        ),
    ],
)
def test_a_manifest_that_contradicts_the_tensors(one, change, match):
    edit(one / "loraq.json", change)
    refused(one, match)


def test_a_tie_to_a_tensor_that_is_not_there(one):
    edit_weights(one / "model.safetensors", lambda tensors: tensors.pop("norm.bias"))
    edit(one / "loraq.json", lambda content: content["tied"].update({"norm.bias": "nowhere"}))
    refused(one, "Missing keys: norm.bias")


def test_comparing_damaged_folders_is_an_error_too(one, pristine):
    edit_weights(
        one / "model.safetensors",
        lambda t: t.update({"first.weight_packed": t["first.weight_packed"][:-1].clone()}),
    )
    with pytest.raises(
        CheckpointError,
        match=r"'first\.weight_packed' is U8 of shape \(63, 16\), and U8 of shape \(64, 16\)",
    ):
        compare(pristine / "one", one)
    edit_weights(one / "model.safetensors", lambda tensors: tensors.pop("first.weight_packed"))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing: first\.weight_packed"):
        DenseWeights(one).read("first")


# --- writing --------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_with_something_in_it_is_refused(model, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_text("data")
    with pytest.raises(CheckpointError, match=r"Cannot write '.*target': the folder is not empty"):
        loraq.save(model, tmp_path / "target")
    assert names(tmp_path / "target") == ["precious"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_place_of_the_folder_is_refused(model, tmp_path, overwrite):
    (tmp_path / "target").write_text("data")
    with pytest.raises(CheckpointError, match="a file of this name exists"):
        loraq.save(model, tmp_path / "target", overwrite=overwrite)
    with pytest.raises(CheckpointError, match=r"'.*target' is a file"):
        loraq.save(model, tmp_path / "target" / "inside", overwrite=overwrite)
    assert (tmp_path / "target").read_text() == "data"


def test_overwriting_replaces_the_whole_folder(model, shards):
    loraq.save(model, shards, overwrite=True)
    assert names(shards) == ["loraq.json", "model.safetensors"]
    assert names(shards.parent) == ["shards"]
    loraq.load_into(net(1), shards)


FAILURES = {
    "full": (
        OSError(errno.ENOSPC, "No space left on device"),
        CheckpointError,
        "the disk is full.*Free space",
    ),
    "over quota": (
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        CheckpointError,
        "the disk is full",
    ),
    "broken": (OSError(errno.EIO, "Input/output error"), CheckpointError, "Input/output error"),
    "interrupted": (KeyboardInterrupt(), KeyboardInterrupt, None),
    "bug": (ZeroDivisionError(), ZeroDivisionError, None),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_failure_in_the_middle_of_writing_leaves_nothing(
    model, tmp_path, monkeypatch, failure, after
):
    error, kind, match = FAILURES[failure]
    calls = []

    def failing(descriptor, raw, place):
        calls.append(place)
        if len(calls) > after:
            raise error
        return pwrite(descriptor, raw[: 1 + len(raw) // 2], place)

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(kind, match=match):
        loraq.save(model, tmp_path / "target", shard_bytes=3000)
    assert len(calls) == after + 1
    assert names(tmp_path) == []


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_in_the_middle_of_writing_keeps_the_old_folder(model, one, monkeypatch, failure):
    error, kind, match = FAILURES[failure]
    before = {path.name: path.read_bytes() for path in one.iterdir()}

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(kind, match=match):
        loraq.save(model, one, overwrite=True)
    assert {path.name: path.read_bytes() for path in one.iterdir()} == before
    assert names(one.parent) == ["one"]


def test_a_failing_last_rename_puts_the_old_folder_back(model, one, monkeypatch):
    def failing(one: Path, other: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk, "exchange", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        loraq.save(model, one, overwrite=True)
    assert names(one.parent) == ["one"]
    loraq.load_into(net(1), one)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="for root everything is writable"
)
def test_a_read_only_parent(model, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="is read-only"):
            loraq.save(model, tmp_path / "target")
        with pytest.raises(CheckpointError, match="is read-only"):
            loraq.save(model, tmp_path / "deeper" / "target")
    finally:
        tmp_path.chmod(0o700)


def test_a_parent_that_is_said_to_be_read_only(model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for target in (tmp_path / "target", tmp_path / "deeper" / "target"):
        with pytest.raises(CheckpointError, match=f"'{tmp_path}' is read-only"):
            loraq.save(model, target)
    assert names(tmp_path) == []


def test_an_error_inside_an_atomic_folder_is_passed_on_as_it_is(tmp_path):
    error = CheckpointError("mine")
    with pytest.raises(CheckpointError) as raised, atomic_folder(tmp_path / "a") as partial:
        raise (partial / "file").touch() or error
    assert raised.value is error
    assert names(tmp_path) == []


def test_a_model_is_not_changed_by_a_failing_save(model, tmp_path, monkeypatch):
    before = copy.deepcopy(model.state_dict())

    def failing(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(CheckpointError):
        loraq.save(model, tmp_path / "target")
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32))
    loraq.quantize_(model, RECIPE, progress=False)
    model[0].bias = nn.Parameter(model[0].bias.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"'0\.bias' is torch\.float8_e4m3fn"):
        loraq.save(model, tmp_path / "target")
    model[0].bias = nn.Parameter(model[0].bias.float())
    model[0].record["relative_error"] = float("inf")
    with pytest.raises(CheckpointError, match="Only finite numbers can be read back"):
        loraq.save(model, tmp_path / "target")
    assert names(tmp_path) == []


def test_a_manifest_of_more_layers_than_any_model_has_is_refused_at_once(one):
    content = json.loads((one / "loraq.json").read_text())
    layer = content["layers"]["first"]
    content["layers"] = {f"layers.{i}": layer for i in range(10_001)}
    (one / "loraq.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="it has 10001 layers, and at most 10000 are read"):
        Manifest.read(one)
