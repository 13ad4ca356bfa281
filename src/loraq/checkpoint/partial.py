"""Folders and files that are whole or not there: made beside the target, in a folder of our own.

The target `NAME` is prepared in `.NAME.partial` beside it, which nobody else may write to:

    .NAME.partial/journal.jsonl   locked by the run that writes; see `journal`
    .NAME.partial/journals/       those of the workers, where there are several
    .NAME.partial/files/          what becomes `NAME`
    .NAME.partial/replaced/       what was `NAME`, where a system cannot exchange two names at once

Durable before visible, visible before the old one goes: every file and folder is synced; then new
and old exchange their names; then the folder of the names is synced; then the old one is removed.
So a run that is killed, or a machine without power, leaves the old or the new under the name, and
the next run takes away the rest.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loraq import disk
from loraq.checkpoint.folder import refusal, require_free, require_writable, resolve_target
from loraq.checkpoint.journal import Journal, describe_change
from loraq.checkpoint.journals import gather, list_noted
from loraq.checkpoint.private import make_private, require_alone
from loraq.errors import CheckpointError, LayerError, LoraqWarning, RankError

_JOURNAL, _JOURNALS, _FILES, _REPLACED = "journal.jsonl", "journals", "files", "replaced"
#: Longest name, in bytes, of which the partial folder's is made; file systems take 255.
_MOST_NAME_BYTES = 240


class PartialFolder:
    """The folder beside a target, and its journal, while this process alone has them."""

    def __init__(self, target: Path, path: Path, descriptor: int, *, restart: bool) -> None:
        """Take over what an earlier run has left.

        Args:
            target: what is made.
            path: the private folder.
            descriptor: of its journal, locked.
            restart: whether the journal is forgotten unread.

        Raises:
            CheckpointError: the journal is damaged.
        """
        self.target, self.path = target, path
        #: Where the files of the target grow.
        self.folder = path / _FILES
        if restart:
            os.ftruncate(descriptor, 0)
        try:
            self.journal = Journal(descriptor, path / _JOURNAL)
            gather(path / _JOURNALS, self.journal)
        finally:
            self._put_back()
        whole = self.journal.whole
        if whole and (whole == _digest(target) or whole != _digest(self.folder)):
            # The run was killed after its folder got the target's name: what is here is the old
            # one, or what is left of it.
            self.journal.layers = {}

    def is_there(self) -> bool:
        """Return whether nobody has removed the folder meanwhile."""
        return (self.path / _JOURNAL).is_file() and self.folder.is_dir()

    @property
    def n_kept(self) -> int:
        """How many layers are finished, those too that only their worker has noted."""
        return len(self.journal.layers.keys() | list_noted(self.path / _JOURNALS))

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Forget what an earlier run has left, and begin anew."""
        self.journal.forget()
        for name in (_FILES, _REPLACED, _JOURNALS):
            if (self.path / name).exists():
                shutil.rmtree(self.path / name)
        self.journal.begin(fingerprint)
        os.mkdir(self.folder)
        disk.sync_folder(self.path)

    def require_same(self, fingerprint: dict[str, Any], n_layers: int) -> None:
        """Raise `CheckpointError` if the layers here are of a run with other settings."""
        then = self.journal.fingerprint or {}
        changed = "; ".join(
            f"{topic} ({describe_change(then.get(topic), fingerprint.get(topic))})"
            for topic in {**fingerprint, **then}
            if then.get(topic) != fingerprint.get(topic)
        )
        if changed and self.journal.layers:
            raise CheckpointError(
                f"'{self.path}' holds {len(self.journal.layers)} of {n_layers} layers of a run "
                f"with other settings. Changed: {changed}. Use the old settings to go on, "
                "`--restart` to begin anew, or another target."
            )

    def require_no_layers(self) -> None:
        """Raise `CheckpointError` if an interrupted run has finished layers here."""
        if self.journal.layers:
            raise CheckpointError(
                f"'{self.path}' holds {len(self.journal.layers)} layers of a run for this target "
                "that was interrupted. Run the same command to go on, delete that folder, or "
                "choose another target."
            )

    def resume(self) -> None:
        """Go on with what an earlier run has left."""
        if self.journal.whole:
            self.journal.finish("")  # what it looks like changes now
        self.folder.mkdir(exist_ok=True)

    def publish(self, *, overwrite: bool) -> None:
        """Give the finished folder the target's name, in place of what may be there.

        Raises:
            CheckpointError: something has got in the way meanwhile. Everything stays as it was.
            OSError: the disk refuses. Everything stays as it was.
        """
        require_free(self.target, overwrite=overwrite)
        disk.sync_tree(self.folder)
        self.journal.finish(_digest(self.folder))
        if self.target.is_dir() and any(self.target.iterdir()):
            if not disk.exchange(self.folder, self.target):
                self._replace_in_two_steps()
        else:
            self.folder.rename(self.target)
        disk.sync_folder(self.target.parent)
        disk.sync_folder(self.path)

    def remove(self) -> None:
        """Remove the folder with all that is in it; what was the target only if there is a new."""
        if (self.path / _REPLACED).exists() and not self.target.exists():
            return
        for name in (_FILES, _REPLACED, _JOURNALS):
            shutil.rmtree(self.path / name, ignore_errors=True)
            if (self.path / name).exists():
                warnings.warn(
                    f"'{self.path}' cannot be removed: something in it is protected. Delete it "
                    "yourself.",
                    LoraqWarning,
                    stacklevel=2,
                )
                return
        # The journal last: it tells a next run what the rest is.
        with suppress(OSError):
            os.unlink(self.path / _JOURNAL)
            os.rmdir(self.path)

    def _replace_in_two_steps(self) -> None:
        """Replace the target on a system that cannot exchange names; `_put_back` mends a kill."""
        os.rename(self.target, self.path / _REPLACED)
        try:
            os.rename(self.folder, self.target)
        except BaseException:
            os.rename(self.path / _REPLACED, self.target)
            raise

    def _put_back(self) -> None:
        """Put back what was the target, if a run was killed between the two steps."""
        replaced = self.path / _REPLACED
        if replaced.is_dir() and not self.target.exists():
            os.rename(replaced, self.target)
            disk.sync_folder(self.target.parent)
            warnings.warn(
                f"'{self.target}' was missing, because a run was killed while it replaced it. It "
                "is back as it was.",
                LoraqWarning,
                stacklevel=2,
            )


@contextmanager
def resumable_folder(
    target: Path,
    fingerprint: dict[str, Any],
    n_layers: int,
    *,
    overwrite: bool = False,
    restart: bool = False,
) -> Iterator[PartialFolder]:
    """Yield the partial folder of a target, with the journal of what is finished in it.

    It takes the target's name when the block ends without an error. On an error what is finished is
    kept, and the message says so; if no layer is finished, nothing is kept.

    Args:
        target: the folder to make.
        fingerprint: plain data by topic; a journal with another one is not continued.
        n_layers: layers in all, for messages.
        overwrite: whether a model folder that is there may be replaced.
        restart: whether to begin anew, whatever is there.

    Raises:
        CheckpointError: the target is there, is written by another run right now, or was begun with
            other settings; its journal is damaged, or not this user's; the disk refuses.
    """
    fingerprint = json.loads(json.dumps(fingerprint))  # as it will be read back
    require_target(target, overwrite=overwrite)
    with _open_partial(target, restart=restart) as partial:
        journal = partial.journal
        partial.require_same(fingerprint, n_layers)
        published = False
        try:
            require_free(partial.target, overwrite=overwrite)
            partial.resume() if journal.layers else partial.begin(fingerprint)
            yield partial
            partial.publish(overwrite=overwrite)
            published = True
        except (CheckpointError, LayerError, RankError) as error:
            kept = _describe_kept(partial.n_kept, n_layers) if partial.is_there() else ""
            raise type(error)(f"{error}{kept}") from error
        except OSError as error:
            kept = _describe_kept(partial.n_kept, n_layers) if partial.is_there() else ""
            raise CheckpointError(f"{refusal(target, error)}{kept}") from error
        finally:
            if published or not partial.n_kept:
                partial.remove()


@contextmanager
def atomic_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that takes the name of `folder` when the block ends without an error.

    Raises:
        CheckpointError: the target is there, is written by another run right now, or an interrupted
            run waits to go on there; the disk refuses.
    """
    remove_leftovers(folder)
    require_free(folder, overwrite=overwrite)
    with explain_refusals(folder), open_alone(folder) as partial:
        yield partial.folder
        partial.publish(overwrite=overwrite)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file to make, which takes the name `path` when the block ends well.

    A file that is there is replaced. An error of the block is passed on as it is.

    Raises:
        CheckpointError: another run makes the same file, or the disk refuses.
    """
    path = resolve_target(path)
    require_writable(path)
    with open_alone(path) as partial:
        yield partial.folder / path.name
        with explain_refusals(path):
            disk.sync_tree(partial.folder)
            os.replace(partial.folder / path.name, path)
            disk.sync_folder(path.parent)


@contextmanager
def explain_refusals(target: Path) -> Iterator[None]:
    """Turn what the disk refuses into one message that says why.

    Raises:
        CheckpointError: in place of an `OSError`.
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{refusal(target, error)} Nothing was left there.") from error


def require_target(target: Path, *, overwrite: bool) -> None:
    """Raise `CheckpointError` if a run cannot begin at this target.

    A run that was begun there is looked at later.
    """
    if not os.path.lexists(partial_path(target)):
        require_free(target, overwrite=overwrite)


def require_no_run(target: Path) -> None:
    """Raise `CheckpointError` if another run for a target waits to go on, or is at work now."""
    if os.path.lexists(partial_path(target)):
        with _open_partial(target, restart=False) as partial:
            partial.require_no_layers()


def remove_leftovers(target: Path) -> None:
    """Remove what a run has left that was killed after its target was whole."""
    if os.path.lexists(partial_path(target)):
        # What another run has finished stays, and what is not ours.
        with suppress(CheckpointError), _open_partial(target, restart=False) as partial:
            if not partial.journal.layers:
                partial.remove()


def partial_path(target: Path) -> Path:
    """Return the folder beside a target in which it is prepared."""
    target = resolve_target(target)
    name = os.fsencode(target.name)
    short = target.name
    if len(name) > _MOST_NAME_BYTES:
        short = hashlib.sha256(name).hexdigest()
    return target.with_name(f".{short}.partial")


def work_folders(target: Path) -> tuple[Path, Path]:
    """Return where the files of a target grow, and where the workers of its run have journals."""
    path = partial_path(target)
    return path / _FILES, path / _JOURNALS


@contextmanager
def explain_interrupt(target: Path, n_layers: int) -> Iterator[None]:
    """Let an interrupt say what of a target's layers is kept, before or after work on it begins."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Interrupted.{_describe_kept(_count_kept(target), n_layers) or ' Nothing was left.'}"
        ) from None


def _count_kept(target: Path) -> int:
    """Return how many layers a run has left for a target; 0 if that cannot be told."""
    path = partial_path(target) / _JOURNAL
    try:
        descriptor = disk.open_file(path)
    except OSError:
        return 0
    try:
        return len(Journal(descriptor, path).layers.keys() | list_noted(path.parent / _JOURNALS))
    except CheckpointError:
        return 0
    finally:
        os.close(descriptor)


@contextmanager
def open_alone(target: Path) -> Iterator[PartialFolder]:
    """Yield a partial folder that is empty, and is removed whatever happens."""
    with _open_partial(target, restart=False) as partial:
        partial.require_no_layers()
        try:
            with explain_refusals(target):
                partial.begin({})
            yield partial
        finally:
            partial.remove()


@contextmanager
def _open_partial(target: Path, *, restart: bool) -> Iterator[PartialFolder]:
    """Make or take over the partial folder of a target, for this process alone."""
    path, target = partial_path(target), resolve_target(target)
    try:
        disk.make_folders(target.parent)
        make_private(path, (_JOURNAL, _JOURNALS, _FILES, _REPLACED))
        descriptor = disk.open_file(path / _JOURNAL, create=True, mode=0o600)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(refusal(target, error)) from error
    try:
        require_alone(descriptor, path / _JOURNAL, target)
        yield PartialFolder(target, path, descriptor, restart=restart)
    finally:
        os.close(descriptor)


def _describe_kept(n_kept: int, n_layers: int) -> str:
    if not n_kept:
        return ""
    return f" {n_kept} of {n_layers} layers are kept; run the same command to go on."


def _digest(folder: Path) -> str:
    """Return what a folder looks like: names and sizes of its files, and what its JSON files say.

    These hold the hashes of the rest.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes() if path.suffix == ".json" else b""
        place = f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0"
        digest.update(place.encode("utf-8", "surrogateescape") + hashlib.sha256(content).digest())
    return digest.hexdigest()
