"""Open files of strangers: at once or not at all, and never more of them than is sane."""

import os
import stat
from io import BufferedReader
from pathlib import Path

#: Longest name of a file on the usual file systems.
_MOST_NAME_BYTES = 255
#: Longest path inside a folder; systems take 4096 bytes in all.
_MOST_PATH_CHARACTERS = 1000


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read its bytes.

    A name may stand for a pipe that nobody writes to, where opening waits for ever, or for a
    device, where reading has effects: only plain files, and links to them, are opened.

    Raises:
        OSError: there is no such file, it is something else than a file, or it cannot be opened.
    """
    _require_regular(os.stat(path))
    # Somebody may put a pipe there after the look: then this does not wait, and the next line sees.
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    try:
        _require_regular(os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path, most: int) -> bytes:
    """Return the content of a file of at most that many bytes.

    Raises:
        OSError: it cannot be opened, as `open_regular` says, or is longer.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"it has more than {most} bytes, which no file of its kind has")
    return content


def is_plain_name(name: str) -> bool:
    """Return whether a name can be that of a file, and stands for one in the folder it is in."""
    return (
        name.isprintable()
        and name not in ("", ".", "..")
        and not {"/", "\\"} & set(name)
        and len(name.encode()) <= _MOST_NAME_BYTES
    )


def is_plain_path(path: str) -> bool:
    """Return whether a path leads to a file below the folder where it is looked up."""
    return len(path) <= _MOST_PATH_CHARACTERS and all(map(is_plain_name, path.split("/")))


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is a folder, a pipe or a device, and not a file")
