"""`absorb_lora`: quantize W + ΔW of the layers that a LoRA touches; all other bytes stay."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from loraq.appended import KEY
from loraq.checkpoint.apart import require_apart
from loraq.checkpoint.folder import require_free
from loraq.checkpoint.links import require_own_weights
from loraq.checkpoint.model_index import is_pipeline
from loraq.checkpoint.partial import require_no_run
from loraq.devices import AUTO, find_device
from loraq.errors import CheckpointError, LayerError, list_some
from loraq.integrations.diffusers import float_folder, load, model_folder, save_beside
from loraq.integrations.folders import Folder
from loraq.integrations.lora import Adapter, Lora, find_lora_file, read_lora
from loraq.layers import find_places, swap
from loraq.nn import QuantizedLayer
from loraq.options import checked
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.layer import hash_tensor, quantize_layer
from loraq.pipeline.progress import ProgressCallback, show_layers
from loraq.pipeline.report import LayerReport
from loraq.recipe import Recipe
from loraq.safetensors.reader import ShardReader


@dataclass(frozen=True)
class Absorbed:
    """What became of a LoRA."""

    #: The layers that were quantized again; errors are relative to W + ΔW.
    layers: tuple[LayerReport, ...]
    #: Layers that are kept as floats, to which ΔW was added.
    kept: tuple[str, ...]
    #: Other components of a pipeline that the file has adapters for, which were left out.
    others: tuple[str, ...]


@checked
def absorb_lora(  # noqa: PLR0913 (options are keyword-only)
    model: nn.Module | str | Path,
    lora: str | Path,
    source: str | Path,
    *,
    scale: float = 1.0,
    component: str | None = None,
    variant: str | None = None,
    target: str | Path | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | bool = True,
) -> Absorbed:
    """Make a LoRA a permanent part of a quantized model.

    The layers that it touches are quantized again, with it.

    No data is needed, so this takes seconds for each layer. Formats, ranks and seeds are those of
    the model.

    Args:
        model: a quantized model, which is changed in place; or a quantized folder, with `target`.
        lora: a safetensors file or folder, with names that diffusers understands for this model.
        source: folder of the float weights that the model was quantized from, or of its pipeline.
        scale: strength of the LoRA.
        component: which model of a pipeline, such as "transformer_2"; by default the only one. It
            counts for `model` and for `source` where they are pipelines.
        variant: which of several copies of the float weights is read, such as "fp16".
        target: new folder, where `model` is one. Other components of a pipeline are copied.
        device: where layers are solved, such as "auto", "cpu" or "cuda:1"; `None` solves each where
            it is, which is "auto" for a folder.
        overwrite: whether a target that is not empty may be replaced.
        progress: False for silence, True for a display on stderr, or a function to call after each
            layer.

    Returns:
        The layers that changed.

    Raises:
        CheckpointError: the LoRA, the source or a folder cannot be used. Nothing was changed.
        DeviceError: there is no such device. Nothing was changed.
        LayerError: layers that the model does not have, or that were not made from this source.
            Nothing was changed.
    """
    source = Path(source)
    place = None if device is None else find_device(device)
    if isinstance(model, nn.Module):
        if target is not None:
            raise CheckpointError(
                f"A model in memory is changed in place. Save it to '{target}' with `loraq.save`."
            )
        floats = _open_floats(source, component, variant)
        return _absorb(model, lora, floats, scale, place, progress)
    if target is None:
        raise CheckpointError(
            f"'{model}' is not changed in place. Give the new folder as `target`."
        )
    require_apart(Path(target), model, find_lora_file(Path(lora)), source)
    require_free(Path(target), overwrite=overwrite)
    require_no_run(Path(target))
    found = Folder.find(Path(model), component)
    floats = _open_floats(source, component or found.component, variant)
    quantized = load(found.path)
    absorbed = _absorb(quantized, lora, floats, scale, place or find_device(AUTO), progress)
    save_beside(quantized, found.component, found.others, Path(target), overwrite=overwrite)
    return absorbed


def _open_floats(root: Path, component: str | None, variant: str | None) -> ShardReader:
    """Return the float weights in a model's folder, or of a component where it is a pipeline's."""
    folder = model_folder(root, (component or None) if is_pipeline(root) else None)
    require_own_weights(root, folder)
    return ShardReader(float_folder(folder), variant)


def _absorb(
    model: nn.Module,
    lora_path: str | Path,
    source: ShardReader,
    scale: float,
    place: torch.device | None,
    progress: ProgressCallback | bool,
) -> Absorbed:
    lora, lora_sha256 = read_lora(lora_path, model)
    mark = {"sha256": lora_sha256, "scale": scale}
    layers = _find_layers(model, lora, source)
    quantized = {name: layer for name, layer in layers.items() if isinstance(layer, QuantizedLayer)}
    recipes = {name: _require_recipe(name, layer) for name, layer in quantized.items()}
    for name, layer in layers.items():  # everything that can be wrong, before long work
        _read_original(name, layer, source)
    reports, new = [], {}
    with show_layers(progress, "quantize") as show, torch.no_grad():
        for name, layer in quantized.items():
            device = next(layer.parameters()).device
            weight = _add_lora(name, layer, source, lora.adapters[name], scale, device)
            shape = layer.out_features, layer.in_features
            is_kept = bool(layer.record.get("kept"))
            job = LayerJob.of(name, shape, layer.scheme, recipes[name], is_kept=is_kept)
            finished = quantize_layer(job, weight, device=place)
            new[name], report = finished.build_module(layer, recipes[name]), finished.report
            new[name].backend = layer.backend
            new[name].ask_activations(layer.activations, simulate=layer.simulate)
            origin = {key: layer.record[key] for key in ("source_sha256", "source_dtype")}
            new[name].record |= {**origin, "absorbed": mark}
            reports.append(report)
            show(len(reports), len(quantized), name, report.relative_error)
        kept = {
            name: layer.get_parameter("weight") for name, layer in layers.items() if name not in new
        }
        sums = {
            name: _add_lora(name, layers[name], source, lora.adapters[name], scale, weight.device)
            for name, weight in kept.items()
        }
        before = {name: weight.clone() for name, weight in kept.items()}
        try:  # nothing is left to read or solve, but a Ctrl-C may come
            for name, weight in kept.items():
                weight.copy_(sums[name].view(weight.shape))
            swap(find_places(model, new))
        except BaseException:
            for name, weight in kept.items():
                weight.copy_(before[name])
            raise
    return Absorbed(tuple(reports), tuple(name for name in layers if name not in new), lora.others)


def _find_layers(model: nn.Module, lora: Lora, source: ShardReader) -> dict[str, nn.Module]:
    """Return the layers that a LoRA touches.

    The model and the source have all of them, in the LoRA's shapes.
    """
    if getattr(model, "peft_config", None):
        raise LayerError(
            "The model carries adapters. Unload them first: what is absorbed needs no adapter."
        )
    present = dict(model.named_modules())
    missing = [
        name
        for name in lora.adapters
        if name not in present or f"{name}.weight" not in source.names
    ]
    if missing:
        raise LayerError(
            f"'{lora.file}' touches {len(missing)} layers that {type(model).__name__} or the "
            f"source does not have: {list_some(missing)}. Is the LoRA for this model, in names "
            "that diffusers understands?"
        )
    for name, adapter in lora.adapters.items():
        shape = source.shape(f"{name}.weight")
        wide = (shape[0], torch.Size(shape[1:]).numel())
        if (adapter.up.shape[0], adapter.down[0].numel()) != wide:
            raise LayerError(
                f"Layer '{name}' has the shape {wide}; the LoRA has factors "
                f"{tuple(adapter.up.shape)} and {tuple(adapter.down.shape)}. It is for another "
                "model."
            )
    return {name: present[name] for name in lora.adapters}


def _require_recipe(name: str, layer: QuantizedLayer) -> Recipe:
    if KEY in layer.record:
        raise LayerError(
            f"LoRAs were appended to layer '{name}', which absorbing would lose. Remove them first "
            "(`loraq.remove_lora`), absorb, and append them again."
        )
    if not {"recipe", "source_sha256", "source_dtype"} <= layer.record.keys():
        raise LayerError(
            f"Layer '{name}' does not say how it was made. Quantize the model again with "
            "`loraq.quantize_`."
        )
    if "absorbed" in layer.record:
        raise LayerError(
            f"Layer '{name}' has absorbed a LoRA before. Start from the folder without it: sums of "
            "LoRAs are not kept."
        )
    if "stats_sha256" in layer.record:
        raise LayerError(
            f"Layer '{name}' was quantized with activation statistics, which are not kept and do "
            "not know the LoRA. Add the LoRA to the float weights, collect statistics of that, and "
            "quantize it."
        )
    return Recipe.from_dict(layer.record["recipe"])


def _read_original(name: str, layer: nn.Module, source: ShardReader) -> Tensor:
    """Return the float weight (out, in) that a layer was made from, in the dtype it had then."""
    stored = source.read(f"{name}.weight")
    for dtype in (stored.dtype, torch.bfloat16, torch.float16, torch.float32):
        weight = stored.to(dtype)
        if isinstance(layer, QuantizedLayer):
            same = hash_tensor(weight) == layer.record["source_sha256"]
        else:
            kept = layer.get_parameter("weight").detach().cpu()
            same = weight.dtype == kept.dtype and torch.equal(weight, kept)
        if same:
            return weight.flatten(1)
    raise LayerError(
        f"Layer '{name}' was not made from the weights in '{source.folder}', or has absorbed a "
        "LoRA before. Give the float folder that this model was quantized from."
    )


def _add_lora(
    name: str,
    layer: nn.Module,
    source: ShardReader,
    adapter: Adapter,
    scale: float,
    device: torch.device,
) -> Tensor:
    """Return W + scale · ΔW (out, in) in fp32."""
    return _read_original(name, layer, source).to(device).float() + scale * adapter.delta(device)
