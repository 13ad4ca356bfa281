"""Kill runs before each of their system calls that change the disk: `python -m tests.crash`.

After each kill the target's name stands for nothing, for the old or for the new, whole; and the
same run, started again, ends with the new one and nothing else. (A kill after one call is a kill
before the next: nothing else changes the disk. The last kill is after the last call.)
"""

import argparse
import ctypes
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.crash.scenarios import SCENARIOS, Scenario
from tests.folders import files_of
from tests.syscalls import Call, record


@dataclass(frozen=True)
class Trial:
    """A scenario with a number of workers, in folders that are made anew for each kill."""

    scenario: Scenario
    workers: int
    place: Path

    @property
    def name(self) -> str:
        return f"{self.scenario.name}, {self.workers} worker{'s' if self.workers > 1 else ''}"

    def prepare(self) -> Path:
        """Return a fresh copy of what the scenario begins with."""
        template, root = self.place / "template", self.place / "root"
        if not template.exists():
            template.mkdir()
            self.scenario.prepare(template)
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root)
        return root

    def run(self, root: Path, kill_before: int | None = None) -> tuple[int, int]:
        """Run the scenario in a process group of its own.

        Returns:
            How it ended (0, or minus a signal), and the calls it made.
        """
        counter = self.place / "counter"
        counter.write_bytes(b"")
        pid = os.fork()
        if not pid:
            os.setsid()
            os._exit(self._run_here(root, counter, kill_before))
        _, status = os.waitpid(pid, 0)
        with suppress(ChildProcessError):  # workers die a moment later, and with them their locks
            while True:
                os.waitpid(-pid, 0)
        return os.waitstatus_to_exitcode(status), counter.stat().st_size

    def _run_here(self, root: Path, counter: Path, kill_before: int | None) -> int:
        output = os.open(self.place / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        descriptor = os.open(counter, os.O_RDWR | os.O_APPEND)

        def count(call: Call) -> None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # workers count together
            os.write(descriptor, b".")
            if os.fstat(descriptor).st_size == kill_before:
                os.killpg(0, signal.SIGKILL)
            fcntl.flock(descriptor, fcntl.LOCK_UN)

        try:
            with record(root, count):
                self.scenario.run(root, self.workers)
        except BaseException:
            traceback.print_exc()
            return 1
        return 0


def look(path: Path) -> dict[str, bytes]:
    """Return all that stands under a name: a file, or the files of a folder; empty for nothing."""
    return {"": path.read_bytes()} if path.is_file() else files_of(path)


def tell(text: str) -> None:
    """Print at once: what is said just before a kill must be seen."""
    print(text, flush=True)


def try_all(trial: Trial, only: int | None, every: int) -> bool:
    """Kill a trial before each call; return whether all was well every time."""
    begin, ends, failures = time.monotonic(), Counter[str](), 0
    trial.scenario.run(trial.prepare(), 1)  # what it imports on first use is there for all kills
    root = trial.prepare()
    old = look(root / trial.scenario.target)
    code, n_calls = trial.run(root)
    new, siblings = look(root / trial.scenario.target), sorted(os.listdir(root))
    if code or not new or new == old:
        tell(f"{trial.name}: the run itself fails:\n{(trial.place / 'output').read_text()}")
        return False
    states = {"nothing": {}, "old": old, "new": new}
    kills = range(1, n_calls + 2, every) if only is None else [only]
    for kill in kills:
        root = trial.prepare()
        trial.run(root, kill)
        found = look(root / trial.scenario.target)
        end = next((name for name, state in states.items() if state == found), "half")
        if old and end == "nothing":
            end = "lost"
        ends[end] += 1
        code, _ = trial.run(root)
        ok = end in states and not code and look(root / trial.scenario.target) == new
        if not ok or sorted(os.listdir(root)) != siblings:
            failures += 1
            left = sorted(set(os.listdir(root)) - set(siblings))
            tell(
                f"FAILED {trial.name}, kill before call {kill}: found {end}; again: exit {code}, "
                f"left {left}\n{(trial.place / 'output').read_text()[-2000:]}"
            )
    counts = ", ".join(f"{name} {ends[name]}" for name in sorted(ends))
    seconds = time.monotonic() - begin
    tell(
        f"{trial.name}: {n_calls} calls, {len(kills)} kills, found {counts}; "
        f"{failures} failures, {seconds:.0f} s"
    )
    return not failures


def main() -> int:
    """Run the trials that are asked for, in two processes."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--only", help="a scenario: " + ", ".join(s.name for s in SCENARIOS))
    parser.add_argument("--workers", type=int, choices=(1, 2))
    parser.add_argument("--call", type=int, help="kill before this call only")
    parser.add_argument("--every", type=int, default=1, help="kill before every n-th call")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trials = [
            Trial(scenario, workers, Path(tempfile.mkdtemp(dir=folder)))
            for scenario in SCENARIOS
            for workers in scenario.workers
            if options.only in (None, scenario.name) and options.workers in (None, workers)
        ]
        children = [_start(trials[half::2], options.call, options.every) for half in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    tell("crash: all is well" if not any(codes) else "crash: FAILED")
    return int(any(codes))


def _adopt_orphans() -> None:
    """Let this process be told when the workers of a process that was killed have ended."""
    if sys.platform == "linux":
        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def _start(trials: list[Trial], only: int | None, every: int) -> int:
    """Run trials in a process of their own; return its number."""
    child = os.fork()
    if not child:
        _adopt_orphans()
        try:
            os._exit(0 if all([try_all(trial, only, every) for trial in trials]) else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


if __name__ == "__main__":
    sys.exit(main())
