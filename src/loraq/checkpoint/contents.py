"""Look into a checkpoint without building its model: what each layer is, and how two folders differ."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraq.checkpoint.manifest import FILE_NAME, Manifest
from loraq.errors import CheckpointError, FormatError
from loraq.packed import PackedWeight
from loraq.safetensors.reader import ShardReader


@dataclass(frozen=True)
class LayerDifference:
    """How far a layer of one folder is from the same layer of another."""

    name: str
    #: (out, in).
    shape: tuple[int, int]
    #: ‖A − B‖_F / ‖A‖_F.
    relative_error: float


class DenseWeights:
    """The linear weights of a folder as dense matrices, one at a time, whether the folder is quantized or not."""

    def __init__(self, folder: str | Path) -> None:
        """Open a transformer folder; raises `CheckpointError` if it cannot be read."""
        self.folder = Path(folder)
        self.manifest = (
            Manifest.read(self.folder, verify=False)
            if (self.folder / FILE_NAME).is_file()
            else None
        )
        self.reader = ShardReader(self.folder)

    @property
    def quantized(self) -> list[str]:
        """Names of the quantized layers."""
        return list(self.manifest.layers) if self.manifest else []

    def read(self, layer: str) -> Tensor:
        """Return the effective weight of a layer, (out, in) in fp32.

        Raises:
            CheckpointError: the folder has no such layer.
        """
        stored = self.manifest.layers.get(layer) if self.manifest else None
        if stored is None:
            return (
                self.reader.read(f"{layer}.weight").float().flatten(1)
            )  # a 1×1 convolution's is (out, in, 1, 1)
        names = stored.scheme.storage(stored.shape)
        tensors = {name: self.reader.read(f"{layer}.{name}") for name in names}
        try:
            packed = PackedWeight.from_tensors(tensors, stored.scheme, stored.shape)
        except FormatError as error:
            raise CheckpointError(f"'{self.folder}': layer '{layer}': {error}") from error
        return packed.reconstruct()


def compare(a: str | Path, b: str | Path) -> list[LayerDifference]:
    """Return the difference of every layer that is quantized in either of two transformer folders.

    Raises:
        CheckpointError: a folder cannot be read, both are float, or a layer is missing or has
        another shape.
    """
    first, second = DenseWeights(a), DenseWeights(b)
    names = list(dict.fromkeys([*first.quantized, *second.quantized]))
    if not names:
        raise CheckpointError(f"Neither '{a}' nor '{b}' is quantized: there is nothing to compare.")
    differences = []
    for name in names:
        x, y = first.read(name), second.read(name)
        if x.shape != y.shape:
            raise CheckpointError(
                f"Layer '{name}' has shape {tuple(x.shape)} in '{a}' and {tuple(y.shape)} in '{b}'."
            )
        norm = torch.linalg.vector_norm(x).item()
        error = torch.linalg.vector_norm(x - y).item() / (norm or 1.0)
        differences.append(LayerDifference(name, (x.shape[0], x.shape[1]), error))
    return differences
