"""Some layers of a quantized model changed, in memory or in a folder, all of them or none.

Of a folder, one layer is in memory at a time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraq.appended import KEY, BranchStack
from loraq.checkpoint.apart import require_apart
from loraq.checkpoint.components import copy_components
from loraq.checkpoint.folder import require_free
from loraq.checkpoint.manifest import Manifest
from loraq.checkpoint.model import insert_empty_layers, require_quantized
from loraq.checkpoint.partial import atomic_folder, require_no_run
from loraq.checkpoint.places import empty_layer
from loraq.checkpoint.streamed import write_streamed
from loraq.errors import CheckpointError, LayerError, LoraqError, layer_failure
from loraq.formats import get_format
from loraq.integrations.diffusers import empty_model
from loraq.integrations.folders import Folder
from loraq.layers import LinearLayer, bare_model, find_places, quantized_class, swap
from loraq.nn import QuantizedLayer
from loraq.packed import PackedWeight
from loraq.pipeline.arithmetic import fixed_arithmetic
from loraq.pipeline.progress import ProgressCallback, show_layers
from loraq.safetensors.header import DTYPE_NAMES, DTYPES
from loraq.safetensors.reader import TensorReader
from loraq.scheme import Scheme
from loraq.state import answer_for_weights

#: Formats that may hold the weight of a layer that was kept in floats, byte for byte.
_EXACT = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Weights:
    """A layer as it is."""

    #: A linear layer, quantized or kept in floats; on the meta device if its numbers are in a file.
    old: Any
    scheme: Scheme
    #: (out, in).
    shape: tuple[int, int]
    #: Reads the packed weight.
    read: Callable[[], PackedWeight]
    #: Dtype of a layer that was kept in floats, as safetensors calls it.
    kept: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes."""
        if self.kept is None:
            return self.scheme.nbytes(self.shape)
        return math.prod(self.shape) * DTYPES[self.kept].itemsize


@dataclass(frozen=True)
class Place:
    """A model to change: its layers, and where their numbers are."""

    model: nn.Module
    weights: Callable[[str], Weights]


class Change(NamedTuple):
    """What becomes of one layer."""

    name: str
    weights: Weights
    scheme: Scheme
    stack: BranchStack
    #: Returns the new packed weight, and notes for whoever asked for the change.
    make: Callable[[PackedWeight], tuple[PackedWeight, tuple[Any, ...]]]

    @property
    def is_float_again(self) -> bool:
        """Whether a layer that was kept in floats becomes what it was."""
        return self.stack.kept is not None and not self.stack.loras


class Done(NamedTuple):
    """What became of one layer."""

    notes: tuple[Any, ...]
    was_kept: bool
    more_bytes: int


#: Says what becomes of the layers, and raises what is wrong with that.
Plan = Callable[[Place], Sequence[Change]]


def edit(  # noqa: PLR0913 (options are keyword-only)
    model: nn.Module | str | Path,
    plan: Plan,
    verb: str,
    *,
    inputs: Sequence[Path] = (),
    component: str | None = None,
    target: str | Path | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | bool = True,
) -> dict[str, Done]:
    """Change layers of a model in place, or of a folder into a new one.

    Args:
        model: a quantized model; or a quantized folder, with `target`.
        plan: of the changes.
        verb: for the display.
        inputs: files that are read besides.
        component: which model of a pipeline's folder; `None` takes the only quantized denoiser.
        target: new folder, where `model` is one.
        overwrite: whether a target that is not empty may be replaced.
        progress: as for `loraq.quantize_`.

    Returns:
        What became of each layer, by its name.

    Raises:
        CheckpointError: a folder cannot be used. Nothing was changed.
        LayerError: the plan cannot be made or a layer cannot be changed. Nothing was changed.
        LoraqError: it is neither a model nor a folder.
    """
    if isinstance(model, nn.Module):
        if target is not None:
            raise CheckpointError(
                f"A model in memory is changed in place. Save it to '{target}' with `loraq.save`."
            )
        return _edit_model(bare_model(model), plan, verb, progress)
    if not isinstance(model, str | Path):
        raise LoraqError(
            f"Cannot change a {type(model).__name__}. Give a quantized model, such as "
            "`pipeline.transformer`, or a folder."
        )
    if target is None:
        raise CheckpointError(
            f"'{model}' is not changed in place. Give the new folder as `target`."
        )
    require_apart(target, model, *inputs)
    require_free(Path(target), overwrite=overwrite)
    require_no_run(Path(target))
    folder = Folder.find(Path(model), component)
    return _edit_folder(folder, plan, verb, Path(target), overwrite, progress)


def _edit_model(
    model: nn.Module, plan: Plan, verb: str, progress: ProgressCallback | bool
) -> dict[str, Done]:
    require_no_adapters(model)
    require_quantized(model)
    changes = plan(Place(model, lambda name: _in_memory(model, name)))
    new, done = {}, {}
    with show_layers(progress, verb) as show:
        for change in changes:
            packed, done[change.name] = _make(change)
            new[change.name] = _build(change, packed)
            show(len(done), len(changes), change.name, _worst(done[change.name]))
    swap(find_places(model, new))
    answer_for_weights(model, [n for n, layer in new.items() if isinstance(layer, QuantizedLayer)])
    return done


def _edit_folder(
    found: Folder,
    plan: Plan,
    verb: str,
    target: Path,
    overwrite: bool,
    progress: ProgressCallback | bool,
) -> dict[str, Done]:
    home = found.path
    if not (home / "config.json").is_file():
        raise CheckpointError(
            f"'{home}' has no 'config.json' that says what the model is. Build the model, load it "
            "with `loraq.load_into`, change it in memory, and save it."
        )
    model = empty_model(home)
    manifest, reader = insert_empty_layers(model, home)
    changes = plan(Place(model, lambda name: _in_files(model, name, reader, manifest)))
    swap(find_places(model, {change.name: _build(change, None) for change in changes}))
    answer_for_weights(model, [change.name for change in changes if not change.is_float_again])
    with show_layers(progress, verb) as show, atomic_folder(target, overwrite=overwrite) as partial:
        edited = _EditedReader(reader, manifest, changes, show)
        components = copy_components(found.others, partial)
        folder = partial / found.component
        folder.mkdir(exist_ok=True)
        write_streamed(model, edited, folder, manifest.tied, components=components)
    return edited.done


def require_no_adapters(model: nn.Module) -> None:
    """Raise `LayerError` if a model carries adapters, whose layers have other names."""
    if getattr(model, "peft_config", None) or any(
        "base_layer" in module._modules for module in model.modules()
    ):
        raise LayerError(
            "The model carries adapters. Unload them first, and load them again afterwards."
        )


def _in_memory(model: nn.Module, name: str) -> Weights:
    old: Any = model.get_submodule(name)
    if "forward" in vars(old):
        raise LayerError(
            f"Layer '{name}' runs a function that was put in place of its own `forward`, which "
            "would be lost. Remove it first: a hook of accelerate with "
            "`accelerate.hooks.remove_hook_from_module(model, recurse=True)`."
        )
    tensor = old.weight_packed if isinstance(old, QuantizedLayer) else old.weight
    if tensor.is_meta or type(tensor.data) is not Tensor:
        raise LayerError(
            f"The numbers of layer '{name}' are not here: it is offloaded, sharded or not loaded. "
            "Change the folder instead, or load the model whole."
        )
    if isinstance(old, QuantizedLayer):
        shape = old.out_features, old.in_features
        return Weights(old, old.scheme, shape, lambda: old.packed)
    return _of_float(name, old, old.weight.dtype, lambda: old.weight.detach())


def _in_files(model: nn.Module, name: str, reader: TensorReader, manifest: Manifest) -> Weights:
    old: Any = model.get_submodule(name)

    def find(part: str) -> str:
        stored = f"{name}.{part}"
        return manifest.tied.get(stored, stored)

    if not isinstance(old, QuantizedLayer):
        weight = find("weight")
        return _of_float(name, old, DTYPES[reader.dtype(weight)], lambda: reader.read(weight))
    shape, scheme = (old.out_features, old.in_features), old.scheme

    def read() -> PackedWeight:
        tensors = {part: reader.read(find(part)) for part in scheme.storage(shape)}
        return PackedWeight.from_tensors(tensors, scheme, shape)

    return Weights(old, scheme, shape, read)


def _of_float(
    name: str, old: LinearLayer, dtype: torch.dtype, read: Callable[[], Tensor]
) -> Weights:
    """Return a layer that is kept in floats as one that stores its weight in 16 bits, exactly."""
    matrix = read().flatten(1)
    shape = matrix.shape[0], matrix.shape[1]
    for fmt, exact in _EXACT.items():
        if torch.equal(matrix.to(exact).to(dtype), matrix):
            scheme = Scheme(fmt)
            break
    else:
        raise LayerError(
            f"Layer '{name}' is kept in floats of {dtype}, which 16 bits do not hold exactly. Cast "
            "the model to bfloat16 or float16 first, use `loraq.absorb_lora`, or load the LoRA on "
            "top."
        )

    def pack() -> PackedWeight:
        return PackedWeight(scheme, get_format(fmt).quantize(read().flatten(1)))

    return Weights(old, scheme, shape, pack, DTYPE_NAMES[dtype])


def _make(change: Change) -> tuple[PackedWeight, Done]:
    weights = change.weights
    try:
        packed = weights.read()
        with torch.no_grad(), fixed_arithmetic(packed.device):
            packed, notes = change.make(packed)
    except CheckpointError:
        raise
    except Exception as error:
        raise layer_failure(change.name, error) from error
    assert packed.scheme == change.scheme
    nbytes = _nbytes(change)
    return packed, Done(notes, weights.kept is not None, nbytes - weights.nbytes)


def _nbytes(change: Change) -> int:
    shape = change.weights.shape
    if change.is_float_again:
        assert change.stack.kept is not None
        return math.prod(shape) * DTYPES[change.stack.kept].itemsize
    return change.scheme.nbytes(shape)


def _build(change: Change, packed: PackedWeight | None) -> nn.Module:
    """Return the module that a layer becomes; on the meta device without a packed weight."""
    weights, old = change.weights, change.weights.old
    (n_out, n_in), dtype = weights.shape, old.weight.dtype
    new: Any
    if change.is_float_again:
        is_pixel = old.weight.dim() == 4
        new = nn.Conv2d(n_in, n_out, 1, bias=False, device="meta") if is_pixel else None
        new = new or nn.Linear(n_in, n_out, bias=False, device="meta")
        if packed is not None:
            values = packed.main.dequantize().to(dtype).view(old.weight.shape)
            new.weight = nn.Parameter(values)
        new.bias = old.bias
        return new
    if packed is None:
        new = empty_layer(old, change.scheme, weights.shape, dtype, bias=False)
        new.bias = old.bias
    else:
        new = quantized_class(old).from_packed(packed, old.bias, dtype=dtype)
    if isinstance(old, QuantizedLayer):
        new.ask_activations(old.activations, simulate=old.simulate)
        new.ask_backend(old._asked, strict=old._strict)
        new.record = {key: value for key, value in old.record.items() if key != KEY}
    nbytes = change.scheme.nbytes(weights.shape)
    sizes = {"nbytes": nbytes, "bits_per_weight": 8 * nbytes / math.prod(weights.shape)}
    new.record |= {key: value for key, value in sizes.items() if key in new.record}
    if change.stack.loras:
        new.record[KEY] = change.stack.note()
    return new


class _EditedReader:
    """The tensors of a folder with its changes, each made when the first of its tensors is read."""

    def __init__(
        self,
        reader: TensorReader,
        manifest: Manifest,
        changes: Sequence[Change],
        show: ProgressCallback,
    ) -> None:
        self.done: dict[str, Done] = {}
        self._reader, self._tied, self._show = reader, manifest.tied, show
        self._changes = {change.name: change for change in changes}
        self._made: tuple[str, Mapping[str, Tensor]] = ("", {})

    @property
    def names(self) -> list[str]:
        """Names of the tensors that were not changed."""
        return self._reader.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        change, leaf = self._find(name)
        if change is None:
            return self._reader.shape(self._tied.get(name, name))
        if change.is_float_again:
            return tuple(change.weights.old.weight.shape)
        return change.scheme.storage(change.weights.shape)[leaf]

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor in safetensors' notation."""
        change, _ = self._find(name)
        if change is None:
            return self._reader.dtype(self._tied.get(name, name))
        return (change.stack.kept or "U8") if change.is_float_again else "U8"

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU."""
        change, leaf = self._find(name)
        if change is None:
            return self._reader.read(self._tied.get(name, name))
        if self._made[0] != change.name:
            packed, self.done[change.name] = _make(change)
            self._made = change.name, _tensors_of(change, packed)
            done = self.done[change.name]
            self._show(len(self.done), len(self._changes), change.name, _worst(done))
        return self._made[1][leaf]

    def read_slice(self, name: str, index: int) -> Tensor:
        """Return one entry of a tensor's first axis."""
        return self.read(name)[index]

    def _find(self, name: str) -> tuple[Change | None, str]:
        layer, _, leaf = name.rpartition(".")
        return (None if leaf == "bias" else self._changes.get(layer)), leaf


def _tensors_of(change: Change, packed: PackedWeight) -> Mapping[str, Tensor]:
    if not change.is_float_again:
        return packed.tensors
    assert change.stack.kept is not None
    values = packed.main.dequantize().to(DTYPES[change.stack.kept])
    return {"weight": values.view(change.weights.old.weight.shape)}


def _worst(done: Done) -> float:
    """Return the largest error that was noted of a layer, for the display."""
    return max((note.relative_error for note in done.notes), default=0.0)
