"""`make gpu`: its steps fit its time, one that fails loses nothing (and `rehearse_gpu.py`)."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks are only in a clone of the repository", allow_module_level=True)
pytest.importorskip("diffusers")

from benchmarks.gpu.run import GRACE, LIMIT, STEPS, main, run_step  # noqa: E402


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


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie, which waits for nobody but its parent."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_step_that_hangs_is_killed_with_all_that_it_started(tmp_path):
    # A shell, which says so at once on any machine; both wait for longer than any test runs.
    command = ["sh", "-c", "echo before; sleep 100000 & echo $!; wait"]
    outcome = run_step("one step", command, 5, tmp_path, rehearse=True)
    assert outcome.failure == "not done after 5 s"
    before, child = outcome.log.read_text().split()
    assert before == "before"
    while is_running(int(child)):  # for ever, if it was left alone
        time.sleep(0.05)


def test_a_step_that_cannot_be_killed_keeps_nobody_waiting(tmp_path, monkeypatch):
    waited = []

    class Stuck:
        pid = 0

        def __init__(self, *_arguments: object, **_options: object) -> None: ...

        def wait(self, limit: float) -> int:
            waited.append(limit)
            raise subprocess.TimeoutExpired("stuck", limit)

        def poll(self) -> None: ...

    monkeypatch.setattr(subprocess, "Popen", Stuck)
    monkeypatch.setattr("os.killpg", lambda *_: None)
    outcome = run_step("one step", ["stuck"], 7, tmp_path, rehearse=True)
    assert outcome.failure == "not done after 7 s"
    assert waited == [7, GRACE]


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu.run"])
    with pytest.raises(SystemExit, match=r"sees no GPU here\..*--rehearse"):
        main()
