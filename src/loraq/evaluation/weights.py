"""The networks of metrics that have weights: where these are looked for, and where they come from.

Nothing is downloaded: a run says before its first image what is missing, and where to get it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraq.errors import LoraqError
from loraq.integrations.hub import cached_folder
from loraq.safetensors.reader import ShardReader


@dataclass(frozen=True)
class WeightFile:
    """One file of weights, which is published as a pickle: its tensors are read as safetensors."""

    user: str
    name: str
    url: str

    def find(self, folder: Path | None) -> Path:
        """Return where it is: in a folder, or in the cache of torch's hub.

        Raises:
            LoraqError: it is in neither.
        """
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        for place in (folder, cache):
            if place is not None and (path := place / self.name).is_file():
                return path
        raise LoraqError(
            f"{self.user} needs '{self.name}', which is neither in {_given(folder)} nor in "
            f"'{cache}'. Pickles are not read: load the published file once with "
            "`torch.load(…, 'cpu', weights_only=True)`, and save its tensors under that name with "
            f"`safetensors.torch.save_file`. It is at {self.url}"
        )


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
    "alexnet-owt-7be5be79.safetensors",
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)
INCEPTION = WeightFile(
    "FID",
    "weights-inception-2015-12-05-6726825d.safetensors",
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


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: it cannot be read.
    """
    reader = ShardReader(path)
    return {name: reader.read(name) for name in reader.names}


def _given(place: Path | None) -> str:
    return f"'{place}'" if place else "a folder of yours (`--weights`)"
