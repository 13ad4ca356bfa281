"""Jobs in this process, in children and in torchrun's ranks: results, errors with names, ranks
that are lost, and parents that go away.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing import active_children

import pytest
import torch

from loraq.errors import CheckpointError, LayerError, LoraqWarning, MissingLibraryError, RankError
from loraq.pipeline import tickets
from loraq.pipeline.board import open_on_loopback
from loraq.pipeline.ranks import _join, open_ranks
from loraq.pipeline.tickets import Data, Place


@dataclass(frozen=True)
class Work:
    """Squares numbers, or does what a test asks for."""

    folder: str = ""

    def open(self, place: Place) -> Callable[[Data], Data]:
        return lambda job: self.do(job, place)

    def do(self, job: Data, place: Place) -> Data:
        action = job.get("action", "")
        if action == "die" or (action == "die once" and self.is_first(job["name"])):
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "bug":
            raise ZeroDivisionError("by nothing")
        if action == "ours":
            raise CheckpointError("The disk is full.")
        if action == "disk":
            raise OSError(28, "No space left on device", "/there")
        return {
            "name": job["name"],
            "square": job.get("value", 0) ** 2,
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
            "place": place.index,
        }

    def is_first(self, name: str) -> bool:
        try:
            os.close(os.open(f"{self.folder}/{name}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


def do(jobs: list[Data], workers: int, work: Work | None = None) -> list[Data]:
    with open_ranks(workers) as opened:
        return list(opened.run(work or Work(), jobs))


def numbers(n: int) -> list[Data]:
    return [{"name": str(i), "value": i} for i in range(n)]


def test_one_worker_is_this_process():
    results = do(numbers(3), 1)
    assert [result["square"] for result in results] == [0, 1, 4]
    assert {result["pid"] for result in results} == {os.getpid()}
    assert {result["threads"] for result in results} == {torch.get_num_threads()}


def test_no_jobs_are_no_work():
    assert do([], 1) == do([], 4) == []


@pytest.mark.parametrize(
    ("action", "kind", "match"),
    [
        ("bug", LayerError, "Layer 'x' failed: ZeroDivisionError: by nothing"),
        ("ours", CheckpointError, "disk is full"),
        ("disk", OSError, "No space left"),
    ],
)
def test_an_error_has_the_name_of_the_layer_or_is_ours(action, kind, match):
    with pytest.raises(kind, match=match):
        do([{"name": "x", "action": action}], 1)


@pytest.mark.slow
def test_several_workers_do_every_job_once_on_one_thread_and_end():
    results = do(numbers(7), 2)
    assert sorted(result["square"] for result in results) == [i * i for i in range(7)]
    pids = {result["pid"] for result in results}
    assert {result["threads"] for result in results} == {1}
    assert {result["place"] for result in results} <= {0, 1}
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "kind", "match"),
    [
        ("bug", LayerError, "Layer 'x' failed: ZeroDivisionError: by nothing"),
        ("ours", CheckpointError, r"^The disk is full\.$"),
        ("disk", OSError, r"\[Errno 28\] No space left on device: '/there'"),
    ],
)
def test_the_errors_of_workers(action, kind, match):
    with pytest.raises(kind, match=match):
        do([{"name": "a", "value": 2}, {"name": "x", "action": action}], 2)
    assert active_children() == []


@pytest.mark.slow
def test_when_all_workers_are_killed_the_layer_is_named(monkeypatch):
    monkeypatch.setattr(tickets, "LEASE", 2)
    with (
        pytest.warns(
            LoraqWarning, match="A worker was killed by signal 9; the others do its layer"
        ),
        pytest.raises(
            LayerError,
            match=r"Layer 'x' failed: its worker was killed by signal 9\. If memory ran out, use",
        ),
    ):
        do([{"name": "x", "action": "die"}, {"name": "a", "value": 2}], 2)


@pytest.mark.slow
def test_the_layer_of_a_lost_worker_is_taken_by_another(monkeypatch, tmp_path):
    monkeypatch.setattr(tickets, "LEASE", 2)
    jobs = [{"name": "x", "value": 3, "action": "die once"}, *numbers(4)]
    with pytest.warns(LoraqWarning, match="killed by signal 9"):
        results = do(jobs, 2, Work(str(tmp_path)))
    assert sorted(result["name"] for result in results) == ["0", "1", "2", "3", "x"]


def test_a_torch_without_torch_distributed_has_one_worker(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert len(do(numbers(2), 1)) == 2
    with pytest.raises(MissingLibraryError, match=r"torch\.distributed.* Use one worker"):
        do(numbers(2), 2)


def test_torchrun_and_workers_are_one_too_many(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RankError, match=r"torchrun started 4 ranks.* Leave `--workers`"):
        do([], 2)


def test_an_environment_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(RankError, match="WORLD_SIZE='many'"):
        do([], 1)


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({"WORLD_SIZE": "0", "RANK": "0"}, r"WORLD_SIZE='0'.* at least 1"),
        ({"WORLD_SIZE": "4"}, r"WORLD_SIZE=4 and no RANK"),
        ({"WORLD_SIZE": "4", "RANK": "4"}, r"RANK='4'.* at most 3"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "65536"}, r"MASTER_PORT='65536'"),
    ],
)
def test_ranks_that_cannot_be_are_refused_before_they_wait(monkeypatch, variables, match):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match=match):
        do([], 1)


def test_ranks_that_torchrun_starts_again_see_nothing_of_their_last_life(monkeypatch):
    """The store of an agent outlives its ranks: what made them fail would end the new ones."""
    address, _ = open_on_loopback()
    variables = {"WORLD_SIZE": 1, "RANK": 0, "MASTER_PORT": address.port}
    variables |= {"MASTER_ADDR": address.host, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    seen = []
    for life in range(2):
        monkeypatch.setattr("loraq.pipeline.ranks._runs", count())
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(life))
        with suppress(ZeroDivisionError), _join(0, 1) as joined:
            seen.append(joined.board.count("failed", 0))
            raise ZeroDivisionError
    assert seen == [0, 0]


@pytest.mark.parametrize("value", ["", "x", "x y z", "ä 1 {}", f"{'0' * 64} 1 {{}}", b"\xff 1 1"])
def test_what_a_stranger_has_written_is_refused_whatever_it_is(value):
    _, board = open_on_loopback()
    board._store.set("key", value)
    with pytest.raises(RankError, match="Another program has written"):
        board.read("key")


def test_the_board_keeps_long_values_and_refuses_those_of_strangers():
    address, board = open_on_loopback()
    assert address.host == "127.0.0.1"
    other, long = address.connect(), ["ä" * 999] * 9999
    board.write("a", long)
    assert other.read("a") == long
    stranger = type(address)(address.host, address.port, address.prefix, b"guess").connect()
    stranger.write("b", {"name": "x"})
    with pytest.raises(RankError, match="Another program has written"):
        board.read("b")
    assert [board.count("n"), other.count("n"), board.count("n", 0)] == [1, 2, 2]


PARENT = """
import os, sys, time
from loraq.pipeline.ranks import open_ranks

class Work:
    def open(self, place):
        return work

def work(job):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    with open_ranks(2) as ranks:
        list(ranks.run(Work(), [{"name": "a"}, {"name": "b"}]))
"""


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    deadline = time.monotonic() + 300  # they would work for 600
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
