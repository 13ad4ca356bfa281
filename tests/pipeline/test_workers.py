"""Jobs in this process and in several: results, errors with names, killed workers, and parents
that go away.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch

from loraq.errors import CheckpointError, LayerError
from loraq.pipeline.workers import run_jobs


@dataclass(frozen=True)
class Job:
    name: str
    action: str = "square"
    value: int = 0


def work(job: Job) -> tuple[str, int, int, int]:
    if job.action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.action == "bug":
        raise ZeroDivisionError("by nothing")
    if job.action == "ours":
        raise CheckpointError("The disk is full.")
    return job.name, job.value**2, os.getpid(), torch.get_num_threads()


def test_one_worker_is_this_process():
    assert list(run_jobs(work, [Job("a", value=2), Job("b", value=3)], 1)) == [
        ("a", 4, os.getpid(), torch.get_num_threads()),
        ("b", 9, os.getpid(), torch.get_num_threads()),
    ]


def test_no_jobs_are_no_work():
    assert list(run_jobs(work, [], 1)) == list(run_jobs(work, [], 4)) == []


@pytest.mark.parametrize(
    ("action", "kind", "match"),
    [
        ("bug", LayerError, "Layer 'x' failed: ZeroDivisionError: by nothing"),
        ("ours", CheckpointError, "disk is full"),
    ],
)
def test_an_error_has_the_name_of_the_layer_or_is_ours(action, kind, match):
    with pytest.raises(kind, match=match):
        list(run_jobs(work, [Job("x", action)], 1))


@pytest.mark.slow
def test_several_workers_do_every_job_once_on_one_thread_and_end():
    results = list(run_jobs(work, [Job(str(i), value=i) for i in range(7)], 2))
    assert sorted(result[:2] for result in results) == [(str(i), i * i) for i in range(7)]
    pids = {result[2] for result in results}
    assert len(pids) == 2
    assert {result[3] for result in results} == {1}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "kind", "match"),
    [
        (
            "die",
            LayerError,
            "Layer 'x' failed: its worker was killed by signal 9. If memory ran out, use fewer",
        ),
        ("ours", CheckpointError, r"^The disk is full\.$"),
    ],
)
def test_the_errors_of_workers(action, kind, match):
    with pytest.raises(kind, match=match):
        list(run_jobs(work, [Job("a", value=2), Job("x", action)], 2))


PARENT = """
import os, sys, time
from dataclasses import dataclass
from loraq.pipeline.workers import run_jobs

@dataclass(frozen=True)
class Job:
    name: str

def work(job):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    list(run_jobs(work, [Job("a"), Job("b")], 2))
"""


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    """Say whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
