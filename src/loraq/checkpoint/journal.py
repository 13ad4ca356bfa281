"""The journal of a run: what it was made of, and a line for each layer that is finished.

A line is written after what it tells is on the disk, so at any moment the same run can go on from
what the journal says. Each line begins with a checksum of itself and of all lines before it:

    <16 hex digits> {"recipe": …}                      the first: the fingerprint of the run
    <16 hex digits> {"name": "blocks.0.proj", …}       a finished layer
    <16 hex digits> {"whole": "<SHA-256>"}             the folder is whole, and looks like this

A torn last line does not count; any other line that is not what was written is an error.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from loraq.disk import write_all
from loraq.errors import CheckpointError

#: Longest journal that is read; one of 10 000 layers has 6 MB.
_MOST_BYTES = 100_000_000


class Journal:
    """The finished layers of one run, by name."""

    def __init__(self, descriptor: int, path: Path) -> None:
        """Read what stands in an open journal.

        Raises:
            CheckpointError: it is damaged, or another program wrote it.
        """
        self._descriptor, self._path = descriptor, path
        #: What was written of each finished layer.
        self.layers: dict[str, dict[str, Any]] = {}
        #: What the run was made of, or `None` in a new journal.
        self.fingerprint: dict[str, Any] | None = None
        #: What the whole folder looks like; "" as long as it is not whole.
        self.whole = ""
        self._check = self._end = 0
        for number, line in enumerate(self._read().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            self._take(number, line)
        os.ftruncate(descriptor, self._end)

    def note(self, layer: dict[str, Any]) -> None:
        """Note a layer (plain data with a "name") whose bytes are on the disk."""
        self._write(layer)
        self.layers[layer["name"]] = layer

    def finish(self, whole: str) -> None:
        """Note that the folder is whole, and what it looks like."""
        self._write({"whole": whole})
        self.whole = whole

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Forget everything, and begin the journal of a run."""
        self.forget()
        self.fingerprint = fingerprint
        self._write(fingerprint)

    def forget(self) -> None:
        """Forget everything."""
        os.ftruncate(self._descriptor, 0)
        self.layers, self.whole, self.fingerprint = {}, "", None
        self._check = self._end = 0

    def _read(self) -> bytes:
        size = os.fstat(self._descriptor).st_size
        if size > _MOST_BYTES:
            raise self._damage(f"it has {size} bytes")
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            return file.read()

    def _take(self, number: int, line: bytes) -> None:
        """Take in one whole line."""
        written, _, text = line.partition(b" ")
        check = self._checksum(text)
        if written != f"{check:016x}".encode():
            raise self._damage(f"line {number} is not what was written")
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._damage(f"line {number} cannot be read") from error
        if not isinstance(entry, dict):
            raise self._damage(f"line {number} is not an object")
        if self.fingerprint is None:
            self.fingerprint = entry
        elif isinstance(entry.get("name"), str):
            self.layers[entry["name"]] = entry
        elif isinstance(entry.get("whole"), str):
            self.whole = entry["whole"]
        else:
            raise self._damage(f"line {number} is neither a layer nor the end")
        self._check, self._end = check, self._end + len(line)

    def _write(self, entry: dict[str, Any]) -> None:
        text = json.dumps(entry).encode() + b"\n"
        check = self._checksum(text)
        line = f"{check:016x} ".encode() + text
        os.lseek(self._descriptor, self._end, os.SEEK_SET)
        try:
            write_all(self._descriptor, line)
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, self._end)  # half a line would hide the next ones
            raise
        self._check, self._end = check, self._end + len(line)

    def _checksum(self, text: bytes) -> int:
        """Return the checksum of a line after the lines that there are."""
        before = self._check.to_bytes(8, "big")
        return int.from_bytes(hashlib.sha256(before + text).digest()[:8], "big")

    def _damage(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"'{self._path}' is damaged, or is not a journal of loraq: {reason}. Use `--restart` "
            f"to begin anew, or delete '{self._path.parent}'."
        )


def describe_change(then: Any, now: Any) -> str:
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
