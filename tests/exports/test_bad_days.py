"""An export that fails: one message that says what to do, and nothing left behind."""

import errno
import os
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import loraq
from loraq.cli import main
from loraq.errors import CheckpointError, LoraqError
from loraq.exports.gguf_file import GgufLayout
from loraq.safetensors.layout import ShardLayout
from tests.exports.models import save_quantized
from tests.folders import files_of

pytest.importorskip("diffusers")

RECIPES = {"gguf": "int4_b32-a16+bf16-r16", "comfy": "nvfp4+bf16-r16"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("bad-days")
    for name, recipe in RECIPES.items():
        save_quantized("flux", recipe, place / name)
    return place


@pytest.fixture
def failing(monkeypatch):
    """Let the tenth tensor fail, in whatever kind of file."""

    def fail(error):
        calls = []
        for kind in (ShardLayout, GgufLayout):
            original = kind.write

            def write(self, folder, tensors, original=original, **options):
                calls.append(folder)
                if len(calls) == 10:
                    raise error
                return original(self, folder, tensors, **options)

            monkeypatch.setattr(kind, "write", write)

    return fail


@pytest.mark.parametrize("to", RECIPES)
@pytest.mark.parametrize("is_there", [False, True])
def test_a_full_disk(place, tmp_path, failing, to, is_there):
    if is_there:
        loraq.export(place / to, tmp_path / "out", to=to, progress=False)
    before = files_of(tmp_path)
    failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "out")))
    with pytest.raises(CheckpointError, match=r"the disk is full\. .* Nothing was left there"):
        loraq.export(place / to, tmp_path / "out", to=to, overwrite=is_there, progress=False)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("to", RECIPES)
def test_an_interrupt(place, tmp_path, failing, to):
    failing(KeyboardInterrupt())
    asked = ["export", str(place / to), str(tmp_path / "out"), "--to", to]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_nobody_may_write_to(place, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="locked"):
        loraq.export(place / "gguf", tmp_path / "locked/out", to="gguf", progress=False)


@pytest.mark.parametrize("to", RECIPES)
def test_a_target_whose_parent_is_a_file(place, tmp_path, to):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file"):
        loraq.export(place / to, tmp_path / "file/out", to=to, progress=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_source_is_no_target(place, tmp_path):
    shutil.copytree(place / "gguf", tmp_path / "model")
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match="Source and target"):
        loraq.export(tmp_path / "model", tmp_path / "model", to="gguf", overwrite=True)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("to", RECIPES)
def test_a_lora_that_is_no_number(place, tmp_path, to):
    name = "transformer.transformer_blocks.0.attn.to_q"
    factors = {"A": torch.full((4, 128), torch.nan), "B": torch.ones(128, 4)}
    tensors = {f"{name}.lora_{part}.weight": tensor for part, tensor in factors.items()}
    save_file(tensors, tmp_path / "lora.safetensors", {"format": "pt"})
    with pytest.raises(LoraqError, match=r"NaN|infinite|not finite|no number"):
        loraq.export(
            *(place / to, tmp_path / "out"),
            **{"to": to, "lora": [tmp_path / "lora.safetensors"], "progress": False},
        )
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]
