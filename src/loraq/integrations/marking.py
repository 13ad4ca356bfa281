"""What a quantized model of diffusers says of itself, however it came to be quantized."""

import json
from collections import Counter
from typing import Any

from torch import nn

from loraq.errors import LoraqError
from loraq.layers import bare_model, quantized_layers
from loraq.recipe import Recipe


def mark_quantized(model: nn.Module) -> None:
    """Put the models in a module that have quantized layers into the state of a loaded one.

    That is what `from_pretrained` leaves: `is_quantized`, `hf_quantizer`, `quantization_method` and
    `config.quantization_config`. Modules that are no models of diffusers are left as they are.
    """
    for part in bare_model(model).modules():
        if hasattr(part, "register_to_config") and quantized_layers(part):
            _mark(part)


def _mark(model: Any) -> None:
    model.is_quantized = True
    try:  # where diffusers has made this model; another version may not have what is needed
        from loraq.integrations.config import LoraqConfig
        from loraq.integrations.quantizer import LoraqQuantizer
    except (ImportError, AttributeError):
        return

    config = LoraqConfig()
    quantizer = LoraqQuantizer(config, pre_quantized=True)
    config.recipe = _recipe_of(model)
    model.register_to_config(quantization_config=config)
    model.hf_quantizer, model.quantization_method = quantizer, config.quant_method


def _recipe_of(model: nn.Module) -> Recipe | None:
    """Return the recipe that most layers of a model note, if this version can read it."""
    noted = [layer.record.get("recipe") for layer in quantized_layers(model).values()]
    counted = Counter(json.dumps(recipe) for recipe in noted if recipe).most_common(1)
    try:
        return Recipe.from_dict(json.loads(counted[0][0])) if counted else None
    except LoraqError:
        return None
