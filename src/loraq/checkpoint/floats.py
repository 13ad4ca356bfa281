"""A quantized model as floats: `dequantize_`, and methods of the model's own that mean floats."""

import math
from functools import partial
from typing import Any

from torch import nn

from loraq.errors import LayerError
from loraq.layers import quantized_layers, replace_layer

#: What a quantized model has of its own, in place of the methods of its class.
_OWN = (
    *("save_pretrained", "dequantize", "num_parameters", "get_memory_footprint"),
    *("_upload_folder", "_upload_modified_files"),  # those of `push_to_hub`, for the model card
)


def dequantize_(model: nn.Module) -> nn.Module:
    """Put float layers with the decoded weights in place of all quantized layers of a model.

    The weights are those that the quantized model computes with, in the dtype of the biases, so the
    output is the same but for the rounding of activations. A model of diffusers or transformers is
    a float model afterwards: it says so in its configuration, and saves itself as one.

    Args:
        model: any module; one layer after the other is replaced.

    Returns:
        The model.

    Raises:
        LayerError: the module itself is a quantized layer, no layer is quantized, or one carries
            adapters. Nothing was changed.
    """
    layers = quantized_layers(model)
    if not layers or "" in layers:
        what = "is a quantized layer itself" if layers else "has no quantized layer"
        raise LayerError(
            f"{type(model).__name__} {what}. A module that holds quantized layers is required; "
            "the `dequantize()` of a layer returns the float one."
        )
    adapted = [name for name in layers if name.rpartition(".")[2] == "base_layer"]
    if adapted:
        raise LayerError(
            f"{len(adapted)} quantized layers carry adapters, '{adapted[0]}' first. Unload the "
            "adapters, dequantize, and load them again."
        )
    parts = [part for part in model.modules() if quantized_layers(part)]
    for name, layer in layers.items():
        replace_layer(model, name, layer.dequantize())
    for part in parts:  # a model may be held by another module
        for name in (*_OWN, "hf_quantizer", "quantization_method"):
            part.__dict__.pop(name, None)
        if hasattr(part, "is_quantized"):
            part.is_quantized = False  # type: ignore[assignment]
        forget_quantization(part)
    return model


def forget_quantization(model: nn.Module) -> None:
    """Take out of a model's configuration that it is quantized."""
    config: Any = getattr(model, "config", None)
    if isinstance(config, dict) and "quantization_config" in config:  # of diffusers, frozen
        plain = {name: value for name, value in config.items() if name != "quantization_config"}
        setattr(model, "_internal_dict", type(config)(plain))  # noqa: B010 (a module, says mypy)
    elif hasattr(config, "to_diff_dict"):  # of transformers
        for name in ("quantization_config", "_is_quantized"):
            vars(config).pop(name, None)


def attach_float_methods(model: nn.Module) -> None:
    """Let a quantized model have `dequantize()`, and count its parameters as the float one does.

    A model whose class counts no parameters is left without that.
    """
    setattr(model, "dequantize", partial(dequantize_, model))  # noqa: B010 (a module, says mypy)
    if callable(getattr(type(model), "num_parameters", None)):
        setattr(model, "num_parameters", partial(_num_parameters, model))  # noqa: B010 (as above)


def _num_parameters(
    model: Any, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """Count as the class does, every packed weight with the numbers that it stands for."""
    count: int = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    if only_trainable:
        return count
    layers = set(quantized_layers(model).values())  # one that stands in two places counts once
    return count + sum(math.prod(layer.packed_shape) - layer.nbytes for layer in layers)
