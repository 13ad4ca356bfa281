"""The journals of a run's workers: one each, because hosts that share a disk cannot share a file.

A worker notes a layer before it tells the leader, who notes it in the journal of the run. So a
layer is done again only if neither did; what the leader did not hear of, the next run gathers.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loraq import disk
from loraq.checkpoint.journal import Journal
from loraq.errors import CheckpointError

#: Seconds in which the workers of a run that was killed find that out.
_PATIENCE = 10.0


def open_own(folder: Path, worker: int, fingerprint: Mapping[str, Any]) -> Journal:
    """Open the journal of a worker, which has it, and its lock, until its process ends.

    A rank that is started again while its run goes on finds its own.

    Args:
        folder: of all workers' journals.
        worker: number of the worker.
        fingerprint: of the run.

    Raises:
        CheckpointError: another worker has it.
        OSError: the disk refuses.
    """
    disk.make_folders(folder)
    path = folder / f"{worker}.jsonl"
    descriptor = disk.open_file(path, create=True, mode=0o600)
    if not disk.lock(descriptor):
        os.close(descriptor)
        raise _busy(path)
    journal = Journal(descriptor, path)
    if journal.fingerprint != _short(fingerprint):
        journal.begin(_short(fingerprint))
        disk.sync_folder(folder)
    return journal


def gather(folder: Path, journal: Journal) -> None:
    """Note in the journal of a run what its workers have finished, and remove theirs.

    Raises:
        CheckpointError: a worker of an earlier run is still at work, or a journal is damaged.
    """
    for path in sorted(folder.glob("*.jsonl")):
        with _lock_left(path) as descriptor:
            if journal.fingerprint is not None:
                left = Journal(descriptor, path)
                same = left.fingerprint == _short(journal.fingerprint)
                for name in left.layers.keys() - journal.layers.keys() if same else ():
                    journal.note(left.layers[name])
        path.unlink()


def list_noted(folder: Path) -> set[str]:
    """Return the layers that workers have noted; they may still be at work.

    It counts for a message after an error: what is damaged or goes away, the next run refuses.
    """
    names = set()
    for path in folder.glob("*.jsonl"):
        with suppress(OSError):
            for line in path.read_bytes().splitlines(keepends=True)[1:]:
                with suppress(ValueError, KeyError, TypeError):
                    if line.endswith(b"\n"):
                        names.add(str(json.loads(line.partition(b" ")[2])["name"]))
    return names


@contextmanager
def _lock_left(path: Path) -> Iterator[int]:
    descriptor = disk.open_file(path)
    try:
        end = time.monotonic() + _PATIENCE
        while not disk.lock(descriptor):
            if time.monotonic() > end:
                raise _busy(path)
            time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


def _short(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells a run from others: its fingerprint may have a megabyte."""
    return {"run": hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()}


def _busy(path: Path) -> CheckpointError:
    return CheckpointError(
        f"'{path}' is being written by a worker of another run, which may run on another machine. "
        "Wait until it has ended, or end it."
    )
