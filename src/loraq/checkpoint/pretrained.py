"""A model's own `save_pretrained` writes what `save` writes, its footprint counts what is kept.

Without the manifest nobody could read the weights.

Nothing here knows diffusers: any module with methods of these names is served.
"""

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from loraq.checkpoint.beside import replaced_model
from loraq.checkpoint.floats import attach_float_methods
from loraq.checkpoint.inspect import scratch_nbytes
from loraq.checkpoint.model import require_quantized, write_model
from loraq.checkpoint.origin import require_origin_kept
from loraq.errors import CheckpointError
from loraq.layers import quantized_layers
from loraq.safetensors.layout import DEFAULT_SHARD_BYTES

_LOGGER = logging.getLogger("loraq")

#: How transformers writes float weights; packed ones have the names of the model.
_ABOUT_NAMES = ("save_original_format", "save_peft_format")
#: What the libraries hand on to the hub.
_HUB_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def attach_methods(model: nn.Module) -> None:
    """Let a quantized model's own methods know of its packed weights.

    `save_pretrained` writes the folder that `save` writes, and `get_memory_footprint` counts what
    the back ends keep beside the packed bytes. It gets `dequantize()` too.

    So do the models in it. One without that method, or without quantized layers, is left as it is.
    """
    for part in model.modules():
        if not quantized_layers(part):
            continue
        if callable(getattr(part, "save_pretrained", None)):
            attach_float_methods(part)
            setattr(part, "save_pretrained", partial(_save_pretrained, part))  # noqa: B010 (a module, says mypy)
        if callable(getattr(part, "get_memory_footprint", None)):
            setattr(part, "get_memory_footprint", partial(_memory_footprint, part))  # noqa: B010 (a module, says mypy)


def note_memory(model: nn.Module) -> None:
    """Log what a loaded model takes, at level INFO of the logger `loraq`."""
    stored = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    layers = quantized_layers(model).values()
    _LOGGER.info(
        "%s takes %.1f MB, and up to %.1f MB while a layer is decoded to 16 bits. `loraq inspect "
        "--memory` lists what other back ends keep beside it, and `get_memory_footprint()` counts "
        "what is kept now.",
        type(model).__name__,
        sum(stored.values()) / 1e6,
        scratch_nbytes(layer.packed_shape for layer in layers) / 1e6,
    )


def _memory_footprint(model: Any, return_buffers: bool = True) -> int:
    """Return the bytes of a model's tensors, with those that back ends keep now."""
    kept = sum(layer.kept_nbytes for layer in quantized_layers(model).values())
    return int(type(model).get_memory_footprint(model, return_buffers)) + kept


def _save_pretrained(  # noqa: PLR0913 - those of diffusers
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    push_to_hub: bool = False,
    **others: Any,
) -> None:
    """Write the model as `loraq.save` does; the arguments are those of diffusers.

    Those of transformers are taken by their names.

    Files of others in the folder, such as those of a repository's clone, stay as they are.

    Raises:
        CheckpointError: an option that this format does not have, adapters that are not part of it,
            or a pipeline's folder.
    """
    known = (*_HUB_OPTIONS, *_ABOUT_NAMES)
    refused = {name for name, value in others.items() if value is not None and value is not False}
    refused -= {*known}
    if not safe_serialization:
        refused.add("safe_serialization=False")
    if push_to_hub and not callable(getattr(model, "push_to_hub", None)):
        refused.add("push_to_hub")
    if refused:
        raise CheckpointError(
            f"A quantized model cannot be saved with {', '.join(sorted(refused))}. Save it "
            "plainly, as safetensors."
        )
    if variant and not re.fullmatch(r"[\w-]+", variant):
        raise CheckpointError(
            f"The variant {variant!r} cannot be part of a file's name. Letters, digits, '_' and "
            "'-' are required, as in 'fp16'."
        )
    adapters: Any = getattr(model, "peft_config", None)
    if adapters:
        raise CheckpointError(
            f"The model carries adapters ({', '.join(adapters)}), which are not part of its "
            "checkpoint. Save them with `save_lora_adapter` and unload them, or make them "
            "permanent with `loraq.absorb_lora`."
        )
    shard_bytes = _parse_size(max_shard_size)
    if not is_main_process:
        return
    folder = Path(save_directory)
    if (folder / "model_index.json").exists():
        raise CheckpointError(
            f"Will not replace '{folder}': it is a pipeline, and this is one model of it. Choose "
            "the folder of a component."
        )
    require_origin_kept(model, folder)
    require_quantized(model)
    with replaced_model(folder) as partial:
        write_model(model, partial, shard_bytes=shard_bytes, variant=variant or "")
    if push_to_hub:
        asked = {name: others[name] for name in _HUB_OPTIONS if others.get(name)}
        repository = asked.pop("repo_id", folder.resolve().name)
        push: Any = model.push_to_hub
        push(repository, **asked, **({"variant": variant} if variant else {}))


def _parse_size(size: int | str | None) -> int:
    """Return the bytes that a size such as 5_000_000_000 or "5GB" means."""
    if size is None:
        return DEFAULT_SHARD_BYTES
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B|)", str(size).upper())
    if match is None or int(match[1]) == 0:
        raise CheckpointError(
            f"max_shard_size is {size!r}. A number of bytes or a size such as '5GB' is required."
        )
    return int(match[1]) * _UNITS[match[2]]
