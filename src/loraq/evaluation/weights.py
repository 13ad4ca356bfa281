"""The networks of metrics that have weights: where these are looked for, and where they come from.

Nothing is downloaded: a run says before its first image what is missing, and where to get it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraq.checkpoint.folder import file_sha256
from loraq.errors import LoraqError
from loraq.integrations.hub import cached_folder


@dataclass(frozen=True)
class WeightFile:
    """One file of weights; its name ends with the beginning of its SHA-256."""

    user: str
    name: str
    url: str

    def find(self, folder: Path | None) -> Path:
        """Return where it is: in a folder, or in the cache of torch's hub.

        Raises:
            LoraqError: it is in neither, or is not the file that its name says.
        """
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        for place in (folder, cache):
            if place is not None and (path := place / self.name).is_file():
                return self._checked(path)
        raise LoraqError(
            f"{self.user} needs '{self.name}', which is neither in {_given(folder)} nor in "
            f"'{cache}'. Download it from {self.url}"
        )

    def _checked(self, path: Path) -> Path:
        said = re.search(r"-([0-9a-f]{8})\.", self.name)
        if said and not file_sha256(path).startswith(said[1]):
            raise LoraqError(
                f"'{path}' is not what its name says: its SHA-256 does not begin with {said[1]}. "
                f"Download it again from {self.url}"
            )
        return path


@dataclass(frozen=True)
class WeightFolder:
    """A model of transformers."""

    user: str
    repository: str
    files: tuple[str, ...]

    def find(self, folder: Path | None) -> Path:
        """Return where it is: in a folder of its name in a folder, or in the hub's cache.

        Raises:
            LoraqError: it is in neither, or lacks a file.
        """
        name = self.repository.partition("/")[2]
        cached = cached_folder(self.repository, self.files)
        for place in (folder and folder / name, cached):
            if place is not None and all((place / file).is_file() for file in self.files):
                return place
        raise LoraqError(
            f"{self.user} needs {', '.join(self.files)} of '{self.repository}', which are neither "
            f"in {_given(folder and folder / name)} nor in the hub's cache. Download them from "
            f"https://huggingface.co/{self.repository}"
        )


ALEXNET = WeightFile(
    "LPIPS (`--no-lpips` leaves it out)",
    "alexnet-owt-7be5be79.pth",
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)
INCEPTION = WeightFile(
    "FID",
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
)
DINOV2 = WeightFolder(
    "The Fréchet distance of DINOv2",
    "facebook/dinov2-large",
    ("config.json", "model.safetensors"),
)
CLIP = WeightFolder(
    "CLIP score",
    "openai/clip-vit-large-patch14",
    ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"),
)


def read_weights(path: Path) -> dict[str, Any]:
    """Return the tensors of a file of PyTorch; nothing else that is in it is made.

    Raises:
        LoraqError: it cannot be read, or holds more than tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what unpickling damaged bytes raises
        raise LoraqError(f"Cannot read '{path}': {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise LoraqError(f"'{path}' holds a {type(content).__name__}, and no tensors by name.")
    return content


def _given(place: Path | None) -> str:
    return f"'{place}'" if place else "a folder of yours (`--weights`)"
