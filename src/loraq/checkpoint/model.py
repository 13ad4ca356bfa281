"""`save` and `load_into`: a module with quantized layers to a folder and back, bit for bit."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from loraq.checkpoint.components import StoredFile
from loraq.checkpoint.configuration import (
    GENERATION_FILE,
    generation_config,
    model_config,
    weights_stem,
)
from loraq.checkpoint.contents import require_numbers, require_ties
from loraq.checkpoint.fit import require_kind, require_names
from loraq.checkpoint.manifest import Manifest
from loraq.checkpoint.origin import require_origin_kept
from loraq.checkpoint.partial import atomic_folder
from loraq.checkpoint.places import build_empty_layer, find_replaced
from loraq.checkpoint.renaming import rename_tensors
from loraq.errors import CheckpointError
from loraq.json_files import write_json
from loraq.kernels import DEFAULT_BACKEND, check_for_all, resolve_backend
from loraq.layers import (
    Change,
    bare_model,
    find_places,
    quantized_layers,
    require_bare,
    swap,
    take_dtype,
)
from loraq.nn import QuantizedLayer
from loraq.options import Size, checked
from loraq.safetensors.layout import DEFAULT_SHARD_BYTES, write_shards
from loraq.safetensors.reader import ShardReader, TensorReader
from loraq.state import answer_for_weights


@checked
def save(
    model: nn.Module,
    folder: str | Path,
    *,
    overwrite: bool = False,
    shard_bytes: Size = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a module with quantized layers to a folder.

    It gets safetensors shards, `loraq.json`, and `config.json` if the module has a configuration.

    The folder appears under its name only when it is whole.

    Args:
        model: a module after `quantize_`.
        folder: where to; made, with its parents.
        overwrite: whether a folder that is not empty may be replaced.
        shard_bytes: largest shard, unless one tensor alone is larger.

    Raises:
        CheckpointError: the module has no quantized layer, the folder is not empty or holds the
            folder that the module was loaded from, or the disk refuses.
    """
    model = bare_model(model)
    require_origin_kept(model, Path(folder))
    require_quantized(model)
    require_bare(model)
    with atomic_folder(Path(folder), overwrite=overwrite) as partial:
        write_model(model, partial, shard_bytes=shard_bytes)


def write_model(
    model: nn.Module,
    folder: Path,
    *,
    shard_bytes: Size = DEFAULT_SHARD_BYTES,
    variant: str = "",
    components: Mapping[str, StoredFile] | None = None,
) -> None:
    """Write the files of `save` into an empty folder that is not yet under its name.

    Args:
        model: a module after `quantize_`.
        folder: where to.
        shard_bytes: largest shard, unless one tensor alone is larger.
        variant: goes into the names of the weight files, such as "fp16".
        components: other files of the pipeline that the folder will be in.

    Raises:
        CheckpointError: the module has no quantized layer, or a tensor cannot be stored.
        OSError: the disk refuses.
    """
    tensors, tied = _split_tied(model.state_dict())
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
            raise CheckpointError(
                f"Tensor '{name}' is {tensor.dtype}, which is no weight without its scale and "
                "could not be loaded. Cast it to 16 bits first."
            )
    manifest = Manifest.of_layers(require_quantized(model), tied, components or {})
    config = model_config(model)
    stem = ".".join(part for part in (weights_stem(config), variant) if part)
    files = write_shards(tensors, folder, stem, shard_bytes)
    if config:
        raw = write_json(folder / "config.json", config)
        files["config.json"] = hashlib.sha256(raw).hexdigest()
    if generation := generation_config(model):
        write_json(folder / GENERATION_FILE, generation)
    manifest.write(folder, files)


def require_quantized(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of a model, if there are any with a name."""
    layers = quantized_layers(model)
    if not layers:
        raise CheckpointError(
            "Nothing to save: the model has no quantized layer. Call `loraq.quantize_` first."
        )
    if "" in layers:
        raise CheckpointError(
            "A bare quantized layer has no name to save it under. Save the module that holds it."
        )
    return layers


@checked
def load_into(
    model: nn.Module, folder: str | Path, *, backend: str = DEFAULT_BACKEND, verify: bool = True
) -> None:
    """Load a folder written by `save` into a module of the same architecture, in place.

    The module's linear layers are replaced by quantized ones as the manifest says; every tensor
    takes the dtype it was saved with and the device of the one it replaces (the CPU in place of the
    meta device). Nothing is changed unless the whole folder fits and was read: whatever goes wrong
    before, the module is as it was. So memory holds both the module and the folder's tensors for a
    moment; a module on the meta device takes none.

    Args:
        model: the float architecture, on any device, its weights do not matter; or a quantized one.
        folder: what `save` or `loraq quantize` wrote.
        backend: back end of the quantized layers; those that it refuses run on the automatic
            choice.
        verify: whether the files' hashes are checked.

    Raises:
        CheckpointError: truncated, foreign, changed or mismatched files; missing and unexpected
            keys are listed.
        KernelError: there is no such back end, or it refuses every layer.
    """
    model = bare_model(model)
    require_bare(model)
    load_onto(model, Path(folder), None, backend=backend, verify=verify)


def load_onto(
    model: nn.Module, folder: Path, device: torch.device | None, *, backend: str, verify: bool
) -> None:
    """Load a folder as `load_into`, each tensor to a device as soon as it is read.

    Args:
        model: the architecture.
        folder: a quantized one.
        device: where all tensors go; `None` leaves each where the one is that it replaces.
        backend: as for `load_into`.
        verify: as for `load_into`.

    Raises:
        CheckpointError, KernelError: as `load_into`.
    """
    manifest, reader, devices, layers = _check_folder(model, folder, backend=backend, verify=verify)
    # Everything is read before anything changes; what is left then are assignments.
    read: dict[str, Tensor] = {}
    for name, own in devices.items():
        source = manifest.tied.get(name, name)
        if source not in read:
            read[source] = reader.read(source).to(own if device is None else device)
    swap([*find_places(model, layers), *_find_tensors(model, layers, devices, manifest.tied, read)])
    take_dtype(model)
    answer_for_weights(model, layers)


def insert_empty_layers(
    model: nn.Module,
    folder: Path,
    *,
    verify: bool = True,
    rename: Callable[[str], str | None] | None = None,
) -> tuple[Manifest, TensorReader]:
    """Put empty quantized layers where a folder's manifest says, for a loader that fills them.

    First the whole folder is checked against the model.

    Args:
        model: what is loaded.
        folder: a quantized one.
        verify: whether the files' hashes are checked.
        rename: what a tensor of the folder is called in the model; `None` for one that the model
            does not have, which is part of a larger one.

    Returns:
        The manifest, and the tensors of the folder.

    Raises:
        CheckpointError: the folder does not fit the model, as for `load_into`.
    """
    manifest, reader, _, layers = _check_folder(
        model, folder, backend=DEFAULT_BACKEND, verify=verify, rename=rename
    )
    swap(find_places(model, layers))
    answer_for_weights(model, layers)
    return manifest, reader


def _check_folder(
    model: nn.Module,
    folder: Path,
    *,
    backend: str,
    verify: bool,
    rename: Callable[[str], str | None] | None = None,
) -> tuple[Manifest, TensorReader, dict[str, torch.device], dict[str, QuantizedLayer]]:
    """Check a whole folder against a model, which stays as it is.

    Returns:
        The manifest, the tensors of the folder, the device of every tensor to load, and the empty
        layers to put in by their names.
    """
    asked = resolve_backend(backend)
    whole, stored = Manifest.read(folder, verify=verify), ShardReader(folder)
    manifest, reader = whole, cast(TensorReader, stored)
    if rename is not None:
        manifest, reader = rename_tensors(whole, stored, rename)
    own = _find_own_ties(model, manifest, reader)
    manifest = replace(manifest, tied={**own, **manifest.tied})
    layers = {name: build_empty_layer(model, name, manifest) for name in manifest.layers}
    devices = _check(model, layers, reader, manifest, folder)
    require_ties(whole, stored)
    require_numbers(whole, stored)
    check_for_all(asked, [layer.spec for layer in layers.values()])
    for layer in layers.values():
        layer.ask_backend(backend, strict=False)
    return manifest, reader, devices, layers


def _find_own_ties(model: nn.Module, manifest: Manifest, reader: TensorReader) -> dict[str, str]:
    """Return the names of parameters that a model shares with one in the folder, by that one.

    A text encoder's table of tokens stands in two places, and its library stores it once.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = {id(parameters[name]): name for name in reader.names if name in parameters}
    return {
        name: stored[id(parameter)]
        for name, parameter in parameters.items()
        if name not in reader.names
        and id(parameter) in stored
        and name not in manifest.layers
        and name.rpartition(".")[0] not in manifest.layers
    }


def _check(
    model: nn.Module,
    layers: dict[str, QuantizedLayer],
    reader: TensorReader,
    manifest: Manifest,
    folder: Path,
) -> dict[str, torch.device]:
    """Return the device of every tensor to load.

    Raises `CheckpointError` that lists what does not fit.
    """
    expected: dict[str, Tensor] = {}
    places = find_replaced(model, layers)
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if key not in places and (owner not in places or leaf == "bias"):
            expected[key] = tensor
    devices = {key: tensor.device for key, tensor in expected.items()}
    for name, layer in places.items():
        owner, _, leaf = name.rpartition(".")
        old = model.get_submodule(owner)._parameters.get(leaf)
        device = (next(model.get_submodule(name).parameters()) if old is None else old).device
        for key, tensor in layer.state_dict().items():
            expected[f"{name}.{key}"] = tensor
            devices[f"{name}.{key}"] = device
    tied = {name for name, source in manifest.tied.items() if source in reader.names}
    require_names(
        {*reader.names, *tied},
        expected,
        f"'{folder}' does not fit {type(model).__name__}",
        "Load it into the architecture it was made from.",
    )
    for key, tensor in expected.items():
        source = manifest.tied.get(key, key)
        shape, dtype = reader.shape(source), reader.dtype(source)
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"'{folder}': tensor '{key}' has shape {shape}, the model wants "
                f"{tuple(tensor.shape)}."
            )
        if tensor.dtype == torch.uint8 and dtype != "U8":
            raise CheckpointError(
                f"'{folder}': tensor '{key}' is {dtype}. Packed tensors are raw bytes (U8)."
            )
        require_kind(key, dtype, tensor.dtype, folder)
    meta = torch.device("meta")
    return {
        key: torch.device("cpu") if device == meta else device for key, device in devices.items()
    }


def _find_tensors(
    model: nn.Module,
    layers: dict[str, QuantizedLayer],
    names: Iterable[str],
    tied: dict[str, str],
    read: dict[str, Tensor],
) -> Iterator[Change]:
    """Yield the changes that put tensors into a model and into the layers that it will get."""
    places, parameters = find_replaced(model, layers), dict[str, nn.Parameter]()
    for name in names:
        source, (owner_name, _, leaf) = tied.get(name, name), name.rpartition(".")
        owner = places.get(owner_name) or model.get_submodule(owner_name)
        if leaf not in owner._parameters:
            yield owner._buffers, leaf, read[source]
            continue
        old, tensor = owner._parameters[leaf], read[source]
        if source not in parameters:  # tied ones stay one object
            trainable = old is not None and old.requires_grad and tensor.is_floating_point()
            parameters[source] = nn.Parameter(tensor, requires_grad=trainable)
        yield owner._parameters, leaf, parameters[source]


def _split_tied(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into distinct tensors and the names that share one of them."""
    seen: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], str] = {}
    tensors, tied = {}, {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.numel(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor
    return tensors, tied
