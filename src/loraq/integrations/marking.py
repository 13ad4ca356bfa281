"""What a quantized model says of itself, however it came to be quantized."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from loraq.errors import LoraqError
from loraq.integrations.dtypes import is_of_transformers
from loraq.layers import bare_model, quantized_layers
from loraq.recipe import Recipe


def mark_quantized(model: nn.Module) -> None:
    """Put the models in a module that have quantized layers into the state of a loaded one.

    That is what `from_pretrained` leaves: `is_quantized`, `hf_quantizer`, `quantization_method` and
    `config.quantization_config`. Modules that are models neither of diffusers nor of transformers
    are left as they are; of transformers' models, which are made of models, the outermost says it.
    """
    marked: list[str] = []
    for name, part in bare_model(model).named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer in marked)
        if hasattr(part, "register_to_config") and quantized_layers(part):
            _mark(part)
        elif is_of_transformers(part) and quantized_layers(part) and not inside:
            marked.append(name)
            _mark_transformers(part)


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


def _mark_transformers(model: Any) -> None:
    model.is_quantized = True
    try:
        from loraq.integrations.config import LoraqConfig
        from loraq.integrations.hf_quantizer import LoraqHfQuantizer
    except (ImportError, AttributeError):
        return

    config = LoraqConfig()
    quantizer = LoraqHfQuantizer(config, pre_quantized=True)
    config.recipe = _recipe_of(model)
    model.config.quantization_config = config
    model.hf_quantizer, model.quantization_method = quantizer, config.quant_method


def note_origin(model: Any, folder: Path) -> None:
    """Note in a model where it was loaded from, as `from_pretrained` does."""
    if is_of_transformers(model):
        model.config.name_or_path = str(folder)
    else:
        model.register_to_config(_name_or_path=str(folder))


def _recipe_of(model: nn.Module) -> Recipe | None:
    """Return the recipe that most layers of a model note, if this version can read it."""
    noted = [layer.record.get("recipe") for layer in quantized_layers(model).values()]
    counted = Counter(json.dumps(recipe) for recipe in noted if recipe).most_common(1)
    try:
        return Recipe.from_dict(json.loads(counted[0][0])) if counted else None
    except LoraqError:
        return None
