"""How much memory a quantized folder takes once it runs, measured layer by layer with the tensors themselves."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from loraq.checkpoint.manifest import Manifest
from loraq.errors import KernelError
from loraq.kernels import BACKENDS
from loraq.nn import QuantizedLinear
from loraq.safetensors.reader import ShardReader

_WIDTH = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes of a loaded model on one back end."""

    backend: str
    #: Packed weights of the quantized layers.
    packed: int
    #: What the back end keeps beside them.
    kept: int
    #: Everything that is not quantized.
    others: int
    #: Layers that the back end refuses; they are counted on `resident`.
    refused: int

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Packed, kept, others, and their sum."""
        return self.packed, self.kept, self.others, self.packed + self.kept + self.others

    @property
    def multiple(self) -> float:
        """All bytes for each byte that is stored."""
        return self.parts[-1] / (self.packed + self.others)


def measure(folder: Path, dtype: torch.dtype = torch.bfloat16) -> list[Memory]:
    """Return the memory of a quantized folder on every back end, for activations of `dtype`.

    One layer is in memory at a time. Memory of activations is not counted.

    Raises:
        CheckpointError: the folder is no quantized folder, or a tensor cannot be read.
    """
    manifest, reader = Manifest.read(folder), ShardReader(folder)
    packed, kept, refused = 0, dict.fromkeys(BACKENDS, 0), dict.fromkeys(BACKENDS, 0)
    counted: set[str] = set()
    for name, stored in manifest.layers.items():
        n_out, n_in = stored.shape
        layer = QuantizedLinear(n_in, n_out, stored.scheme, bias=False, device="meta")
        for key in dict(layer.named_parameters()):
            source = manifest.tied.get(f"{name}.{key}", f"{name}.{key}")
            counted.add(source)
            setattr(layer, key, nn.Parameter(reader.read(source), requires_grad=False))
        packed += layer.nbytes
        for backend in BACKENDS:
            try:
                layer.backend = backend
                layer.prepare(dtype)
            except KernelError:
                refused[backend] += 1
                layer.backend = "resident"
                layer.prepare(dtype)
            kept[backend] += layer.kept_nbytes
    others = sum(_nbytes(reader, name) for name in reader.names if name not in counted)
    return [
        Memory(backend, packed, kept[backend], others, refused[backend]) for backend in BACKENDS
    ]


def _nbytes(reader: ShardReader, name: str) -> int:
    return _WIDTH.get(reader.dtype(name), 1) * torch.Size(reader.shape(name)).numel()
