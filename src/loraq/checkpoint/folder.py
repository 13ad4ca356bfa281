"""What may be written or replaced: a name that is free, or a model's folder and nothing else."""

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraq.errors import CheckpointError, list_some
from loraq.json_files import read_json

#: What diffusers, transformers and loraq call the files of a model or of a pipeline's component.
_KNOWN_FILES = re.compile(
    r"(config|model_index|loraq)\.json|generation_config\.json"
    r"|(diffusion_pytorch_)?model([.-][\w.-]+)?\.safetensors(\.index(\.[\w-]+)?\.json)?"
    r"|(scheduler|preprocessor|processor|video_preprocessor|feature_extractor)_config\.json"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)"
    r"|merges\.txt|(spiece|tokenizer|sentencepiece\.bpe)\.model|chat_template\.(jinja|json)"
)


def resolve_target(target: Path) -> Path:
    """Return the folder or file that is to be made: a link stays, what it points to is replaced.

    Raises:
        CheckpointError: no file can have this name.
    """
    try:
        resolved = target.resolve()
        resolved.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a NUL, links in a circle
        raise CheckpointError(f"Cannot write '{target}': {error}. Choose another name.") from error
    return resolved


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Raise `CheckpointError` unless a folder of this name can be created, or replaced whole."""
    folder = resolve_target(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(
            f"Cannot write '{folder}': a file of this name exists. Choose another folder."
        )
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"Cannot write '{folder}': the folder is not empty. Choose another one, or allow "
                "overwriting (`--overwrite`)."
            )
        require_replaceable(folder)
    require_writable(folder)


def require_writable(path: Path) -> None:
    """Raise `CheckpointError` if a file or folder cannot be made: something is in its way."""
    parent = next(parent for parent in (*path.absolute().parents, path) if parent.exists())
    if not parent.is_dir():
        raise CheckpointError(
            f"Cannot write '{path}': '{parent}' is a file. Choose another folder."
        )
    if not os.access(parent, os.W_OK):
        raise CheckpointError(
            f"Cannot write '{path}': '{parent}' is read-only. Choose another folder."
        )


def require_replaceable(folder: Path) -> None:
    """Raise `CheckpointError` unless all that a folder holds was written by loraq or diffusers.

    That is a model with its configuration, or a pipeline of such. Other files must be listed with
    their size in a `loraq.json` there: those that went along with a pipeline.
    """
    pipeline = read_object(folder / "model_index.json")
    if not _is_model(folder) and "_class_name" not in pipeline:
        raise CheckpointError(
            f"Will not replace '{folder}': it is not a model's folder (it has no weights, and no "
            "'config.json' or 'model_index.json' of diffusers). Choose another one, or delete it "
            "yourself."
        )
    components = [name for name, value in pipeline.items() if isinstance(value, list)]
    recorded = _list_recorded(folder, components)
    foreign = sorted(
        place.as_posix()
        for place in _find_files(folder)
        if not _is_known(place, components)
        and recorded.get(place.as_posix()) != (folder / place).lstat().st_size
    )
    if foreign:
        raise CheckpointError(
            f"Will not replace '{folder}': it also holds {list_some(foreign, most=4)}, which is "
            "not part of a model. Choose another folder, or move it elsewhere."
        )


def is_replaceable(folder: Path) -> bool:
    """Return whether all that a folder holds was written by loraq or diffusers."""
    try:
        require_replaceable(folder)
    except CheckpointError:
        return False
    return True


def _is_model(folder: Path) -> bool:
    config = read_object(folder / "config.json")
    return (
        bool({"_class_name", "model_type", "architectures"} & config.keys())
        or bool(read_object(folder / "loraq.json"))
        or any(_KNOWN_FILES.fullmatch(path.name) for path in folder.glob("*.safetensors"))
    )


def _is_known(place: Path, components: list[str]) -> bool:
    folders = place.parts[:-1]
    in_place = not folders or (len(folders) == 1 and folders[0] in components)
    return in_place and _KNOWN_FILES.fullmatch(place.name) is not None


def _find_files(folder: Path) -> Iterator[Path]:
    """Yield the path below a folder of all that is not a folder; a link is not followed."""
    for parent, inner, files in os.walk(folder):
        paths = [Path(parent) / name for name in (*inner, *files)]
        yield from (
            path.relative_to(folder) for path in paths if path.is_symlink() or not path.is_dir()
        )


def _list_recorded(folder: Path, components: list[str]) -> dict[str, int]:
    """Return the sizes of a pipeline's other files that the manifests in it list, by their path."""
    sizes = {}
    for component in components:
        recorded = read_object(folder / component / "loraq.json").get("components")
        for name, entry in recorded.items() if isinstance(recorded, dict) else ():
            if isinstance(entry, dict) and isinstance(entry.get("bytes"), int):
                sizes[str(name)] = entry["bytes"]
    return sizes


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if it is anything else."""
    try:
        return read_json(path)
    except CheckpointError:
        return {}


def reason_of(error: OSError) -> str:
    """Say why the disk refused."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)
    return "the disk is full" if full else str(error)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
