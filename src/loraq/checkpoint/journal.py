"""Work that survives a crash: a folder that becomes whole in steps, and the journal of them.

The target `NAME` is prepared in `.NAME.partial` beside it:

    .NAME.partial/journal.jsonl   a fingerprint of the run, then a line for each finished layer
    .NAME.partial/files/          what becomes `NAME` by one rename at the end

A line is written after what it tells is on the disk, and a torn last line does not count. So at any
moment the same run can go on from what the journal says. The journal is locked by the run that
writes it; the lock dies with it.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from loraq.checkpoint.folder import publish, reason_of, require_alone, require_free
from loraq.errors import CheckpointError, LayerError

_WHOLE = {"whole": True}


class Journal:
    """The finished layers of one run, by name, and the folder they are in."""

    def __init__(self, file: IO[bytes], folder: Path) -> None:
        """Read what stands in an open journal."""
        self._file = file
        #: Where the files of the target grow.
        self.folder = folder
        #: What was written of each finished layer.
        self.layers: dict[str, dict[str, Any]] = {}
        #: What the run was made of, or `None` in a new journal.
        self.fingerprint: dict[str, Any] | None = None
        #: Whether only the last rename can be missing.
        self.whole = False
        file.seek(0)
        end = 0
        for line in file:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                break
            end += len(line)
            if self.fingerprint is None:
                self.fingerprint = entry
            elif entry == _WHOLE:
                self.whole = True
            else:
                self.layers[str(entry["name"])] = entry
        file.truncate(end)

    @property
    def is_published(self) -> bool:
        """Whether a run that was killed right after its last rename has left nothing to do."""
        return self.whole and not self.folder.exists()

    def note(self, layer: dict[str, Any]) -> None:
        """Note a layer (plain data with a "name") whose bytes are on the disk."""
        self._write(layer)
        self.layers[layer["name"]] = layer

    def finish(self) -> None:
        """Note that the folder is whole."""
        self._write(_WHOLE)
        self.whole = True

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Forget everything, and begin the journal of a run."""
        self._file.truncate(0)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.layers, self.whole, self.fingerprint = {}, False, fingerprint
        self._write(fingerprint)

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.seek(0, os.SEEK_END)
        place = self._file.tell()
        try:
            left = json.dumps(entry).encode() + b"\n"
            while left:  # a disk that is almost full takes a part
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(place)  # half a line would hide the next ones
            raise


@contextmanager
def resumable_folder(
    target: Path,
    fingerprint: dict[str, Any],
    n_layers: int,
    *,
    overwrite: bool = False,
    restart: bool = False,
) -> Iterator[Journal]:
    """Yield the journal of the partial folder of a target.

    The folder takes the target's name when the block ends without an error.

    On an error what is finished is kept, and the message says so; if no layer is finished, nothing
    is kept. If a run was killed right after its last rename, the journal that is yielded is `whole`
    and its `folder` is gone.

    Args:
        target: the folder to make.
        fingerprint: plain data by topic; a journal with another one is not continued.
        n_layers: layers in all, for messages.
        overwrite: whether a model folder that is there may be replaced.
        restart: whether to begin anew, whatever is there.

    Raises:
        CheckpointError: the target is there, is written by another run right now, or was begun with
            other settings; the disk refuses.
    """
    fingerprint = json.loads(json.dumps(fingerprint))  # as it will be read back
    target = target.resolve()  # a link stays, and what it points to is replaced
    partial = _partial(target)
    with _open_locked(target, partial, overwrite=overwrite) as file:
        journal = Journal(file, partial / "files")
        if journal.layers and not restart:
            _require_same(journal, fingerprint, partial, n_layers)
        try:
            published = (
                journal.whole and not journal.folder.exists() and target.exists() and not restart
            )
            if not published:
                require_free(target, overwrite=overwrite)
                if restart or not journal.layers:
                    journal.begin(fingerprint)
                journal.folder.mkdir(exist_ok=True)
            yield journal
            if not published:
                _sync(journal.folder)
                journal.finish()
                publish(journal.folder, target)
            journal.layers = {}
        except (CheckpointError, LayerError) as error:
            raise type(error)(f"{error}{_say_what_is_kept(journal, n_layers)}") from error
        except OSError as error:
            raise CheckpointError(
                f"Cannot write '{target}': {reason_of(error)}. Free space, and try "
                f"again.{_say_what_is_kept(journal, n_layers)}"
            ) from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Interrupted.{_say_what_is_kept(journal, n_layers) or ' Nothing was left.'}"
            ) from None
        finally:
            if not journal.layers:  # nothing that is worth keeping, or everything is in its place
                shutil.rmtree(partial, ignore_errors=True)


def require_target(target: Path, *, overwrite: bool) -> None:
    """Raise `CheckpointError` if a run cannot begin at this target.

    A run that was begun there is looked at later.
    """
    if not _partial(target.resolve()).exists():
        require_free(target, overwrite=overwrite)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


@contextmanager
def _open_locked(target: Path, partial: Path, *, overwrite: bool) -> Iterator[IO[bytes]]:
    """Open the journal of a partial folder, made if need be, for this process alone."""
    require_target(target, overwrite=overwrite)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        file = (partial / "journal.jsonl").open("a+b", buffering=0)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write '{target}': {reason_of(error)}. Choose another target."
        ) from error
    with file:
        require_alone(file, partial / "journal.jsonl", target)
        yield file


def _require_same(
    journal: Journal, fingerprint: dict[str, Any], partial: Path, n_layers: int
) -> None:
    then = journal.fingerprint or {}
    topics = [topic for topic in fingerprint if then.get(topic) != fingerprint[topic]]
    if topics:
        changed = (
            f"{topic} ({_describe_change(then.get(topic), fingerprint[topic])})" for topic in topics
        )
        raise CheckpointError(
            f"'{partial}' holds {len(journal.layers)} of {n_layers} layers of a run with other "
            f"settings. Changed: {'; '.join(changed)}. Use the old settings to go on, `--restart` "
            f"to begin anew, or another target."
        )


def _describe_change(then: Any, now: Any) -> str:
    """Say what changed, by dotted key if there are keys; a few of them are enough."""
    before, after = _flatten(then), _flatten(now)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    keys.sort(key=lambda key: key.count("."))  # a recipe's method before its scheme's formats
    some = ", ".join(
        f"{key}: {before.get(key)!r} then, {after.get(key)!r} now".removeprefix(": ")
        for key in keys[:3]
    )
    return some + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Return the values in nested tables by dotted key; one that is not a table has its own."""
    if not isinstance(value, dict):
        return {key: value}
    return {
        k: v
        for name, inner in value.items()
        for k, v in _flatten(inner, f"{key}.{name}" if key else name).items()
    }


def _say_what_is_kept(journal: Journal, n_layers: int) -> str:
    if not journal.layers:
        return ""
    return f" {len(journal.layers)} of {n_layers} layers are kept; run the same command to go on."


def _sync(folder: Path) -> None:
    """Return when every file of a folder is on the disk.

    So a folder that is whole stays whole after a power failure.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
