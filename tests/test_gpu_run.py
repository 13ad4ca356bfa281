"""`make gpu`: its steps fit its time, one that fails loses nothing (and `rehearse_gpu.py`)."""

import subprocess
import sys
import time
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
    ],
)
def test_a_step_that_fails_is_named_and_keeps_its_output(tmp_path, program, failure):
    command = [sys.executable, "-c", program]
    outcome = run_step("one step", command, 600, tmp_path, rehearse=True)
    assert outcome.failure == failure
    printed = outcome.log.read_text()
    assert ("fine" if not failure else "before") in printed or "abort" in program


def test_a_step_that_hangs_is_stopped_and_keeps_its_output(tmp_path, monkeypatch):
    log, wait = tmp_path / "one-step.txt", subprocess.Popen.wait

    def wait_for_output(process: subprocess.Popen, timeout: float | None = None) -> int:
        """Let the time be over as soon as the step hangs."""
        if timeout is None:
            return wait(process)
        while "before" not in log.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        raise subprocess.TimeoutExpired("", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_output)
    command = [sys.executable, "-c", "import time; print('before', flush=True); time.sleep(1e6)"]
    outcome = run_step("one step", command, 2, tmp_path, rehearse=True)
    assert outcome.failure == "not done after 2 s"
    assert log.read_text() == "before\n"


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.run"]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PATH": "", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=hidden)
    assert done.returncode == 1
    assert "sees no GPU here" in done.stderr
    assert "--rehearse" in done.stderr
