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
from loraq.pipeline.machine import describe_machine


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
    found = describe_machine()
    assert list(found) == ["device", "processor", "instructions", "libraries", "settings"]
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert found["processor"].startswith(os.uname().machine)
    assert all(isinstance(value, str) for value in found.values())
    if torch.backends.mkl.is_available():
        assert "MKL 20" in found["libraries"]


def test_it_says_the_same_each_time():
    assert describe_machine() == describe_machine()


@pytest.mark.parametrize("name", ["MKL_CBWR", "OPENBLAS_CORETYPE", "MKL_ENABLE_INSTRUCTIONS"])
def test_a_run_does_not_go_on_with_other_settings_of_a_library(begun, monkeypatch, name):
    source, target = begun
    with monkeypatch.context() as patch:
        patch.setenv(name, "HASWELL")
        changed = rf"Changed: machine \(settings: '' then, '{name}=HASWELL' now\)"
        with pytest.raises(CheckpointError, match=changed):
            loraq.quantize_checkpoint(source, target, "mxfp4-a16", progress=False)
    assert loraq.quantize_checkpoint(source, target, "mxfp4-a16", progress=False).kept == 1


GO_ON = """
import json, sys
import loraq
from loraq.pipeline.machine import describe_machine
try:
    loraq.quantize_checkpoint(*sys.argv[1:], "mxfp4-a16", progress=False)
    error = ""
except loraq.LoraqError as raised:
    error = str(raised)
print(json.dumps([describe_machine(), error]))
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
    here = describe_machine()
    assert there == here | {"instructions": "DEFAULT"}
    assert f"machine (instructions: '{here['instructions']}' then, 'DEFAULT' now)" in error
    assert loraq.quantize_checkpoint(*begun, "mxfp4-a16", progress=False).kept == 1
