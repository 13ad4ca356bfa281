"""A run goes on only where the same bytes come out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loraq
from loraq.errors import CheckpointError
from loraq.pipeline import machine
from loraq.pipeline.machine import describe_machine

CPU = torch.device("cpu")


@pytest.fixture
def begun(tmp_path) -> tuple[Path, Path]:
    """A source, and a target of which one layer of two is done."""
    source = tmp_path / "model.safetensors"
    save_file({f"{i}.weight": torch.randn(32, 64) for i in range(2)}, source)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loraq.quantize_checkpoint(source, tmp_path / "out", "mxfp4-a16", progress=interrupt)
    return source, tmp_path / "out"


def test_it_says_what_a_person_needs_to_know():
    found = describe_machine((CPU,))
    assert list(found) == ["device", "processor", "instructions", "libraries", "settings"]
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert found["processor"].startswith(os.uname().machine)
    assert all(isinstance(value, str) for value in found.values())
    if torch.backends.mkl.is_available():
        assert "MKL 20" in found["libraries"]


def test_it_says_the_same_each_time():
    assert describe_machine((CPU,)) == describe_machine((CPU,))


@pytest.mark.parametrize("name", ["MKL_CBWR", "OPENBLAS_CORETYPE", "MKL_ENABLE_INSTRUCTIONS"])
def test_a_run_does_not_go_on_with_other_settings_of_a_library(begun, monkeypatch, name):
    source, target = begun
    with monkeypatch.context() as patch:
        patch.setenv(name, "HASWELL")
        changed = rf"Changed: machine \(settings: '' then, '{name}=HASWELL' now\)"
        with pytest.raises(CheckpointError, match=changed):
            loraq.quantize_checkpoint(source, target, "mxfp4-a16", progress=False)
    assert loraq.quantize_checkpoint(source, target, "mxfp4-a16", progress=False).kept == 1


def test_a_run_does_not_go_on_with_another_kind_of_device(begun, monkeypatch):
    source, target = begun
    with monkeypatch.context() as patch:
        patch.setattr(machine, "kind_of", lambda _: "cuda")
        with pytest.raises(CheckpointError) as error:
            loraq.quantize_checkpoint(source, target, "mxfp4-a16", progress=False)
    assert "Changed: machine (device: 'cpu' then, 'cuda' now)" in str(error.value)
    assert "Use the old settings to go on, `--restart` to begin anew" in str(error.value)
    assert loraq.quantize_checkpoint(source, target, "mxfp4-a16", device="cpu", progress=False).kept


def test_the_manifest_names_the_kind_and_another_makes_the_folder_anew(begun, monkeypatch):
    source, target = begun
    loraq.quantize_checkpoint(source, target, "mxfp4-a16", device="cpu", progress=False)
    layers = json.loads((target / "loraq.json").read_text())["layers"]
    assert {layer["device"] for layer in layers.values()} == {"cpu"}
    again = loraq.quantize_checkpoint(source, target, "mxfp4-a16", device="cpu", progress=False)
    assert again.already_complete
    monkeypatch.setattr(machine, "kind_of", lambda _: "cuda")
    with pytest.raises(CheckpointError, match="--overwrite"):
        loraq.quantize_checkpoint(source, target, "mxfp4-a16", progress=False)


GO_ON = """
import json, sys
import loraq, torch
from loraq.pipeline.machine import describe_machine
try:
    loraq.quantize_checkpoint(*sys.argv[1:], "mxfp4-a16", progress=False)
    error = ""
except loraq.LoraqError as raised:
    error = str(raised)
print(json.dumps([describe_machine((torch.device("cpu"),)), error]))
"""


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_instructions(begun):
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has only the default instructions")
    child = subprocess.run(
        [sys.executable, "-c", GO_ON, *map(str, begun)],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        check=True,
    )
    there, error = json.loads(child.stdout)
    here = describe_machine((CPU,))
    assert there == here | {"instructions": "DEFAULT"}
    assert f"machine (instructions: '{here['instructions']}' then, 'DEFAULT' now)" in error
    assert loraq.quantize_checkpoint(*begun, "mxfp4-a16", progress=False).kept == 1
