"""Images on the disk: each drawn once, whole or not there, in a folder for what decides its pixels.

    DIR/NAME-HASH/settings.json   what drew here
    DIR/NAME-HASH/KEY-HASH.png    one for each prompt; the seed is a hash of the prompt's name

Where anything changes that decides pixels, so does the folder: other weights, arguments, dtype,
device or version of a library. So images of two settings are never mixed, and what was drawn once,
such as the images of the float model, serves every comparison.
"""

import gc
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraq import disk
from loraq.checkpoint.folder import file_sha256, refusal
from loraq.checkpoint.manifest import FILE_NAME
from loraq.checkpoint.model_index import is_pipeline, read_components
from loraq.checkpoint.partial import atomic_file
from loraq.devices import describe_devices
from loraq.errors import CheckpointError, LoraqError
from loraq.evaluation.prompts import Prompt
from loraq.integrations.activations import set_activations
from loraq.integrations.diffusers import _quiet_diffusers, find_class
from loraq.integrations.drawing import draw_seeded, load_pipeline, pipeline_folder
from loraq.json_files import encode_json, read_json
from loraq.layers import quantized_layers
from loraq.pipeline.progress import ImageCallback

#: What of a folder decides pixels: configurations, tokenizers, templates of prompts, weights.
_READ = (".json", ".txt", ".model", ".jinja", ".safetensors")
_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Artist:
    """A pipeline, or a pipeline with one of its models replaced."""

    #: Folder of the pipeline.
    folder: Path
    #: Folder of the model that takes a component's place, and the component; or `None` and "".
    model: Path | None = None
    component: str = ""

    @classmethod
    def of(cls, path: Path, other: "Artist") -> "Artist":
        """Return a pipeline, or that of another with a model in place of its own.

        Raises:
            CheckpointError: it is neither a pipeline nor a model of the other's.
        """
        if is_pipeline(path) or not (path / "config.json").is_file():
            return cls(pipeline_folder(path))
        kind = read_json(path / "config.json").get("_class_name")
        fits = [c.name for c in read_components(other.folder).values() if c.class_name == kind]
        named = [name for name in fits if name == path.name] or fits
        if len(named) != 1:
            raise CheckpointError(
                f"'{path}' is a model of the class {kind!r} alone, and '{other.folder}' has "
                f"{len(fits)} of that class. One is required, or a folder with its name; or give a "
                "whole pipeline."
            )
        return cls(other.folder, path, named[0])

    @property
    def name(self) -> str:
        """What people call it."""
        return (self.model or self.folder).resolve().name

    @property
    def is_quantized(self) -> bool:
        """Whether a model of it was written by this package."""
        return any(FILE_NAME in path.name for path in self._files().values())

    def _files(self) -> dict[str, Path]:
        """Return all that is read, by its place in the pipeline."""
        files = _files_of(self.folder)
        if self.model is not None:
            part = f"{self.component}/"
            files = {name: path for name, path in files.items() if not name.startswith(part)}
            files |= {part + name: path for name, path in _files_of(self.model).items()}
        return files

    def sha256(self) -> str:
        """Return a hash of all that is read of it.

        Raises:
            CheckpointError: a file cannot be read.
        """
        files = self._files()
        try:
            hashes = {name: _hash(files[name]) for name in sorted(files)}
        except OSError as error:
            raise CheckpointError(f"Cannot read a file of '{self.folder}': {error}.") from error
        return _digest(hashes)

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        """Return the pipeline on a device.

        Raises:
            CheckpointError: diffusers cannot load it.
        """
        if self.model is None:
            return load_pipeline(self.folder, dtype, device)
        with _quiet_diffusers() as diffusers:
            kind = find_class(diffusers, read_json(self.model / "config.json").get("_class_name"))
            try:
                model = kind.from_pretrained(
                    self.model, dtype=dtype, use_safetensors=True, local_files_only=True
                )
            except Exception as error:  # models raise what they like
                raise CheckpointError(
                    f"diffusers cannot load the model '{self.model}': {error}"
                ) from error
        return load_pipeline(self.folder, dtype, device, components={self.component: model})


@dataclass(frozen=True)
class Settings:
    """What decides the pixels of an image, besides the artist, the prompt and the seed."""

    dtype: torch.dtype
    device: torch.device
    #: Arguments of the pipeline's call.
    call: Mapping[str, Any]
    #: Whether activations are rounded as the recipe says where the device gains nothing from it.
    simulate: bool = False

    def describe(self, artist: Artist) -> dict[str, Any]:
        """Return all that decides pixels, as plain data."""
        # Quantized layers are run by this package too.
        libraries = ("torch", "diffusers", "transformers", *(["loraq"] * artist.is_quantized))
        return {
            "weights_sha256": artist.sha256(),
            "call": dict(self.call),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": describe_devices((self.device,)) or self.device.type,
            "simulate": self.simulate,
            "versions": {name: version(name) for name in libraries},
        }


def draw(
    artist: Artist,
    prompts: Sequence[Prompt],
    images: Path,
    settings: Settings,
    show: ImageCallback,
) -> list[Path]:
    """Draw what is not there yet, and return the image of each prompt.

    The pipeline is loaded if an image is missing, and is gone afterwards.

    Args:
        artist: what draws.
        prompts: one image each.
        images: folder of the folders of images.
        settings: how it draws.
        show: called after each image.

    Raises:
        CheckpointError: it cannot be loaded, or the disk refuses.
        LoraqError: the pipeline fails, or draws no images.
    """
    described = settings.describe(artist)
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", artist.name)[:80]
    folder = images / f"{safe}-{_digest(described)[:12]}"
    paths = [folder / prompt.file_name for prompt in prompts]
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    if not missing:
        return paths
    if not (folder / _SETTINGS).is_file():
        source = {"source": str(artist.model or artist.folder)}
        _write(folder / _SETTINGS, encode_json(source | described))
    show(0, len(missing), f"{artist.name}: loading, {len(paths) - len(missing)} images are there")
    pipeline = artist.load(settings.dtype, settings.device)
    if settings.simulate:
        _simulate(pipeline)
    for done, i in enumerate(missing, start=1):
        _write(paths[i], _encode(_draw_one(pipeline, prompts[i], settings.call)))
        show(done, len(missing), artist.name)
    del pipeline
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    return paths


def _simulate(pipeline: Any) -> None:
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and quantized_layers(part):
            set_activations(part, "stored", simulate=True)


def _draw_one(pipeline: Any, prompt: Prompt, call: Mapping[str, Any]) -> Any:
    try:
        output = draw_seeded(pipeline, prompt.seed, {"prompt": prompt.text, **call})
    except Exception as error:  # pipelines raise what they like
        raise LoraqError(
            f"{type(pipeline).__name__} fails on the prompt '{prompt.name}' ({error}). Its "
            "arguments can be set: `--set`, or `call`."
        ) from error
    drawn = getattr(output, "images", None)
    if not drawn or not hasattr(drawn[0], "convert"):
        raise LoraqError(
            f"{type(pipeline).__name__} gives a {type(output).__name__}, and no images. Only "
            "pipelines that draw images can be compared."
        )
    return drawn[0]


def _encode(image: Any) -> bytes:
    raw = io.BytesIO()
    image.convert("RGB").save(raw, "PNG")
    return raw.getvalue()


def _write(path: Path, content: bytes) -> None:
    try:
        with atomic_file(path) as partial:
            disk.write_file(partial, content)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(refusal(path, error)) from error


def _files_of(folder: Path) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.suffix in _READ and path.is_file()
    }


def _hash(path: Path) -> str:
    status = path.stat()
    return _hash_as_it_is(path, status.st_size, status.st_mtime_ns)


@cache
def _hash_as_it_is(path: Path, _size: int, _mtime_ns: int) -> str:
    """Return the hash of a file; the text encoder of many artists is read once."""
    return file_sha256(path)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
