"""Bytes to the disk in an order that a crash or a power failure cannot turn round.

A thin layer on `os`, and all that loraq writes goes through it: tests record the calls, and kill a
run before each of them.
"""

import ctypes
import errno
import os
import stat
import sys
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _NO_LINK
_BINARY = getattr(os, "O_BINARY", 0)  # Windows
#: What a system answers that does not know a call, or a file system that does not support it.
_NOT_THERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
#: Of `renameat2` (Linux) and `renamex_np` (macOS): the two names are exchanged.
_AT_CWD, _EXCHANGE = -100, 2


def write_file(path: Path, content: bytes) -> None:
    """Write a new file; one that has this name is taken away first, and never written into."""
    path.unlink(missing_ok=True)
    descriptor = create_file(path)
    try:
        write_all(descriptor, content)
    finally:
        os.close(descriptor)


def create_file(path: Path, *, mode: int = 0o666) -> int:
    """Return the descriptor of a new file; raises `FileExistsError` for any that is there."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | _BINARY, mode)


def open_file(path: Path, *, create: bool = False, mode: int = 0o666, direct: bool = False) -> int:
    """Return the descriptor of a file to read and write.

    Args:
        path: of the file.
        create: whether a file that is not there is made.
        mode: of one that is made.
        direct: whether each write is on the disk when it returns, and touches no other bytes: a
            host that shares an NFS disk would otherwise write whole pages, and what another host
            has written beside its own bytes would be lost.

    Raises:
        OSError: the name stands for a link, for a file that has a second name, or for anything
            else that is not a file.
    """
    flags = os.O_RDWR | _NO_LINK | _BINARY | getattr(os, "O_NONBLOCK", 0)
    flags |= os.O_CREAT if create else 0
    flags |= getattr(os, "O_DSYNC", 0) if direct else 0
    descriptor = os.open(path, flags, mode)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file, or has a second name", str(path))
    return descriptor


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write where an open file stands; a disk that is almost full takes a part at a time."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Write at a place of an open file."""
    left = memoryview(content)
    while left:
        n = os.pwrite(descriptor, left, offset)
        left, offset = left[n:], offset + n


def make_folders(folder: Path) -> None:
    """Make a folder and its parents, each of them durable."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        try:
            os.mkdir(path)
        except FileExistsError:  # another run was faster
            continue
        sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """Return when every file below a folder is on the disk, and every name of one."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(parent, name), os.O_RDONLY | _NO_LINK | _BINARY)
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk."""
    if os.name == "posix":  # Windows opens no folder
        _sync(folder, _FOLDER)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_THERE:  # some file systems do not sync folders
            raise
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Give two files or folders each other's name, in one step.

    Returns:
        Whether it was done: not every system and file system can, and then nothing was.

    Raises:
        OSError: the disk refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform == "darwin":
        call, names = getattr(libc, "renamex_np", None), (os.fsencode(one), os.fsencode(other))
    else:
        call = getattr(libc, "renameat2", None)
        names = (_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other))
    if call is None:
        return False
    if call(*names, _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_THERE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def lock(descriptor: int) -> bool:
    """Lock an open file for this process until it is closed.

    Returns:
        False if another process has the lock. Where there are no locks (Windows, some network file
        systems), everybody gets it.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (*_NOT_THERE, errno.ENOLCK):
            return True
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True
