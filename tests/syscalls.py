"""The calls by which a run changes the disk: recorded in their order, or the last of a process.

loraq writes through `os` and `loraq.disk` alone, which is checked here too: a file that is opened
for writing in any other way ends the recording with an error.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from loraq import disk

#: What changes the disk, or makes a change durable.
CALLS = (
    "open",
    "write",
    "pwrite",
    "sendfile",
    "copy_file_range",
    "truncate",
    "ftruncate",
    "posix_fallocate",
    "fsync",
    "rename",
    "replace",
    "mkdir",
    "rmdir",
    "unlink",
    "remove",
    "link",
    "symlink",
    "chmod",
    "utime",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Call:
    """One call."""

    name: str
    #: What it is about; a descriptor is told by the path that it was opened with.
    path: Path
    #: Where to, of a rename, a link and an exchange.
    to: Path | None = None


@dataclass
class Recording:
    """The calls so far."""

    #: Only what is below this folder counts.
    root: Path
    calls: list[Call] = field(default_factory=list)
    #: Called before each of them.
    before: Callable[[Call], None] = lambda call: None


_active: list[Recording] = []


def _watch(event: str, args: tuple[Any, ...]) -> None:
    """See every file that Python opens, whoever asks for it."""
    if event == "open" and _active and isinstance(args[0], str | os.PathLike):
        path, mode, _flags = args
        by_os = mode is None
        if not by_os and set(mode) & set("wax+") and _is_below(_active[-1].root, Path(path)):
            raise AssertionError(f"'{path}' is opened with mode {mode!r}, and not by loraq.disk")


sys.addaudithook(_watch)


def _is_below(root: Path, path: Path) -> bool:
    path = Path(os.path.abspath(path))
    return root in (path, *path.parents)


class _Recorder:
    """Stands in for the functions of `os` and for `disk.exchange`."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._opened: dict[int, Path] = {}
        self._exchange = disk.exchange
        self.stand_ins: dict[str, Callable[..., Any]] = {
            name: partial(self._call, name, getattr(os, name)) for name in CALLS
        }

    def exchange(self, one: Path, other: Path) -> bool:
        self._tell("exchange", one, other)
        done = self._exchange(one, other)
        if not done:
            self._recording.calls.pop()
        return done

    def _call(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        at = self._place(args[0], kwargs.get("dir_fd"))
        if name in ("rename", "replace", "link", "symlink"):
            self._tell(name, at, self._place(args[1]))
        elif name != "open" or args[1] & _WRITING:
            self._tell(name, at)
        result = original(*args, **kwargs)
        if name == "open":
            self._opened[result] = at
        return result

    def _place(self, what: Any, folder: int | None = None) -> Path:
        if isinstance(what, int):
            return self._opened.get(what, Path("?"))
        path = Path(os.fsdecode(what))
        return path if folder is None else self._opened.get(folder, Path("?")) / path

    def _tell(self, name: str, *paths: Path) -> None:
        if any(_is_below(self._recording.root, path) for path in paths):
            call = Call(name, *paths)
            self._recording.before(call)
            self._recording.calls.append(call)


@contextmanager
def record(root: Path, before: Callable[[Call], None] | None = None) -> Iterator[Recording]:
    """Record the calls that change something below a folder, in this process."""
    recording = Recording(root, before=before or (lambda call: None))
    recorder = _Recorder(recording)
    with ExitStack() as stack:
        for name, stand_in in recorder.stand_ins.items():
            stack.enter_context(patch.object(os, name, stand_in))
        stack.enter_context(patch.object(disk, "exchange", recorder.exchange))
        _active.append(recording)
        stack.callback(_active.remove, recording)
        yield recording
