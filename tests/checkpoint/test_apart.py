"""A target that is replaced must not be, hold or lie in anything that the run reads."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

import loraq
from loraq.checkpoint import apart
from loraq.checkpoint.apart import require_apart
from loraq.errors import CheckpointError
from loraq.safetensors.layout import write_shards


@pytest.fixture
def tree(tmp_path):
    for name in ("models/source/vae", "models/out", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/out/weights.safetensors").write_bytes(b"precious")
    return tmp_path


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("models/source", "Source and target are both"),
        ("models/../models/source", "Source and target are both"),
        ("models/source/vae/out", "lies inside"),
        ("models", "lies inside"),
        (".", "lies inside"),
    ],
)
def test_a_target_that_touches_an_input_is_refused(tree, target, message):
    with pytest.raises(CheckpointError, match=message):
        require_apart(tree / target, tree / "elsewhere/none", tree / "models/source")


def test_a_link_into_the_target_is_refused_and_other_links_are_not(tree):
    link = tree / "models/source/vae/weights.safetensors"
    link.symlink_to(tree / "models/out/weights.safetensors")
    with pytest.raises(CheckpointError, match=r"is a link into '.*out', which would be replaced"):
        require_apart(tree / "models/out", tree / "models/source")
    require_apart(tree / "models/new", tree / "models/source")
    (tree / "models/other").symlink_to(tree / "models/source")
    with pytest.raises(CheckpointError, match="both"):
        require_apart(tree / "models/other", tree / "models/source")


def test_a_source_of_links_into_the_target_keeps_its_originals(tree):
    originals = tree / "models/originals"
    originals.mkdir()
    write_shards({"a.weight": torch.randn(32, 64)}, originals, "model")
    (originals / "config.json").write_text("{}")
    kept = {path.name: path.read_bytes() for path in originals.iterdir()}
    for path in originals.iterdir():
        (tree / "models/source" / path.name).symlink_to(path)
    shutil.rmtree(tree / "models/source/vae")
    with pytest.raises(CheckpointError, match="a link out of it"):
        loraq.quantize_checkpoint(
            tree / "models/source", originals, "mxfp4-a16", overwrite=True, progress=False
        )
    assert {path.name: path.read_bytes() for path in originals.iterdir()} == kept


@pytest.mark.parametrize("target", ["source", "models", "model", "lora"])
def test_absorbing_never_writes_over_what_it_reads(tmp_path, target):
    places = {"source": "models/source", "model": "models/model", "lora": "models/lora"}
    for name in places.values():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / places["lora"] / "adapter_model.safetensors").touch()
    before = sorted(tmp_path.rglob("*"))
    model, lora, source = (tmp_path / places[name] for name in ("model", "lora", "source"))
    into = tmp_path / places.get(target, "models")
    with pytest.raises(CheckpointError, match=r"Source and target|lies inside"):
        loraq.absorb_lora(model, lora, source, target=into, overwrite=True, progress=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_target_beside_a_configuration_or_an_adapter_is_no_danger(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"block.linear.weight": torch.randn(32, 64)}, file)
    (tmp_path / "config.json").write_text("{}")
    loraq.quantize_checkpoint(file, tmp_path / "out", "mxfp4-a16", config=tmp_path, progress=False)
    assert (tmp_path / "out/loraq.json").is_file()
    with pytest.raises(CheckpointError, match="lies inside"):
        loraq.quantize_checkpoint(file, tmp_path / "config.json/out", "mxfp4-a16", config=tmp_path)


def test_a_folder_that_is_mounted_in_source_and_target_is_seen(tree, monkeypatch):
    """A bind mount gives one folder two names, which no link tells."""
    (tree / "models/out/inner").mkdir()
    identity = apart._identity

    def mounted(path):
        return identity(tree / "models/out/inner" if path.name == "vae" else path)

    monkeypatch.setattr(apart, "_identity", mounted)
    with pytest.raises(CheckpointError, match=r"vae' in '.*source' is also a folder of '.*out'"):
        require_apart(tree / "models/out", tree / "models/source")
    require_apart(tree / "models/new", tree / "models/source")
