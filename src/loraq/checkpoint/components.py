"""A pipeline's other files: copied or linked beside the transformer, and known by their hashes.

They are no business of the loader. `loraq.json` notes them, so that `loraq inspect` can say whether
they are what was written.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraq import disk
from loraq.errors import CheckpointError, list_some
from loraq.regular_file import is_plain_path

#: Bytes that are read at a time.
_BLOCK = 4 * 2**20
#: Opens what it is given and nothing that a link leads to, and never waits for a pipe's other end.
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredFile:
    """What is known of a file that was written."""

    nbytes: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as `loraq.json` has it."""
        return {"bytes": self.nbytes, "sha256": self.sha256}


def copy_components(
    files: Mapping[str, Path], folder: Path, *, link: bool = False
) -> dict[str, StoredFile]:
    """Copy or link files into a folder, and return what was written by the path in it.

    What stands there already is kept if it is a copy, byte for byte.

    Args:
        files: regular files, no links, by their path in the folder.
        folder: where the target grows.
        link: whether to make hard links instead of copies.

    Raises:
        CheckpointError: a file cannot be read.
        OSError: the disk of the folder refuses.
    """
    stored = {}
    for name, path in files.items():
        copy = folder / name
        disk.make_folders(copy.parent)
        if link:
            copy.unlink(missing_ok=True)
            stored[name] = _hash(path)
            os.link(path, copy)
            continue
        is_copy = copy.is_file() and not copy.is_symlink() and not copy.samefile(path)
        if is_copy and (kept := _hash(copy)) == _hash(path):
            stored[name] = kept
        else:
            copy.unlink(missing_ok=True)
            stored[name] = _copy(path, copy)
    return stored


def hash_components(files: Mapping[str, Path]) -> dict[str, StoredFile]:
    """Return what regular files hold, by their path in the pipeline.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return {name: _hash(path) for name, path in files.items()}


def check_components(root: Path, components: Mapping[str, StoredFile]) -> None:
    """Raise `CheckpointError` if a pipeline's other files are not those that were written."""
    missing = {name: None for name in components if not (root / name).is_file()}
    changed = [
        name
        for name, stored in components.items()
        if name not in missing and not _is_still(root / name, stored)
    ]
    wrong = [f"'{name}' is missing" for name in missing]
    wrong += [f"'{name}' was changed" for name in changed]
    if wrong:
        raise CheckpointError(
            f"Of {len(components)} other files in '{root}', {len(wrong)} are not as they were "
            f"written: {list_some(wrong)}. Copy them again."
        )


def parse_components(content: Any) -> dict[str, StoredFile]:
    """Return the files that stand under `components` in `loraq.json`.

    Raises:
        ValueError: they are not paths that stay in the pipeline's folder, with bytes and SHA-256.
    """
    if not isinstance(content, dict):
        raise ValueError("'components' is not a table of files.")
    stored = {}
    for name, entry in content.items():
        entry = entry if isinstance(entry, dict) else {}
        if not is_plain_path(name) or Path(name).drive:
            raise ValueError(f"'components' names {name!r}, which is not a path in the pipeline.")
        nbytes, sha256 = entry.get("bytes"), entry.get("sha256")
        if type(nbytes) is not int or nbytes < 0:
            raise ValueError(f"'components' has {nbytes!r} bytes of {name!r}.")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise ValueError(f"'components' has the SHA-256 {sha256!r} of {name!r}.")
        stored[name] = StoredFile(nbytes, sha256)
    return stored


def _copy(path: Path, copy: Path) -> StoredFile:
    """Copy a file with its permissions; what is hashed is what is written."""
    digest, nbytes = hashlib.sha256(), 0
    with _open(path) as source:
        mode = stat.S_IMODE(os.fstat(source).st_mode) & 0o777
        with _closing(disk.create_file(copy, mode=mode)) as written:
            for block in _read(source, path):
                digest.update(block)
                nbytes += len(block)
                disk.write_all(written, block)
    return StoredFile(nbytes, digest.hexdigest())


def _hash(path: Path) -> StoredFile:
    digest, nbytes = hashlib.sha256(), 0
    with _open(path) as source:
        for block in _read(source, path):
            digest.update(block)
            nbytes += len(block)
    return StoredFile(nbytes, digest.hexdigest())


def _is_still(path: Path, stored: StoredFile) -> bool:
    # A pipeline from the hub is a folder of links.
    return path.stat().st_size == stored.nbytes and _hash(Path(os.path.realpath(path))) == stored


@contextmanager
def _open(path: Path) -> Iterator[int]:
    """Open a regular file, and nothing else that may have taken its place."""
    try:
        descriptor = os.open(path, _READ | _BINARY)
    except OSError as error:
        raise CheckpointError(f"Cannot read '{path}': {error}. Make it readable.") from error
    with _closing(descriptor):
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"'{path}' is not a regular file any more. Put it back.")
        yield descriptor


@contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read(descriptor: int, path: Path) -> Iterator[bytes]:
    try:
        while block := os.read(descriptor, _BLOCK):
            yield block
    except OSError as error:
        raise CheckpointError(f"Cannot read '{path}': {error}. Try again.") from error
