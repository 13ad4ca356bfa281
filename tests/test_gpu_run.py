"""`make gpu`: its steps fit its time, one that fails loses nothing (and `rehearse_gpu.py`)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks are only in a clone of the repository", allow_module_level=True)
pytest.importorskip("diffusers")

from benchmarks.gpu.run import LIMIT, STEPS, run_step  # noqa: E402


def test_the_steps_have_names_of_their_own_and_fit_the_time_of_the_run():
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert sum(step.limit for step in STEPS) <= LIMIT == 1500


@pytest.mark.parametrize(
    ("program", "failure"),
    [
        ("print('fine')", ""),
        ("print('before'); raise SystemExit(3)", "exit code 3"),
        ("import os; os.abort()", "exit code -6"),
        ("import time; print('before', flush=True); time.sleep(60)", "not done after 2 s"),
    ],
)
def test_a_step_that_fails_or_hangs_is_named_and_keeps_its_output(tmp_path, program, failure):
    command = [sys.executable, "-c", program]
    outcome = run_step("one step", command, 2, tmp_path, rehearse=True)
    assert outcome.failure == failure
    assert outcome.seconds < 20
    printed = outcome.log.read_text()
    assert ("fine" if not failure else "before") in printed or "abort" in program


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.run"]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PATH": "", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=hidden)
    assert done.returncode == 1
    assert "sees no GPU here" in done.stderr
    assert "--rehearse" in done.stderr
