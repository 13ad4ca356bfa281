"""What may be written or replaced: a name that is free, or a model's folder and nothing else."""

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from loraq.errors import CheckpointError, list_some
from loraq.json_files import read_json
from loraq.regular_file import open_regular

#: What `loraq export` writes beside a model: which files are its own, among other things.
EXPORT_REPORT = "loraq_export.json"
_VARIANT = r"(\.(fp16|fp32|bf16|fp8|ema|non_ema))?"
#: What diffusers, transformers and loraq call the files of a model or of a pipeline's component.
_KNOWN_FILES = re.compile(
    r"(config|model_index|loraq|loraq_export|generation_config)\.json"
    rf"|(diffusion_pytorch_)?model{_VARIANT}(-\d{{5}}-of-\d{{5}})?{_VARIANT}\.safetensors"
    rf"|(diffusion_pytorch_)?model{_VARIANT}\.safetensors\.index{_VARIANT}\.json"
    r"|(scheduler|preprocessor|processor|video_preprocessor|feature_extractor)_config\.json"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)"
    r"|merges\.txt|(spiece|tokenizer|sentencepiece\.bpe)\.model|chat_template\.(jinja|json)"
)


def resolve_target(target: Path) -> Path:
    """Return the folder or file that is to be made: a link stays, what it points to is replaced.

    Raises:
        CheckpointError: no file can have this name, or it is a link that a stranger may have put
            there.
    """
    try:
        resolved = target.resolve()
        resolved.exists()
        link = os.lstat(target) if target.is_symlink() else None
        parent = os.stat(target.parent) if link else None
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a NUL, links in a circle
        raise CheckpointError(f"Cannot write '{target}': {error}. Choose another name.") from error
    # As Linux does in folders such as /tmp: others can make links there to what is not theirs.
    if link and parent and os.name == "posix" and parent.st_mode & 0o022:
        if link.st_uid not in (os.geteuid(), parent.st_uid):
            raise CheckpointError(
                f"'{target}' is a link of another user, in a folder that others can write to. "
                "Delete it, or choose another target."
            )
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
    _require_renamable(folder)
    require_writable(folder)


def _require_renamable(folder: Path) -> None:
    """Raise `CheckpointError` for a folder whose name the system gives to no other."""
    if not folder.exists():
        return
    if os.path.ismount(folder):
        raise CheckpointError(
            f"Cannot write '{folder}': it is a mount point, which cannot be replaced. Choose a "
            "folder inside of it."
        )
    parent = folder.parent.stat()
    owners = (parent.st_uid, folder.stat().st_uid)
    is_sticky = os.name == "posix" and parent.st_mode & stat.S_ISVTX
    if is_sticky and os.geteuid() not in (0, *owners):
        raise CheckpointError(
            f"Cannot write '{folder}': it is another user's. Choose another folder."
        )


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


def require_space(target: Path, needed: int, *, linked: Iterable[Path] = ()) -> None:
    """Raise `CheckpointError` if the disk of a target cannot hold what will be written.

    Args:
        target: the folder to make.
        needed: bytes.
        linked: files that get a second name there instead of a copy.
    """
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"'{parent}' has {free / 1e9:.3g} GB free and about {needed / 1e9:.3g} GB are "
            "needed. Free space, or choose another target."
        )
    if any(path.resolve().stat().st_dev != parent.stat().st_dev for path in linked):
        raise CheckpointError(
            f"'{parent}' is on another disk than the source, and hard links cannot cross. "
            "Leave `--link` out to copy."
        )


def require_replaceable(folder: Path) -> None:
    """Raise `CheckpointError` unless all that a folder holds was written by loraq or diffusers.

    That is a model with its configuration, or a pipeline of such. Other files must be listed with
    their size in a `loraq.json` there: those that went along with a pipeline.
    """
    pipeline = read_object(folder / "model_index.json")
    if not _is_model(folder) and "_class_name" not in pipeline:
        raise CheckpointError(
            f"Will not replace '{folder}': it is not a model's folder (it has no 'config.json' or "
            "'model_index.json' of diffusers, and no manifest). Choose another one, or delete it "
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
    manifest = read_object(folder / "loraq.json")
    export = read_object(folder / EXPORT_REPORT)
    return (
        is_model_config(folder / "config.json")
        or "format_version" in manifest
        or {"loraq", "target", "files"} <= export.keys()
    )


def is_model_config(path: Path) -> bool:
    """Return whether a `config.json` is that of a model of diffusers or transformers."""
    return not {"_class_name", "architectures"}.isdisjoint(read_object(path))


def is_known(name: str) -> bool:
    """Return whether loraq or diffusers gives a file of a model or pipeline this name."""
    return _KNOWN_FILES.fullmatch(name) is not None


def _is_known(place: Path, components: list[str]) -> bool:
    folders = place.parts[:-1]
    in_place = not folders or (len(folders) == 1 and folders[0] in components)
    return in_place and is_known(place.name)


def _find_files(folder: Path) -> Iterator[Path]:
    """Yield the path below a folder of all that is not a folder; a link is not followed."""
    for parent, inner, files in os.walk(folder, onerror=_refuse_to_replace):
        if not os.access(parent, os.W_OK | os.X_OK):
            _refuse_to_replace(OSError(errno.EACCES, os.strerror(errno.EACCES), parent))
        paths = [Path(parent) / name for name in (*inner, *files)]
        yield from (
            path.relative_to(folder) for path in paths if path.is_symlink() or not path.is_dir()
        )


def _refuse_to_replace(error: OSError) -> NoReturn:
    raise CheckpointError(
        f"Will not replace '{error.filename}': it cannot be looked into or cleared "
        f"({error.strerror}). Change its permissions, or choose another folder."
    ) from error


def _list_recorded(folder: Path, components: list[str]) -> dict[str, int]:
    """Return the sizes of files that a report, or the manifests of components, list, by path."""
    sizes = {}
    tables = [
        read_object(folder / component / "loraq.json").get("components") for component in components
    ]
    for recorded in (read_object(folder / EXPORT_REPORT).get("files"), *tables):
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


def refusal(target: Path, error: OSError) -> str:
    """Say that a target cannot be written, why, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)
    if full:
        return f"Cannot write '{target}': the disk is full. Free space, and try again."
    return f"Cannot write '{target}': {error}. Mend that and try again, or choose another target."


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        OSError: it cannot be read, or is not a file.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
