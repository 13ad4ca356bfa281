"""Repositories of the hub: what is not in the local cache yet is downloaded."""

import re
from collections.abc import Sequence
from pathlib import Path

from loraq.checkpoint.manifest import FILE_NAME
from loraq.errors import CheckpointError, LoraqError

#: What is fetched of a repository besides the weights: configurations and tokenizers.
_SMALL_FILES = ["*.json", "*.txt", "*.model"]
#: Second copies of the weights that many repositories hold.
_OTHER_VARIANTS = [
    "*.fp16.safetensors",
    "*.fp16-*.safetensors",
    "*.fp16.json",
    "*.non_ema.safetensors",
]


def local_path(source: str | Path, variant: str | None = None) -> Path:
    """Return a path as it is, or the folder of a repository of the hub.

    A repository is named like "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS". Second copies of the
    weights, such as those in fp16, are fetched only if a variant is asked for.

    Raises:
        CheckpointError: the source was not found, neither locally nor on the hub.
        LoraqError: huggingface_hub is not installed.
    """
    path = Path(source)
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        return _fetch(str(source), variant)
    return path


def _fetch(repository: str, variant: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise LoraqError(
            f'huggingface_hub cannot be imported ({error}). Run: pip install "loraq[diffusers]"'
        ) from error
    try:
        folder = Path(snapshot_download(repository, allow_patterns=_SMALL_FILES))
        inside = "*/*.safetensors" if (folder / "model_index.json").is_file() else "*.safetensors"
        return Path(
            snapshot_download(
                repository,
                allow_patterns=[*_SMALL_FILES, inside],
                ignore_patterns=None if variant else _OTHER_VARIANTS,
            )
        )
    except Exception as error:  # the hub has many errors of its own
        raise CheckpointError(
            f"'{repository}' is not a file or folder here, and cannot be fetched from the hub: "
            f"{error}"
        ) from error


def fetch_manifest(folder: Path) -> None:
    """Download the manifest into a snapshot of the hub's cache.

    diffusers fetches only the files it knows.
    """
    places = folder.parts
    if (folder / FILE_NAME).is_file() or "snapshots" not in places:
        return
    from huggingface_hub import hf_hub_download

    at = len(places) - 1 - places[::-1].index("snapshots")
    kind, *repository = places[at - 1].split("--")
    if kind == "models":
        hf_hub_download(
            "/".join(repository),
            "/".join([*places[at + 2 :], FILE_NAME]),
            revision=places[at + 1],
            cache_dir=Path(*places[: at - 1]),
        )


def cached_folder(repository: str, files: Sequence[str]) -> Path | None:
    """Return where files of a repository are in the hub's cache, or `None`; nothing is fetched."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    answers = (try_to_load_from_cache(repository, name) for name in files)
    found = [Path(answer) for answer in answers if isinstance(answer, str)]
    return found[0].parent if len(found) == len(files) else None
