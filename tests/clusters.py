"""Clusters on one machine: torchrun's agents on the loopback as hosts, which can be killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

import loraq

#: All processes of a cluster have this in their environment, with the cluster's own value.
MARK = "LORAQ_TEST_CLUSTER"
_NOT_RUNNING = "ZX"


def make_source(path: Path, n_layers: int, width: int) -> list[str]:
    """Write a source with layers of one kind, and return their names."""
    rng = torch.Generator().manual_seed(0)
    names = [f"blocks.{i}.proj" for i in range(n_layers)]
    weights = {
        f"{name}.weight": torch.randn(width, width + i, generator=rng)
        for i, name in enumerate(names)
    }
    save_file({**weights, "norm.scale": torch.ones(width)}, path)
    return names


@dataclass
class Cluster:
    """One command on several hosts."""

    command: list[str]
    hosts: int = 1
    #: On each host.
    ranks: int = 1
    #: Whether each host has an agent of torchrun; else all ranks start by themselves, as by srun.
    torchrun: bool = True
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    agents: list[subprocess.Popen] = field(default_factory=list)

    def __enter__(self) -> "Cluster":
        """Start all agents."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(loraq.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
        }
        for rank in () if self.torchrun else range(self.hosts * self.ranks):
            ours = {"RANK": rank, "WORLD_SIZE": self.hosts * self.ranks}
            ours |= {"LOCAL_RANK": rank % self.ranks, "MASTER_ADDR": "127.0.0.1"}
            ours |= {"MASTER_PORT": port}
            here = {**environment, **{name: str(value) for name, value in ours.items()}}
            self._start([sys.executable, *self.command], here)
        for host in range(self.hosts if self.torchrun else 0):
            place = ("--nnodes", self.hosts, "--node-rank", host, "--nproc-per-node", self.ranks)
            meet = ("--master-addr", "127.0.0.1", "--master-port", port)
            agent = [sys.executable, "-m", "torch.distributed.run", *place, *meet]
            self._start([*map(str, agent), *self.command], environment)
        return self

    def _start(self, command: list[str], environment: dict[str, str]) -> None:
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.agents.append(subprocess.Popen(command, env=environment, text=True, **output))

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for agent in self.agents:
            agent.wait()
            agent.stdout.close()

    def processes(self) -> dict[int, str]:
        """Return the processes that run: by their number "agent", or the rank."""
        found = {}
        for entry in os.listdir("/proc"):
            if not entry.isdecimal():
                continue
            with suppress(OSError):
                environ = Path("/proc", entry, "environ").read_bytes().split(b"\0")
                status = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[0]
                if f"{MARK}={self.mark}".encode() in environ and status not in _NOT_RUNNING:
                    ranks = [each[5:].decode() for each in environ if each.startswith(b"RANK=")]
                    found[int(entry)] = ranks[0] if ranks else "agent"
        return found

    def read_all(self, patience: float) -> list[str]:
        """Wait until all agents have ended, and return what they said."""
        end = time.monotonic() + patience
        return [agent.communicate(timeout=end - time.monotonic())[0] for agent in self.agents]

    def wait_for_end(self, patience: float) -> bool:
        """Return whether all ranks end in time, those too whose agent was killed.

        An agent itself waits five minutes for the agents of hosts that were lost.
        """
        end, seen = time.monotonic() + patience, time.monotonic()
        while self.processes() and time.monotonic() < seen + 3:
            if {*self.processes().values()} - {"agent"}:
                seen = time.monotonic()
            if seen > end:
                return False
            time.sleep(0.1)
        return True


def finished(target: Path) -> set[str]:
    """Return the names in the journals of a run that was cut off: its own, and those of workers."""
    partial = target.with_name(f".{target.name}.partial")
    names = set()
    for journal in (*partial.glob("journal.jsonl"), *partial.glob("journals/*.jsonl")):
        for line in journal.read_bytes().splitlines(keepends=True):
            entry = json.loads(line.partition(b" ")[2]) if line.endswith(b"\n") else {}
            names |= {entry["name"]} if "name" in entry else set()
    return names


def solved(output: str) -> list[str]:
    """Return the layers that a run says it has done."""
    return re.findall(r"layer \d+ of \d+, .* s left, (\S+)", output)
