"""A quantized model in a folder that has other owners: a clone of a repository, an upload."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small.pixart import small_pixart, velocity

import loraq
from loraq.checkpoint.inspect import count_stored
from loraq.checkpoint.manifest import Manifest
from loraq.errors import CheckpointError, LoraqError
from loraq.recipe import Recipe
from tests.folders import files_of
from tests.syscalls import record

diffusers = pytest.importorskip("diffusers")
import loraq.diffusers  # noqa: E402

PixArt = diffusers.PixArtTransformer2DModel
RECIPE = replace(Recipe.named("int8-a16"), method="rtn")
FOREIGN = {
    "README.md": b"# card",
    ".gitattributes": b"*.safetensors filter=lfs",
    ".git/HEAD": b"ref: refs/heads/main\n",
    ".git/lfs/objects/model.safetensors": bytes(300),
    "images/grid.png": b"png",
    "pytorch_lora_weights.safetensors": b"not even a file of weights",
}


@pytest.fixture(scope="module")
def model():
    return small_pixart(torch.float32)


@pytest.fixture(scope="module")
def quantized(model):
    copy = small_pixart(torch.float32)
    loraq.quantize_(copy, RECIPE, progress=False)
    return copy


@pytest.fixture
def clone(tmp_path) -> Path:
    for name, content in FOREIGN.items():
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_bytes(content)
    return tmp_path / "clone"


def foreign_of(clone: Path) -> dict[str, bytes]:
    return {name: (clone / name).read_bytes() for name in FOREIGN if (clone / name).exists()}


def test_what_is_not_ours_is_kept_and_what_is_ours_is_replaced(model, quantized, clone, tmp_path):
    inodes = {name: os.stat(clone / name).st_ino for name in (*FOREIGN, ".git", ".")}
    quantized.save_pretrained(tmp_path / "plain")
    ours = files_of(tmp_path / "plain")
    model.save_pretrained(clone, max_shard_size="60KB")
    model.save_pretrained(clone, variant="fp16")
    for size in ("10GB", "40KB", "10GB"):
        quantized.save_pretrained(clone, max_shard_size=size)
        assert torch.equal(velocity(loraq.load(clone)), velocity(quantized))
        assert torch.equal(velocity(PixArt.from_pretrained(clone)), velocity(quantized))
    assert files_of(clone) == FOREIGN | ours
    assert {name: os.stat(clone / name).st_ino for name in inodes} == inodes
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "before",
    ["float", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("quantized", "nothing"))],
)
def test_a_kill_at_any_moment_leaves_a_model_or_a_refusal(model, quantized, clone, before):
    other = small_pixart(torch.float32)
    with torch.no_grad():
        other.proj_out.weight.mul_(2)
    loraq.quantize_(other, RECIPE, progress=False)
    if before == "float":
        model.save_pretrained(clone, max_shard_size="60KB")
    elif before == "quantized":
        other.save_pretrained(clone, max_shard_size="40KB")
    known = [velocity(m) for m in (model, quantized, other)]
    kept, moments, done = clone.with_name("kept"), 0, False
    shutil.copytree(clone, kept)
    while not done:
        shutil.rmtree(clone)
        shutil.copytree(kept, clone)
        calls = 0

        def kill(call, last=moments):
            nonlocal calls
            calls += clone in (call.path, *call.path.parents, *(call.to or call.path).parents)
            if calls > last:
                raise Killed

        try:
            with record(clone.parent, kill):
                quantized.save_pretrained(clone)
            done = True
        except Killed:
            moments += 1
        assert foreign_of(clone) == FOREIGN
        for load in (PixArt.from_pretrained, loraq.load):
            try:
                loaded = load(clone).eval()
            except (LoraqError, OSError):  # it has no weights, says diffusers
                assert not done
                continue
            found = velocity(loaded)
            assert any(torch.equal(found, expected) for expected in known)
            assert not done or torch.equal(found, known[1])
        if not done:  # the next run makes it whole
            quantized.save_pretrained(clone)
            assert torch.equal(velocity(loraq.load(clone)), known[1])
            assert foreign_of(clone) == FOREIGN
    assert moments > 5


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("config.json", b'{"editor": "vi"}', r"config\.json': it is not a model's"),
        ("model.safetensors", b"of somebody", "which loaders would take for this model's"),
        ("diffusion_pytorch_model.safetensors/x", b"", "it is a folder"),
    ],
)
def test_what_has_a_name_of_ours_and_is_not_ours(quantized, clone, name, content, match):
    (clone / name).parent.mkdir(exist_ok=True)
    (clone / name).write_bytes(content)
    before = files_of(clone)
    with pytest.raises(CheckpointError, match=match):
        quantized.save_pretrained(clone)
    assert files_of(clone) == before


def test_a_link_to_a_file_elsewhere_is_replaced_and_its_file_is_not(model, quantized, clone):
    model.save_pretrained(clone)
    weights = clone / "diffusion_pytorch_model.safetensors"
    blob = clone.parent / "blob"
    weights.rename(blob)
    weights.symlink_to(blob)
    before = blob.read_bytes()
    quantized.save_pretrained(clone)
    assert not weights.is_symlink()
    assert blob.read_bytes() == before


@pytest.mark.parametrize("size", ["10GB", "40KB"])
def test_a_variant_is_saved_and_loaded(quantized, tmp_path, size):
    quantized.save_pretrained(tmp_path / "q", variant="fp16", max_shard_size=size)
    names = [path.name for path in (tmp_path / "q").iterdir() if "safetensors" in path.name]
    assert all(".fp16" in name for name in names)
    loaded = PixArt.from_pretrained(tmp_path / "q", variant="fp16")
    assert torch.equal(velocity(loaded), velocity(quantized))
    assert torch.equal(velocity(loraq.load(tmp_path / "q")), velocity(quantized))
    with pytest.raises(CheckpointError, match="cannot be part of a file's name"):
        quantized.save_pretrained(tmp_path / "q", variant="../x")


@pytest.fixture
def uploads(tmp_path, monkeypatch) -> dict:
    """What was asked of the hub last; the folder that it got is `tmp_path / "hub"`."""
    import huggingface_hub as hub

    asked = {}

    def upload(**options):
        shutil.copytree(options["folder_path"], tmp_path / "hub", dirs_exist_ok=True)
        asked.update(options)

    made = lambda repo_id, **_: type("Repo", (), {"repo_id": repo_id})  # noqa: E731
    monkeypatch.setattr(hub, "create_repo", made)
    monkeypatch.setattr(hub, "upload_folder", upload)
    monkeypatch.setattr(hub, "file_exists", lambda *_, **__: (tmp_path / "their card").exists())
    return asked


def test_saving_and_pushing(quantized, tmp_path, uploads):
    options = {"push_to_hub": True, "repo_id": "me/x", "commit_message": "4 bits", "token": "t"}
    quantized.save_pretrained(tmp_path / "out", **options)
    assert uploads["repo_id"] == "me/x"
    assert (uploads["commit_message"], uploads["token"]) == ("4 bits", "t")
    for folder in (tmp_path / "out", tmp_path / "hub"):
        assert torch.equal(velocity(PixArt.from_pretrained(folder)), velocity(quantized))
    assert not (tmp_path / "out" / "README.md").exists()


def test_the_model_card_says_what_was_measured(quantized, tmp_path, uploads):
    quantized.push_to_hub("me/x", create_pr=True)
    text = (tmp_path / "hub" / "README.md").read_text()
    assert uploads["create_pr"]
    assert 'PixArtTransformer2DModel.from_pretrained("me/x", torch_dtype=torch.bfloat16)' in text
    manifest = Manifest.read(tmp_path / "hub")
    layers = [layer for layer in manifest.layers.values() if not layer.is_kept]
    errors = [layer.record["relative_error"] for layer in layers]
    assert f"mean {sum(errors) / len(errors):.4f}, largest {max(errors):.4f}" in text
    numbers, nbytes = count_stored(tmp_path / "hub", manifest)
    assert f"{numbers:,}, {8 * nbytes / numbers:.2f} bits each" in text
    assert f"method {manifest.recipe['method']}" in text
    assert f"{len(manifest.layers) - len(layers)} layers are kept" in text


def test_a_card_that_is_there_stays(quantized, tmp_path, uploads):
    (tmp_path / "their card").touch()
    quantized.push_to_hub("me/x")
    assert not (tmp_path / "hub" / "README.md").exists()


def test_weights_that_nobody_lists_are_not_taken_for_old_ones(quantized, clone):
    """Loaders would take it for a variant; it may be the only copy of somebody's work."""
    quantized.save_pretrained(clone)
    (clone / "diffusion_pytorch_model.my-only-copy.safetensors").write_bytes(b"precious")
    before = files_of(clone)
    with pytest.raises(CheckpointError, match=r"also holds .*my-only-copy\.safetensors"):
        quantized.save_pretrained(clone)
    assert files_of(clone) == before


def test_a_save_that_stops_halfway_says_so(quantized, clone, monkeypatch):
    quantized.save_pretrained(clone)

    def failing(one, other):
        raise OSError("Input/output error")

    with (
        monkeypatch.context() as patch,
        pytest.raises(CheckpointError, match="save the model once"),
    ):
        patch.setattr(os, "replace", failing) or quantized.save_pretrained(clone)
    quantized.save_pretrained(clone)
    assert torch.equal(velocity(loraq.load(clone)), velocity(quantized))
