"""A model saved into a folder that others use too, such as a clone of a repository.

A folder that holds nothing but a model is exchanged as a whole (`partial`). In any other one the
model's files take their places one by one, and nothing else there is touched, moved or linked: a
`.git` may be written to at the same moment. All files are prepared and synced before the first one
moves. The old manifest goes first and the new one comes last, so that whoever loads after a kill
finds the old model, the new one, or is told that there is none.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraq import disk
from loraq.checkpoint.folder import (
    is_known,
    is_model_config,
    is_replaceable,
    read_object,
    refusal,
    resolve_target,
)
from loraq.checkpoint.partial import atomic_folder, explain_refusals, open_alone
from loraq.errors import CheckpointError, list_some
from loraq.regular_file import is_plain_name
from loraq.safetensors.selection import is_model_weights

_CONFIG, _MANIFEST = "config.json", "loraq.json"


@contextmanager
def replaced_model(folder: Path) -> Iterator[Path]:
    """Yield an empty folder whose files replace the model in `folder` when the block ends well.

    Raises:
        CheckpointError: what stands in the way is not a model's, or is written by another run
            right now; the disk refuses.
    """
    place = resolve_target(folder)
    if not place.is_dir() or not any(place.iterdir()) or is_replaceable(place):
        with atomic_folder(folder, overwrite=True) as partial:
            yield partial
        return
    with explain_refusals(folder), open_alone(folder) as private:
        _require_ours(place)
        yield private.folder
        disk.sync_tree(private.folder)
        _require_movable(private.folder, place)
        try:
            _move(private.folder, place)
        except OSError as error:
            raise CheckpointError(
                f"{refusal(folder, error)} Some of the model's files there are new and some are "
                "old, which loaders refuse: save the model once more."
            ) from error


def _require_ours(folder: Path) -> None:
    """Raise `CheckpointError` if something else has a name that a model's file would take."""
    config = folder / _CONFIG
    if os.path.lexists(config) and not is_model_config(config):
        raise CheckpointError(
            f"Will not replace '{config}': it is not a model's. Choose another folder, or move it "
            "elsewhere."
        )


def _require_movable(source: Path, folder: Path) -> None:
    """Raise unless every file can take its place: nothing is touched before all of them can."""
    new = {path.name for path in source.iterdir()}
    ours = _find_ours(folder, new)
    other = {path.name for path in folder.iterdir() if is_model_weights(path.name)} - ours - new
    if other:
        raise CheckpointError(
            f"'{folder}' also holds {list_some(sorted(other))}, which loaders would take for this "
            "model's weights. Choose another folder, or move them elsewhere."
        )
    if folders := [name for name in new | ours if (folder / name).is_dir()]:
        raise CheckpointError(
            f"Cannot write '{folder / folders[0]}': it is a folder. Choose another folder."
        )
    if os.stat(source).st_dev != os.stat(folder).st_dev:
        raise CheckpointError(
            f"'{folder}' is on another disk than the folder above it, and holds files of others. "
            "Save into a new folder, and move the files."
        )
    if not os.access(folder, os.W_OK):
        raise CheckpointError(f"Cannot write '{folder}': it is read-only. Choose another folder.")


def _move(source: Path, folder: Path) -> None:
    new = {path.name for path in source.iterdir()}
    stale = _find_ours(folder, new) - new
    (folder / _MANIFEST).unlink(missing_ok=True)
    disk.sync_folder(folder)
    # The configuration says that the weights are packed: it comes before them.
    for name in sorted(new - {_MANIFEST}, key=lambda name: (name != _CONFIG, name)):
        os.replace(source / name, folder / name)
        disk.sync_folder(folder)
    for name in sorted(stale):
        (folder / name).unlink(missing_ok=True)
    disk.sync_folder(folder)
    os.replace(source / _MANIFEST, folder / _MANIFEST)
    disk.sync_folder(folder)


def _find_ours(folder: Path, new: set[str]) -> set[str]:
    """Return the names in a folder that belong to the model there: its weights and its manifest.

    Its weights are what its manifest lists, and what is called like the new ones by diffusers or
    by us; any other name that loaders would take is somebody else's.
    """
    listed = read_object(folder / _MANIFEST).get("files")
    names = {name for name in listed if is_plain_name(name)} if isinstance(listed, dict) else set()
    stems = {name.partition(".")[0].partition("-")[0] for name in new if is_model_weights(name)}
    for path in folder.iterdir():
        is_weights = ".safetensors" in path.name and is_known(path.name)
        if is_weights and path.name.partition(".")[0].partition("-")[0] in stems:
            names.add(path.name)
    return {name for name in names if os.path.lexists(folder / name)} - {_MANIFEST}
