"""A graph that holds no numbers, and a file beside it that holds them all."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from loraq import disk
from loraq.safetensors.header import TensorSpec
from loraq.safetensors.layout import tensor_bytes

_ALIGNMENT = 4096


@dataclass(frozen=True)
class GraphFiles:
    """The graph, and where every tensor stands in the file beside it."""

    #: Names of the graph's file and of the other.
    files: list[str]
    offsets: dict[str, int]
    specs: dict[str, TensorSpec]
    data_bytes: int
    #: What stands in the first file.
    graph: bytes = b""
    #: The graph's own numbers, behind all tensors of the other file.
    constants: bytes = b""

    @classmethod
    def lay_out(cls, files: tuple[str, str], specs: Mapping[str, TensorSpec]) -> "GraphFiles":
        """Give every tensor its place, for a graph that names the places."""
        offsets, end = {}, 0
        for name, spec in specs.items():
            offsets[name] = end
            end += -(-spec.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(list(files), offsets, dict(specs), end)

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return len(self.graph) + self.data_bytes + len(self.constants)

    def allocate(self, folder: Path) -> None:
        """Write the graph, and make the other file at its final size."""
        graph, data = (folder / file for file in self.files)
        disk.write_file(graph, self.graph)
        descriptor = disk.open_file(data, create=True)
        try:
            os.ftruncate(descriptor, self.data_bytes)
            if self.constants:
                disk.write_at(descriptor, self.constants, self.data_bytes)
        finally:
            os.close(descriptor)

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors at their places."""
        descriptor = disk.open_file(folder / self.files[1])
        try:
            for name, tensor in tensors.items():
                raw = tensor_bytes(tensor)
                assert len(raw) == self.specs[name].nbytes, f"'{name}' does not fit its place"
                disk.write_at(descriptor, raw, self.offsets[name])
        finally:
            os.close(descriptor)
