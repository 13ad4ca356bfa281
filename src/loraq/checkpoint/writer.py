"""Write folders that are whole or not there: shards, an index, and one rename at the end."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from loraq.errors import CheckpointError

#: Bytes of one shard unless the caller says otherwise.
DEFAULT_SHARD_BYTES = 2_000_000_000


#: A folder that is replaced whole must hold one of these.
_MODEL_MARKS = ("loraq.json", "config.json", "model_index.json")


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Raise `CheckpointError` unless a folder of this name can be created."""
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"Cannot write '{folder}': a file of this name exists. Choose another folder.")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"Cannot write '{folder}': the folder is not empty. Choose another one, or allow overwriting."
            )
        if not any((folder / mark).is_file() for mark in _MODEL_MARKS):
            raise CheckpointError(
                f"Will not replace '{folder}': it holds none of {', '.join(_MODEL_MARKS)}, so it is no model's folder. "
                "Choose another one, or delete it yourself."
            )
    parent = next(parent for parent in (*folder.parents, folder) if parent.exists())
    if not parent.is_dir():
        raise CheckpointError(f"Cannot write '{folder}': '{parent}' is a file. Choose another folder.")
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"Cannot write '{folder}': '{parent}' is read-only. Choose another folder.")


@contextmanager
def atomic_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its name when the block ends without an error.

    Raises:
        CheckpointError: the target exists, or the disk refuses.
    """
    folder = folder.resolve()  # a link stays, and what it points to is replaced
    require_free(folder, overwrite=overwrite)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            replaced = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
            folder.rename(replaced)
            try:
                partial.rename(folder)
            except BaseException:
                replaced.rename(folder)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            partial.rename(folder)
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        reason = "the disk is full" if _disk_is_full(error) else str(error)
        raise CheckpointError(
            f"Cannot write '{folder}': {reason}. Nothing was left there. Free space, and try again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_shards(
    tensors: Mapping[str, Tensor], folder: Path, stem: str, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> list[str]:
    """Write tensors as `<stem>.safetensors`, or as numbered shards with an index; return the file names.

    The layout is that of the Hugging Face libraries. A tensor larger than a shard gets one of its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = _alone(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        write_json(folder / f"{stem}.safetensors.index.json", index)
    for file, shard in zip(names, shards, strict=True):
        (folder / file).touch()
        mode = (folder / file).stat().st_mode
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(mode)  # safetensors makes files that only the owner may read
    return names if len(shards) == 1 else [*names, f"{stem}.safetensors.index.json"]


def _alone(tensor: Tensor) -> Tensor:
    """Return a row-major tensor on the CPU that has its storage for itself, as safetensors demands."""
    if tensor.is_meta:
        raise CheckpointError("Cannot write tensors of the meta device: they hold no numbers. Load the model first.")
    tensor = tensor.detach().contiguous().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _disk_is_full(error: Exception) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in the order of the content, with two spaces and a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
