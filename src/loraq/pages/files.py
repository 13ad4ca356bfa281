"""What pages and pictures are written into: a name that is free, or an older one of ours."""

import os
from pathlib import Path

from loraq.checkpoint.apart import require_apart
from loraq.checkpoint.partial import atomic_file, explain_refusals
from loraq.disk import write_file
from loraq.errors import LoraqError
from loraq.pages.frame import GENERATOR
from loraq.regular_file import open_regular

#: How far into a file is looked for what says that it is ours.
_HEAD = 1000


def require_place(path: Path, *inputs: str | Path | None, mark: bytes = GENERATOR.encode()) -> None:
    """Make the folder of a page or picture, and see that it can be written there.

    What is wrong is then known before long work and not after.

    Args:
        path: the file to make.
        inputs: what is read.
        mark: what stands in the head of a file that may be replaced.

    Raises:
        CheckpointError: the file would be among those that are read.
        LoraqError: it cannot be written, or is not ours.
    """
    require_apart(path, *inputs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoraqError(f"Cannot write '{path}': {error}. Choose another folder.") from error
    if path.is_dir() or path.is_symlink() or not os.access(path.parent, os.W_OK):
        raise LoraqError(
            f"Cannot write '{path}': it is a folder or a link, or its folder is read-only. Choose "
            "another folder."
        )
    if path.exists() and not _is_ours(path, mark):
        raise LoraqError(
            f"Will not replace '{path}': loraq has not made it. Choose another name, or move it."
        )


def _is_ours(path: Path, mark: bytes) -> bool:
    try:
        with open_regular(path) as file:
            return mark in file.read(_HEAD)
    except OSError:
        return False


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears when it is whole, where `require_place` has looked.

    Raises:
        CheckpointError: the disk refuses.
    """
    with atomic_file(path) as partial, explain_refusals(path):
        write_file(partial, content)
