"""`append_lora`, `remove_lora`: LoRAs on the branches of a quantized model, without float weights.

A model in memory and a folder go the same road (`edits`): what becomes of each layer is settled
first, with everything that can be wrong; then one layer after the other is made, and all of them
are put in place at once, or written.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from loraq.appended import BranchStack, Part, append, branch_for, remove
from loraq.errors import LayerError, LoraqError, list_some
from loraq.experts import QuantizedExperts
from loraq.integrations.edits import Change, Place, edit
from loraq.integrations.lora import Adapter, Lora, find_lora_file, name_of, read_lora
from loraq.layers import is_linear, matrix_of, quantized_layers
from loraq.nn import QuantizedLayer
from loraq.options import checked, suits
from loraq.packed import PackedWeight
from loraq.pipeline.progress import ProgressCallback
from loraq.recipe_names import BRANCHES
from loraq.scheme import Branch

#: The longest name of a LoRA.
_LONGEST_NAME = 200


class Request(NamedTuple):
    """One LoRA to append."""

    path: str | Path
    scale: float = 1.0
    #: `None` takes that of its file.
    name: str | None = None


@dataclass(frozen=True)
class AppendedFactors:
    """What became of a LoRA in one layer."""

    lora: str
    layer: str
    #: (out, in).
    shape: tuple[int, int]
    rank: int
    #: ‖ΔW − U D‖ / ‖ΔW‖ of what is stored.
    relative_error: float


@dataclass(frozen=True)
class Appended:
    """What became of LoRAs that were appended."""

    #: What they are called, for `remove_lora`.
    names: tuple[str, ...]
    factors: tuple[AppendedFactors, ...]
    #: Layers that were kept in floats: their weight is stored as it is, beside a branch.
    kept: tuple[str, ...]
    #: Bytes that all layers take more than before.
    nbytes: int
    #: Other components of a pipeline that a file has adapters for, which were left out.
    others: tuple[str, ...]


@checked
def append_lora(  # noqa: PLR0913 (options are keyword-only)
    model: nn.Module | str | Path,
    lora: str | Path,
    scale: float = 1.0,
    *,
    name: str | None = None,
    component: str | None = None,
    target: str | Path | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | bool = True,
) -> Appended:
    """Append a LoRA to the branches of a quantized model; `remove_lora` takes it away again.

    The factors are stacked on those of each layer's branch and quantized in its format. The main
    weight and the branch as it was keep their bytes, so the float weights are not needed, and the
    quality of the model without the LoRA stays what it was. Several LoRAs add up.

    A layer without a branch gets one, in the formats that most branches of the model have (an 8-bit
    one, "w8a8", if none has). A layer that was kept in floats stores its weight as it is, byte for
    byte in 16 bits, beside such a branch.

    Args:
        model: a quantized model, which is changed in place; or a quantized folder, with `target`.
        lora: a safetensors file or folder, with names that diffusers understands for this model.
        scale: strength of the LoRA. To change it later, remove the LoRA and append it again.
        name: what it is called from now on; by default the name of its file, or of its folder.
        component: which model of a pipeline's folder, such as "transformer_2"; by default the only
            quantized denoiser.
        target: new folder, where `model` is one; one layer is in memory at a time. Other components
            of a pipeline are copied.
        overwrite: whether a target that is not empty may be replaced.
        progress: False for silence, True for a display on stderr, or a function to call after each
            layer.

    Returns:
        The layers that changed, with the error of the LoRA in each.

    Raises:
        CheckpointError: the LoRA or a folder cannot be used. Nothing was changed.
        LayerError: the model has not all layers of the LoRA, or in other shapes; it has a LoRA of
            this name, or adapters; or a layer cannot take the LoRA. Nothing was changed.
        LoraqError: the scale or the name is none, or it is neither a model nor a folder.
    """
    requests = [Request(lora, scale, name)]
    return append_loras(
        model,
        requests,
        component=component,
        target=target,
        overwrite=overwrite,
        progress=progress,
    )


def append_loras(
    model: nn.Module | str | Path,
    requests: Sequence[Request],
    *,
    component: str | None = None,
    target: str | Path | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | bool = True,
) -> Appended:
    """Append several LoRAs at once; otherwise as `append_lora`."""
    for request in requests:
        if not suits(request.scale, float):
            raise LoraqError(
                f"The scale of '{request.path}' is {request.scale!r}. It must be a finite number."
            )
    files = [find_lora_file(Path(request.path)) for request in requests]
    names = [
        name_of(file) if request.name is None else request.name
        for file, request in zip(files, requests, strict=True)
    ]
    for name in names:
        _require_name(name)
    read: list[_Named] = []

    def plan(place: Place) -> list[Change]:
        stacks = _stacks_of(place.model)
        known = {part.name for stack in stacks.values() for part in stack.loras}
        twice = [name for i, name in enumerate(names) if name in known or name in names[:i]]
        if twice:
            raise LayerError(
                f"There is a LoRA '{twice[0]}' on the model already. Give this one another `name`, "
                "or remove the old one (`loraq.remove_lora`)."
            )
        for name, request in zip(names, requests, strict=True):
            found, sha256 = read_lora(request.path, place.model)
            read.append(_Named(name, sha256, float(request.scale), found))
        return _plan(place, stacks, read)

    done = edit(
        model,
        plan,
        "append",
        inputs=files,
        component=component,
        target=target,
        overwrite=overwrite,
        progress=progress,
    )
    factors = tuple(factors for edited in done.values() for factors in edited.notes)
    kept = tuple(layer for layer, edited in done.items() if edited.was_kept)
    others = {other for named in read for other in named.lora.others}
    nbytes = sum(edited.more_bytes for edited in done.values())
    return Appended(tuple(names), factors, kept, nbytes, tuple(sorted(others)))


@checked
def remove_lora(
    model: nn.Module | str | Path,
    name: str,
    *,
    component: str | None = None,
    target: str | Path | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | bool = True,
) -> tuple[str, ...]:
    """Take away a LoRA that `append_lora` has appended, whatever was appended before or after it.

    With the last one, the model has exactly the bytes that it had before.

    Args:
        model: a quantized model, which is changed in place; or a quantized folder, with `target`.
        name: what the LoRA is called there; `loraq inspect` shows it.
        component: as for `append_lora`.
        target: new folder, where `model` is one.
        overwrite: whether a target that is not empty may be replaced.
        progress: as for `append_lora`.

    Returns:
        The layers that it was removed from.

    Raises:
        CheckpointError: a folder cannot be used. Nothing was changed.
        LayerError: there is no LoRA of this name, or the model carries adapters. Nothing was
            changed.
    """

    def plan(place: Place) -> list[Change]:
        stacks = _stacks_of(place.model)
        layers = {
            layer: stack
            for layer, stack in stacks.items()
            if any(part.name == name for part in stack.loras)
        }
        if not layers:
            known = {part.name: None for stack in stacks.values() for part in stack.loras}
            raise LayerError(
                f"No LoRA '{name}' was appended to the model. There "
                + (f"are: {list_some(list(known))}." if known else "is none at all.")
            )
        return [_plan_removal(place, layer, stack, name) for layer, stack in layers.items()]

    done = edit(
        model,
        plan,
        "remove",
        component=component,
        target=target,
        overwrite=overwrite,
        progress=progress,
    )
    return tuple(done)


class _Named(NamedTuple):
    """A LoRA that was read."""

    name: str
    sha256: str
    scale: float
    lora: Lora


def _plan(place: Place, stacks: Mapping[str, BranchStack], loras: Sequence[_Named]) -> list[Change]:
    wanted: dict[str, list[tuple[_Named, Adapter]]] = {}
    for named in loras:
        for layer, adapter in _find_layers(place.model, named.lora).items():
            wanted.setdefault(layer, []).append((named, adapter))
    layers = quantized_layers(place.model)
    bases = (stack.base_of(layers[name].scheme).branch for name, stack in stacks.items())
    branches = [branch for branch in bases if branch is not None]
    order = [name for name, _ in place.model.named_modules() if name in wanted]
    return [
        _plan_layer(place, layer, stacks.get(layer), wanted[layer], branches) for layer in order
    ]


def _plan_layer(
    place: Place,
    layer: str,
    stack: BranchStack | None,
    wanted: Sequence[tuple[_Named, Adapter]],
    branches: Sequence[Branch],
) -> Change:
    weights = place.weights(layer)
    if stack is None:
        stack = BranchStack(0, kept=weights.kept)
    before = stack
    base = stack.base_of(weights.scheme)
    branch = branch_for(weights.scheme, branches, BRANCHES["w8a8"])
    shape, parts = weights.shape, []
    for named, adapter in wanted:
        rank = min(adapter.down.shape[0], *shape)
        parts.append(Part(named.name, named.sha256, named.scale, 0, rank))
    after = BranchStack(before.rank, (*before.loras, *parts), before.kept).arranged(branch)

    def make(packed: PackedWeight) -> tuple[PackedWeight, tuple[AppendedFactors, ...]]:
        now, notes = before, []
        for part, (named, adapter) in zip(parts, wanted, strict=True):
            factors = _factors_of(adapter, named.scale, packed)
            packed, now, error = append(packed, now, part, branch, factors)
            notes.append(AppendedFactors(part.name, layer, shape, part.rank, error))
        return packed, tuple(notes)

    return Change(layer, weights, after.scheme_of(base, branch), after, make)


def _factors_of(adapter: Adapter, scale: float, packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Return B with the strength in it, and A, in fp32 on the device of a weight."""
    up, down = (
        factor.to(packed.device).float().flatten(1) for factor in (adapter.up, adapter.down)
    )
    strength = adapter.scale * scale
    root = math.sqrt(abs(strength))  # on both sides, so that neither leaves fp32
    return up * math.copysign(root, strength), down * root


def _plan_removal(place: Place, layer: str, stack: BranchStack, name: str) -> Change:
    weights = place.weights(layer)
    branch = weights.scheme.branch
    assert branch is not None
    left = tuple(part for part in stack.loras if part.name != name)
    after = BranchStack(stack.rank, left, stack.kept).arranged(branch)
    base = stack.base_of(weights.scheme)

    def make(packed: PackedWeight) -> tuple[PackedWeight, tuple[AppendedFactors, ...]]:
        return remove(packed, stack, name)[0], ()

    return Change(layer, weights, after.scheme_of(base, branch), after, make)


def _stacks_of(model: nn.Module) -> dict[str, BranchStack]:
    """Return what the branch of every quantized layer of a model is made of."""
    stacks = {}
    for name, layer in quantized_layers(model).items():
        try:
            stacks[name] = BranchStack.of(layer.record, layer.scheme)
        except ValueError as error:
            raise LayerError(f"Layer '{name}' has a damaged record: {error}") from error
    return stacks


def _find_layers(model: nn.Module, lora: Lora) -> dict[str, Adapter]:
    """Return the adapters of a LoRA by the first name of each layer.

    The model has all of these layers, in the LoRA's shapes.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if missing := [name for name in lora.adapters if name not in modules]:
        raise LayerError(
            f"'{lora.file}' touches {len(missing)} layers that {type(model).__name__} does not "
            f"have: {list_some(missing)}. Is the LoRA for this model, in names that diffusers "
            "understands?"
        )
    first = {module: name for name, module in model.named_modules()}
    found: dict[str, Adapter] = {}
    for name, adapter in lora.adapters.items():
        module = modules[name]
        if isinstance(module, QuantizedLayer) and not isinstance(module, QuantizedExperts):
            shape = module.out_features, module.in_features
        elif is_linear(module):
            shape = tuple(matrix_of(module).shape)  # type: ignore[assignment]
        else:
            raise LayerError(
                f"'{lora.file}' touches '{name}', a {type(module).__name__}. LoRAs are appended to "
                "linear layers and convolutions of 1×1 pixel; load this one on top."
            )
        if (adapter.up.shape[0], adapter.down[0].numel()) != shape:
            raise LayerError(
                f"Layer '{name}' has the shape {shape}; '{lora.file}' has factors "
                f"{tuple(adapter.up.shape)} and {tuple(adapter.down.shape)}. It is for another "
                "model."
            )
        if first[module] in found:
            raise LayerError(
                f"'{lora.file}' touches '{name}' and '{first[module]}', which are the same layer. "
                "Leave one of them out."
            )
        found[first[module]] = adapter
    return found


def _require_name(name: str) -> None:
    if not (name.strip() and name.isprintable() and len(name) <= _LONGEST_NAME):
        raise LoraqError(
            f"A LoRA cannot be called {name!r}. Give it a `name` of 1 to {_LONGEST_NAME} "
            "characters that can be printed."
        )
