"""A folder that nobody else writes to, and work on it that nobody else does at the same time."""

import os
import stat
import tempfile
from collections.abc import Collection
from pathlib import Path

from loraq import disk
from loraq.errors import CheckpointError


def make_private(path: Path, may_hold: Collection[str]) -> None:
    """Make a folder for this user alone; take over one that is there only if it is such.

    Others could have put into any other one what a run would take for its own, or a link to what it
    would then write into.

    Raises:
        CheckpointError: it is a link or a file, another user's, open to others, or holds something
            else.
    """
    try:
        os.mkdir(path, 0o700)
        disk.sync_folder(path.parent)
        return
    except FileExistsError:
        status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise _foreign(path, "is not a folder")
    if os.name == "posix" and status.st_uid != os.geteuid():
        raise _foreign(path, "belongs to another user")
    if os.name == "posix" and status.st_mode & 0o077 and _has_modes(path.parent):
        raise _foreign(path, "is open to other users")
    if strange := sorted({inner.name for inner in path.iterdir()} - {*may_hold}):
        raise _foreign(path, f"holds '{strange[0]}', which loraq did not write")
    if links := [inner.name for inner in path.iterdir() if inner.is_symlink()]:
        raise _foreign(path, f"holds '{links[0]}', a link")


def _foreign(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"'{path}' {reason}, so it is not used. Move it elsewhere, or choose another target."
    )


def _has_modes(folder: Path) -> bool:
    """Return whether a file system keeps who may enter a folder; FAT, for example, does not."""
    probe = tempfile.mkdtemp(dir=folder, prefix=".loraq-")
    try:
        return not os.lstat(probe).st_mode & 0o077
    finally:
        os.rmdir(probe)


def require_alone(descriptor: int, path: Path, target: Path) -> None:
    """Lock the journal for this process until it is closed; the lock dies with the process.

    Raises:
        CheckpointError: another run has the lock, or had it and has taken the file away meanwhile.
    """
    if not disk.lock(descriptor):
        raise CheckpointError(
            f"'{target}' is being written by another run. Wait until it has ended, or choose "
            "another target."
        )
    if not path.exists() or path.stat().st_ino != os.fstat(descriptor).st_ino:
        raise CheckpointError(
            f"'{target}' was being written by another run, which has just ended. Try again."
        )
