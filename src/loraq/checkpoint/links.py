"""Which files belong to a folder that comes from somewhere: its own, and no others by a link.

A link is followed only inside the folder, or from a snapshot in the hub's cache to the blobs of the
same repository. Any other could bring a file along that nobody meant to give away.
"""

import os
import stat
from collections.abc import Collection
from pathlib import Path

from loraq.errors import CheckpointError
from loraq.regular_file import is_plain_path

#: A pipeline has some dozens of files; links inside of a folder can make more than any disk holds.
_MOST_FILES = 100_000
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}


def find_files(root: Path, *, without: Collection[str] = ()) -> dict[str, Path]:
    """Return every file below a folder, links resolved, by its path in the folder.

    Args:
        root: the folder.
        without: names of files and folders in it that are left out.

    Raises:
        CheckpointError: something there is not a file of its own; all such are listed.
    """
    home = _resolve(root)
    found: dict[str, Path] = {}
    refused: dict[str, str] = {}
    seen = 0
    folders: list[tuple[str, Path, tuple[Path, ...]]] = [("", home, (home,))]
    while folders:
        prefix, folder, above = folders.pop()
        for name in _list(folder):
            seen += 1
            if seen > _MOST_FILES:
                raise CheckpointError(
                    f"'{root}' holds more than {_MOST_FILES} files, as links in it are followed. "
                    "Give a folder that holds the pipeline and nothing else."
                )
            if prefix + name in without:
                continue
            place, kind, reason = _judge(folder / name, home)
            if not is_plain_path(prefix + name):
                reason = "a name that is too long, or cannot be printed"
            if reason:
                refused[prefix + name] = reason
            elif kind == stat.S_IFREG:
                found[prefix + name] = place
            elif place in above:
                refused[prefix + name] = "a link to a folder that it is in"
            else:
                folders.append((f"{prefix}{name}/", place, (*above, place)))
    _raise_if(refused, root)
    return dict(sorted(found.items()))


def require_own_weights(root: Path, weights: Path) -> None:
    """Raise `CheckpointError` if what is read of a transformer's folder is not the source's own.

    Args:
        root: the source that was given: a pipeline's folder, or `weights` itself.
        weights: the folder of the transformer.
    """
    read = [weights / "config.json"]
    for pattern in ("*.safetensors", "*.safetensors.index*.json"):
        read += sorted(weights.glob(pattern))
    home = _resolve(root)
    judged = {path.name: _judge(path, home) for path in read if os.path.lexists(path)}
    refused = {name: reason for name, (_, _, reason) in judged.items() if reason}
    _raise_if(refused, weights)


def _judge(path: Path, home: Path) -> tuple[Path, int, str]:
    """Return where a path leads, the kind of what is there, and why it is refused, or ""."""
    place = _resolve(path)
    try:
        kind = stat.S_IFMT(place.stat().st_mode)
    except OSError:
        return place, 0, "a link that leads nowhere" if path.is_symlink() else "not readable"
    if not any(folder in (place, *place.parents) for folder in (home, *_blobs_of(home))):
        return place, kind, f"a link out of it, to '{place}'"
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        return place, kind, _KINDS.get(kind, "not a file")
    return place, kind, ""


def _blobs_of(home: Path) -> list[Path]:
    """Return where the hub's cache keeps the files of a snapshot: `models--X/blobs`."""
    return [
        snapshot.parents[1] / "blobs"
        for snapshot in (home, *home.parents)
        if snapshot.parent.name == "snapshots" and snapshot.parents[1].name.startswith("models--")
    ]


def _list(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"Cannot read '{folder}': {error}. Make it readable.") from error


def _resolve(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _raise_if(refused: dict[str, str], folder: Path) -> None:
    if not refused:
        return
    some = "; ".join(f"'{name}' ({reason})" for name, reason in sorted(refused.items())[:6])
    more = f" and {len(refused) - 6} more" if len(refused) > 6 else ""
    raise CheckpointError(
        f"'{folder}' holds what is not a file of its own: {some}{more}. Links are followed only "
        "inside of the source, and from a snapshot to the blobs of the hub's cache. Put what "
        "belongs to it in the place of the link, and take the rest away."
    )
