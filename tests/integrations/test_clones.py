"""A quantized model in a folder that has other owners: a clone of a repository, an upload."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small.pixart import small_pixart, velocity

import loraq
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


def test_saving_and_pushing(quantized, tmp_path, monkeypatch):
    import diffusers.models.modeling_utils as modeling
    import diffusers.utils.hub_utils as hub

    asked = {}

    def upload(self, working_dir, repo_id, **options):
        shutil.copytree(working_dir, tmp_path / "hub", dirs_exist_ok=True)
        asked.update(options, repo_id=repo_id)

    monkeypatch.setattr(hub.PushToHubMixin, "_upload_folder", upload)
    for module in (hub, modeling):
        fake = lambda repo_id, **_: type("Repo", (), {"repo_id": repo_id})  # noqa: E731
        monkeypatch.setattr(module, "create_repo", fake)
        card = lambda *_, **__: type("Card", (), {"save": lambda *_: None})()  # noqa: E731
        monkeypatch.setattr(module, "load_or_create_model_card", card)
        monkeypatch.setattr(module, "populate_model_card", lambda card, **_: card)
    options = {"push_to_hub": True, "repo_id": "me/x", "commit_message": "4 bits", "token": "t"}
    quantized.save_pretrained(tmp_path / "out", **options)
    assert asked["repo_id"] == "me/x"
    assert asked["commit_message"] == "4 bits"
    for folder in (tmp_path / "out", tmp_path / "hub"):
        assert torch.equal(velocity(PixArt.from_pretrained(folder)), velocity(quantized))


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
