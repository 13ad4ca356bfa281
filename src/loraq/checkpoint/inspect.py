"""Look into a checkpoint without building its model, one layer at a time.

What each layer is, how two folders differ, and how much memory a folder takes once it runs.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from loraq.checkpoint.components import StoredFile, check_components
from loraq.checkpoint.contents import require_contents
from loraq.checkpoint.manifest import FILE_NAME, Manifest, StoredLayer
from loraq.checkpoint.model_index import is_pipeline, read_components
from loraq.errors import CheckpointError, FormatError, KernelError, list_some
from loraq.kernels import BACKENDS, DEFAULT_BACKEND, prepare
from loraq.linalg import relative_error
from loraq.packed import PackedStack, PackedWeight
from loraq.safetensors.header import FLOATS
from loraq.safetensors.reader import ShardReader


@dataclass(frozen=True)
class LayerDifference:
    """How far a layer of one folder is from the same layer of another."""

    name: str
    #: (out, in), or (experts, out, in).
    shape: tuple[int, ...]
    #: ‖A − B‖_F / ‖A‖_F.
    relative_error: float


class DenseWeights:
    """The linear weights of a folder, quantized or not, as dense matrices.

    They are read one at a time.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a transformer folder.

        Raises:
            CheckpointError: it cannot be read, or its tensors contradict its manifest.
        """
        self.folder = Path(folder)
        self.manifest = (
            Manifest.read(self.folder, verify=False)
            if (self.folder / FILE_NAME).is_file()
            else None
        )
        self.reader = ShardReader(self.folder)
        if self.manifest is not None:
            require_contents(self.manifest, self.reader)

    @property
    def quantized(self) -> list[str]:
        """Names of the quantized layers."""
        return list(self.layers)

    @property
    def layers(self) -> dict[str, StoredLayer]:
        """The quantized layers."""
        return self.manifest.layers if self.manifest else {}

    def read(self, layer: str, like: StoredLayer | None = None) -> Tensor:
        """Return the effective weight of a layer, (out, in) in fp32; of a stack (experts, out, in).

        Args:
            layer: its name.
            like: the layer where it is quantized, which knows whether it is a stack and how that
                lies; without it, it is none.

        Raises:
            CheckpointError: the folder has no such layer, or its weight is no matrix of finite
                floats.
        """
        if self.manifest is not None and layer in self.manifest.layers:
            return _read_packed(self.reader, self.manifest, layer).reconstruct()
        is_stack = like is not None and like.is_stack
        name = layer if is_stack else f"{layer}.weight"
        weight, dtype = self.reader.read(name), self.reader.dtype(name)
        if weight.dim() < 2 or not weight.numel() or dtype not in FLOATS:
            raise CheckpointError(
                f"'{self.folder}': '{name}' is {dtype} of shape {tuple(weight.shape)}. A matrix of "
                "floats of 16 bits or more is required to compare it."
            )
        if not weight.isfinite().all():
            raise CheckpointError(
                f"'{self.folder}': '{name}' has values that are not finite numbers. Repair the "
                "file, or download it again."
            )
        if like is not None and is_stack:
            return weight.float().mT if like.transposed else weight.float()
        return weight.float().flatten(1)  # a 1×1 convolution's is (out, in, 1, 1)


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
        stack = next(made[name] for made in (first.layers, second.layers) if name in made)
        x, y = first.read(name, stack), second.read(name, stack)
        if x.shape != y.shape:
            raise CheckpointError(
                f"Layer '{name}' has shape {tuple(x.shape)} in '{a}' and {tuple(y.shape)} in '{b}'."
            )
        error = relative_error(x.flatten(0, -2), y.flatten(0, -2))
        differences.append(LayerDifference(name, tuple(x.shape), error))
    return differences


@dataclass(frozen=True)
class Inspected:
    """What was found in a folder, all of it as it was written."""

    #: By component of a pipeline; of a model's folder the name is "".
    manifests: dict[str, Manifest]
    #: The other files of the pipeline, by their path in it.
    others: dict[str, StoredFile]
    #: Whether these were checked too; they are not if the folder stands alone.
    is_checked: bool
    #: Of each model its parameters, and the bytes of all its tensors.
    sizes: dict[str, tuple[int, int]]


def inspect_folder(path: Path) -> Inspected:
    """Check a quantized model's folder, or a pipeline's with all that is in it.

    A model's folder in a pipeline lets the rest of the pipeline be checked, too.

    Raises:
        CheckpointError: nothing there is quantized, or files are missing or were changed; they are
            listed.
    """
    if is_pipeline(path):
        found = find_packed(path)
        manifests = {name: read_checked(folder) for name, folder in found.items()}
        sizes = {name: count_stored(found[name], manifests[name]) for name in found}
        return Inspected(manifests, _check_others(path, manifests), True, sizes)
    manifest, root = read_checked(path), Path(os.path.abspath(path)).parent
    size = {"": count_stored(path, manifest)}
    if not manifest.components or not is_pipeline(root):
        return Inspected({"": manifest}, manifest.components, False, size)
    manifests = {
        name: manifest if folder.samefile(path) else read_checked(folder)
        for name, folder in find_packed(root).items()
    }
    return Inspected({"": manifest}, _check_others(root, manifests), True, size)


def find_packed(root: Path) -> dict[str, Path]:
    """Return the folders of a pipeline's quantized models, by component.

    Raises:
        CheckpointError: there are none.
    """
    components = read_components(root)
    found = {
        name: part.folder
        for name, part in components.items()
        if part.is_packed or (part.folder / FILE_NAME).is_file()
    }
    if found:
        return found
    raise CheckpointError(
        f"'{root}' is not a loraq checkpoint: of its components ({list_some(components)}) none is "
        "quantized. `loraq quantize SRC DST` makes one."
    )


def _check_others(root: Path, manifests: Mapping[str, Manifest]) -> dict[str, StoredFile]:
    """Check the files of a pipeline that are not a quantized model's, which has its own manifest.

    Returns:
        What they hold.
    """
    others: dict[str, StoredFile] = {}
    for manifest in manifests.values():
        listed = {
            name: stored
            for name, stored in manifest.components.items()
            if name.partition("/")[0] not in manifests and others.get(name) != stored
        }
        check_components(root, listed)
        others |= listed
    return others


@dataclass(frozen=True)
class Memory:
    """Bytes of a loaded model on one back end, or before it was quantized."""

    #: Name of the back end, or `FLOAT`.
    backend: str
    #: Packed weights of the quantized layers.
    packed: int
    #: What is kept beside them; of the float model, their weights in 16 bits.
    kept: int
    #: Everything that is not quantized.
    others: int
    #: Layers that the back end refuses; they are counted on the automatic choice.
    refused: int

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Packed, kept, others, and their sum."""
        return self.packed, self.kept, self.others, self.packed + self.kept + self.others

    @property
    def total(self) -> int:
        """All bytes."""
        return self.parts[-1]


#: What stands for the model before it was quantized, in a list of `Memory`.
FLOAT = "float"


def scratch_nbytes(shapes: Iterable[tuple[int, ...]]) -> int:
    """Return the most bytes beside the packed ones, for layers of shapes (…, out, in) that run.

    One layer is decoded at a time: two bytes a value, and less than half as much on the way to them
    (`loraq.kernels.low_memory`).
    """
    return 3 * max((prod(shape[-2:]) for shape in shapes), default=0)


def measure_memory(folder: Path, dtype: torch.dtype = torch.bfloat16) -> list[Memory]:
    """Return the memory of a quantized folder on every back end, for activations of `dtype`.

    First stands the float model, its linear layers in 16 bits, and then the automatic choice. One
    layer is in memory at a time. Memory of activations is not counted.

    Raises:
        CheckpointError: as `read_checked` says.
    """
    manifest, reader = _open_checked(folder)
    names = (DEFAULT_BACKEND, *BACKENDS)
    nbytes, kept, refused = 0, dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    counted: set[str] = set()
    for layer in manifest.layers:
        packed = _read_packed(reader, manifest, layer)
        counted |= set(_find_stored(manifest, layer).values())
        nbytes += packed.nbytes
        for name in names:
            refuses = False
            for matrix in packed.matrices:
                try:
                    prepared = prepare(name, matrix, dtype)
                except KernelError:
                    refuses = True
                    prepared = prepare(DEFAULT_BACKEND, matrix, dtype)
                kept[name] += prepared.backend.kept_nbytes(prepared.operands, matrix)
            refused[name] += refuses
    others = sum(
        spec.nbytes
        for header in reader.files.values()
        for name, spec in header.specs.items()
        if name not in counted
    )
    n_weights = sum(prod(layer.shape) for layer in manifest.layers.values())
    return [
        Memory(FLOAT, 0, 2 * n_weights, others, 0),
        *(Memory(name, nbytes, kept[name], others, refused[name]) for name in names),
    ]


def count_stored(folder: Path, manifest: Manifest) -> tuple[int, int]:
    """Return the numbers that a quantized folder stores, and the bytes of all its tensors.

    A packed weight counts with the numbers that it stands for.

    Args:
        folder: of the transformer.
        manifest: what is in it.

    Raises:
        CheckpointError: its files cannot be read.
    """
    reader = ShardReader(folder)
    specs = {name: spec for file in reader.files.values() for name, spec in file.specs.items()}
    packed: set[str] = set()
    numbers = 0
    for name, layer in manifest.layers.items():
        parts = set(_find_stored(manifest, name).values())
        numbers += 0 if parts <= packed else math.prod(layer.shape)  # one in two places counts once
        packed |= parts
    numbers += sum(math.prod(spec.shape) for name, spec in specs.items() if name not in packed)
    return numbers, sum(spec.nbytes for spec in specs.values())


def read_checked(folder: Path) -> Manifest:
    """Return the manifest of a folder whose files are as they were written, and fit together.

    Raises:
        CheckpointError: the folder is not a quantized folder, a file is missing or was changed, or
            the tensors contradict the manifest.
    """
    return _open_checked(folder)[0]


def _open_checked(folder: Path) -> tuple[Manifest, ShardReader]:
    manifest, reader = Manifest.read(folder), ShardReader(folder)
    require_contents(manifest, reader)
    return manifest, reader


def _read_packed(reader: ShardReader, manifest: Manifest, layer: str) -> PackedWeight | PackedStack:
    stored = manifest.layers[layer]
    names = _find_stored(manifest, layer)
    tensors = {part: reader.read(name) for part, name in names.items()}
    try:
        if stored.is_stack:
            n_experts, n_out, n_in = stored.shape
            return PackedStack.from_tensors(tensors, stored.scheme, (n_experts, n_out, n_in))
        n_out, n_in = stored.shape
        return PackedWeight.from_tensors(tensors, stored.scheme, (n_out, n_in))
    except FormatError as error:
        raise CheckpointError(f"'{reader.folder}': layer '{layer}': {error}") from error


def _find_stored(manifest: Manifest, layer: str) -> dict[str, str]:
    """Return the name in the files of each part of a layer; a part may be another layer's too."""
    stored = manifest.layers[layer]
    names = {part: f"{layer}.{part}" for part in stored.scheme.storage(stored.shape)}
    return {part: manifest.tied.get(name, name) for part, name in names.items()}
