"""The tensors of a checkpoint under other names: those of another class, or of a part of one."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from loraq.checkpoint.manifest import Manifest
from loraq.safetensors.reader import TensorReader


@dataclass(frozen=True)
class RenamedReader:
    """The tensors of a reader under other names."""

    reader: TensorReader
    #: In the reader, by their new names.
    stored: dict[str, str]

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self.reader.shape(self.stored[name])

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor in safetensors' notation."""
        return self.reader.dtype(self.stored[name])

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU; raises `CheckpointError` if it cannot be read."""
        return self.reader.read(self.stored[name])

    def read_slice(self, name: str, index: int) -> Tensor:
        """Return one entry of a tensor's first axis; raises `CheckpointError` as `read`."""
        return self.reader.read_slice(self.stored[name], index)


def rename_tensors(
    manifest: Manifest, reader: TensorReader, rename: Callable[[str], str | None]
) -> tuple[Manifest, RenamedReader]:
    """Return a folder as a model sees it that is a part of the one in it, or has it as a part.

    Args:
        manifest: of the folder.
        reader: its tensors.
        rename: what a tensor is called in the model, `None` for one that it does not have.
    """
    names = {new: old for old in reader.names if (new := rename(old)) is not None}
    layers = {}
    for old, stored in manifest.layers.items():
        if (new := rename(f"{old}.weight_packed")) is not None:
            layers[new.removesuffix(".weight_packed")] = stored
    tied = {}
    for second, first in manifest.tied.items():
        ours, theirs = rename(second), rename(first)
        if ours is not None and theirs is not None:
            tied[ours] = theirs
        elif ours is not None:  # the part has only the second name
            names[ours] = first
    return replace(manifest, layers=layers, tied=tied), RenamedReader(reader, names)
