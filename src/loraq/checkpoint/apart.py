"""The one guard of everything that writes: a target must be apart from all that a run reads."""

import os
from collections.abc import Iterator
from pathlib import Path

from loraq.checkpoint.folder import resolve_target
from loraq.checkpoint.partial import partial_path
from loraq.errors import CheckpointError

#: Links that lead to links are followed so far, as Linux does.
_MOST_LINKS = 40


def require_apart(
    target: str | Path, *inputs: str | Path | None, in_memory: str | Path | None = None
) -> None:
    """Raise `CheckpointError` if writing or replacing a target could touch what a run reads.

    Files and folders are the same if the system says so, not if their names are: links, mounts and
    file systems that ignore case are seen through.

    Args:
        target: a folder or file to make; what it holds now may be replaced.
        inputs: files and folders that the run reads; links are resolved, those inside of a folder
            too. `None`, and what does not exist, such as a repository of the hub, is no danger.
        in_memory: what was read whole before: it may be the target, or hold it, but must not be
            lost with it.
    """
    target = Path(target)
    resolve_target(target)  # a name that no file can have is refused here already
    for place in _places_of(target):
        for given in (Path(path) for path in inputs if path is not None and os.path.lexists(path)):
            _require_apart(target, place, given)
        if in_memory is not None and os.path.lexists(in_memory):
            origin, source = Path(in_memory), _resolve(Path(in_memory))
            if _identity(source) != _identity(place):
                _require_outside(origin, source, target, place)
                _require_no_links(origin, target, place)


def _require_apart(target: Path, place: Path, given: Path) -> None:
    source = _resolve(given)
    if _identity(source) == _identity(place):
        raise CheckpointError(f"Source and target are both '{given}'. Choose another target.")
    _require_outside(target, place, given, source)
    _require_outside(given, source, target, place)
    if _identity(partial_path(place)) in _identities(source):
        raise CheckpointError(
            f"'{given}' is where '{target}' would be prepared. Choose another target."
        )
    _require_no_links(given, target, place)
    _require_no_mounts(given, source, target, place)


def _require_outside(inner: Path, inner_place: Path, outer: Path, outer_place: Path) -> None:
    if _identity(outer_place) in _identities(inner_place):
        raise CheckpointError(
            f"'{inner}' lies inside '{outer}'. Source and target must be apart: choose another "
            "target."
        )


def _require_no_links(given: Path, target: Path, place: Path) -> None:
    for link in _find_links(given):
        if any(_identity(place) in _identities(hop) for hop in _trace(link)):
            raise CheckpointError(
                f"'{link}' is a link into '{target}', which would be replaced. Choose another "
                "target."
            )


def _require_no_mounts(given: Path, source: Path, target: Path, place: Path) -> None:
    """A folder may be mounted in two places: then one of the source is one of the target."""
    in_target = {_identity(folder) for folder in _find_folders(place)}
    for folder in _find_folders(source) if in_target else ():
        if _identity(folder) in in_target:
            raise CheckpointError(
                f"'{folder}' in '{given}' is also a folder of '{target}', which would be replaced. "
                "Choose another target."
            )


def _find_folders(folder: Path) -> Iterator[Path]:
    """Yield a folder and all below it; links are not followed."""
    for parent, _, _ in os.walk(folder):
        yield Path(parent)


def _resolve(path: Path) -> Path:
    """Return where a path leads; links that lead nowhere do not hinder."""
    return Path(os.path.realpath(path))


def _places_of(target: Path) -> list[Path]:
    """Return where a target is: what it leads to, and the link itself if it is one."""
    link = [_resolve(target.parent) / target.name] if target.is_symlink() else []
    return [_resolve(target), *link]


def _identity(path: Path) -> tuple[int, int] | Path:
    """Return what is equal for two names of the same file or folder."""
    try:
        status = path.stat()
    except OSError:
        return path
    return status.st_dev, status.st_ino


def _identities(path: Path) -> list[tuple[int, int] | Path]:
    """Return the identity of a path and of every folder above it."""
    return [_identity(each) for each in (path, *path.parents)]


def _find_links(folder: Path) -> Iterator[Path]:
    """Yield a path if it is a link, and every link below it; linked folders are not entered."""
    if folder.is_symlink():
        yield folder
    for parent, inner, files in os.walk(folder):
        paths = (Path(parent) / name for name in (*inner, *files))
        yield from (path for path in paths if path.is_symlink())


def _trace(link: Path) -> Iterator[Path]:
    """Yield every place that a link leads through, up to its end."""
    place = link
    for _ in range(_MOST_LINKS):
        if not place.is_symlink():
            break
        to = place.parent / place.readlink()
        if to.name == "..":
            break
        place = _resolve(to.parent) / to.name
        yield place
    yield _resolve(link)
