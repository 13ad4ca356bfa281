"""Write folders that are whole or not there: a partial folder, and one rename at the end."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from loraq.errors import CheckpointError

#: A folder that is replaced whole must hold one of these.
_MODEL_MARKS = ("loraq.json", "config.json", "model_index.json")


def require_alone(file: IO[bytes], path: Path, target: Path) -> None:
    """Lock an open file for this process until it is closed.

    The file stands for all work on `target`; the lock dies with the process.

    Raises:
        CheckpointError: another run has the lock, or had it and has taken the file away meanwhile.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CheckpointError(
            f"'{target}' is being written by another run. Wait until it has ended, or choose "
            "another target."
        ) from error
    if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
        raise CheckpointError(
            f"'{target}' was being written by another run, which has just ended. Try again."
        )


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Raise `CheckpointError` unless a folder of this name can be created."""
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(
            f"Cannot write '{folder}': a file of this name exists. Choose another folder."
        )
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"Cannot write '{folder}': the folder is not empty. Choose another one, or allow "
                "overwriting (`--overwrite`)."
            )
        if not any((folder / mark).is_file() for mark in _MODEL_MARKS):
            raise CheckpointError(
                f"Will not replace '{folder}': it holds none of {', '.join(_MODEL_MARKS)}, so it "
                "is not a model's folder. Choose another one, or delete it yourself."
            )
    parent = next(parent for parent in (*folder.parents, folder) if parent.exists())
    if not parent.is_dir():
        raise CheckpointError(
            f"Cannot write '{folder}': '{parent}' is a file. Choose another folder."
        )
    if not os.access(parent, os.W_OK):
        raise CheckpointError(
            f"Cannot write '{folder}': '{parent}' is read-only. Choose another folder."
        )


@contextmanager
def atomic_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that takes the name of `folder` when the block ends without an error.

    Until then it stands beside it.

    Raises:
        CheckpointError: the target exists, or the disk refuses.
    """
    folder = folder.resolve()  # a link stays, and what it points to is replaced
    require_free(folder, overwrite=overwrite)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        publish(partial, folder)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"Cannot write '{folder}': {reason_of(error)}. Nothing was left there. Free space, and "
            "try again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, folder: Path) -> None:
    """Give a finished folder its name, in place of what may be there.

    On failure everything stays as it was.
    """
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    try:
        partial.rename(folder)
    except BaseException:
        if replaced.exists():
            replaced.rename(folder)
        raise
    # Also what a run left that was killed between the two renames.
    shutil.rmtree(replaced, ignore_errors=True)


def reason_of(error: OSError) -> str:
    """Say why the disk refused."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)
    return "the disk is full" if full else str(error)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
