"""What `overwrite` may replace: a model or a pipeline, and nothing that somebody else wrote."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import save_file
from torch import nn

import loraq
from loraq.checkpoint.folder import require_free, require_replaceable
from loraq.errors import CheckpointError


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def model_in(folder: Path, class_name: str = "Net") -> Path:
    make(folder, "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name}))
    return folder


def pipeline_in(folder: Path) -> Path:
    components = {name: ["diffusers", "Net"] for name in ("transformer", "vae", "tokenizer")}
    make(folder, "tokenizer/vocab.json", "tokenizer/merges.txt")
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "Pipeline", "requires_safety_checker": False, **components})
    )
    model_in(folder / "transformer")
    model_in(folder / "vae")
    return folder


def test_what_diffusers_wrote_is_replaced(tmp_path):
    for folder in (model_in(tmp_path / "model"), pipeline_in(tmp_path / "pipeline")):
        require_free(folder, overwrite=True)
        with pytest.raises(CheckpointError, match="is not empty"):
            require_free(folder, overwrite=False)
    make(
        tmp_path / "model",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    )
    require_free(tmp_path / "model", overwrite=True)


@pytest.mark.parametrize(
    "name",
    ["thesis.tex", "photos/cat.png", ".git/HEAD", "model.safetensors.bak", "transformer/a.py"],
)
@pytest.mark.parametrize("what", [model_in, pipeline_in])
def test_what_somebody_else_wrote_is_named_and_left_alone(tmp_path, what, name):
    folder = make(what(tmp_path / "out"), name)
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match=f"also holds {name}"):
        require_free(folder, overwrite=True)
    assert sorted(folder.rglob("*")) == before


def test_of_many_files_some_are_named(tmp_path):
    folder = make(model_in(tmp_path / "out"), *(f"{i}.png" for i in range(1000)))
    with pytest.raises(CheckpointError, match=r"0\.png, 1\.png.* and 996 more") as raised:
        require_replaceable(folder)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("content", ["{}", '{"editor.fontSize": 12}', "[]", "not json", ""])
def test_a_configuration_of_another_program_makes_no_model(tmp_path, content):
    """Many programs have a `config.json`, and it is not alone."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="it is not a model's folder"):
        require_free(tmp_path, overwrite=True)


def test_files_that_went_along_with_a_pipeline_are_replaced_as_long_as_they_are_those(tmp_path):
    folder = make(pipeline_in(tmp_path / "out"), "README.md", "images/cat.png")
    recorded = {name: {"bytes": 2, "sha256": "…"} for name in ("README.md", "images/cat.png")}
    (folder / "transformer" / "loraq.json").write_text(json.dumps({"components": recorded}))
    require_free(folder, overwrite=True)
    (folder / "README.md").write_text("what I found out about this model")
    with pytest.raises(CheckpointError, match=r"also holds README\.md"):
        require_free(folder, overwrite=True)


@pytest.mark.parametrize("listing", [None, [], "all", {"README.md": 2}, {"README.md": {}}])
def test_a_listing_that_is_none_lists_nothing(tmp_path, listing):
    folder = make(pipeline_in(tmp_path / "out"), "README.md")
    (folder / "transformer" / "loraq.json").write_text(json.dumps({"components": listing}))
    with pytest.raises(CheckpointError, match=r"also holds README\.md"):
        require_free(folder, overwrite=True)


def test_every_writer_of_folders_refuses(tmp_path):
    source = nn.Sequential(nn.Linear(32, 64))
    model = nn.Sequential(nn.Linear(32, 64))
    loraq.quantize_(model, "mxfp4-a16", progress=False)
    loraq.save(model, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    save_file(source.state_dict(), tmp_path / "source.safetensors")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for write in (
        lambda: loraq.save(model, tmp_path / "out", overwrite=True),
        lambda: loraq.quantize_checkpoint(
            tmp_path / "source.safetensors",
            tmp_path / "out",
            "mxfp4-a16",
            overwrite=True,
            progress=False,
        ),
    ):
        with pytest.raises(CheckpointError, match=r"also holds notes\.txt"):
            write()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors", "model-000001.safetensors", "model-my-only-copy.safetensors"),
        ("model.safetensors",),
    ],
)
def test_a_folder_of_loras_is_no_model(tmp_path, names):
    make(tmp_path / "loras", *names)
    with pytest.raises(CheckpointError, match="it is not a model's folder"):
        require_free(tmp_path / "loras", overwrite=True)
    model_in(tmp_path / "loras")
    if len(names) > 1:
        with pytest.raises(CheckpointError, match=r"model-000001\.safetensors"):
            require_free(tmp_path / "loras", overwrite=True)


@pytest.mark.parametrize(
    ("file", "content"), [("config.json", '{"model_type": "car"}'), ("loraq.json", '{"a": 1}')]
)
def test_a_name_alone_makes_no_model(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match="it is not a model's folder"):
        require_free(tmp_path, overwrite=True)


def test_a_folder_that_cannot_be_cleared_is_refused_before_work(tmp_path, monkeypatch):
    folder = pipeline_in(tmp_path / "out")
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "vae" and access(path, mode)
    )
    with pytest.raises(CheckpointError, match="vae': it cannot be looked into or cleared"):
        require_free(folder, overwrite=True)


def test_a_mount_point_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(CheckpointError, match=r"it is a mount point.*a folder inside of it"):
        require_free(tmp_path, overwrite=False)


def test_another_users_link_in_an_open_folder_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "out").symlink_to("mine")
    require_free(tmp_path / "out", overwrite=False)
    tmp_path.chmod(0o1777)
    lstat = os.lstat

    def of_a_stranger(path, **options):
        status = lstat(path, **options)
        if Path(path).name != "out":
            return status
        return os.stat_result([*status[:4], status.st_uid + 1, *status[5:]])

    monkeypatch.setattr(os, "lstat", of_a_stranger)
    with pytest.raises(CheckpointError, match="is a link of another user"):
        require_free(tmp_path / "out", overwrite=False)


def test_the_float_weights_that_a_model_was_made_from_are_not_replaced(tmp_path):
    model = nn.Sequential(nn.Linear(32, 64))
    model.config = SimpleNamespace(_name_or_path=str(model_in(tmp_path / "float")))
    loraq.quantize_(model, "mxfp4-a16", progress=False)
    with pytest.raises(CheckpointError, match="holds the float weights that this model"):
        loraq.save(model, tmp_path / "float", overwrite=True)
    loraq.save(model, tmp_path / "out")
    model.config._name_or_path = str(tmp_path / "out")
    loraq.save(model, tmp_path / "out", overwrite=True)
