"""What stands in the JSON files beside the weights of a model of diffusers or transformers.

Nothing here knows these libraries: a model that says what it is in their ways is served.
"""

import json
from typing import Any

from torch import nn

#: How a language model generates text. Users change it, so its hash is not taken.
GENERATION_FILE = "generation_config.json"


def model_config(model: nn.Module) -> dict[str, object]:
    """Return the configuration of a model of diffusers or transformers.

    It says that the model is quantized, so that nothing loads it as floats.
    """
    to_json = getattr(model, "to_json_string", None)
    if to_json is not None:
        return add_quantization_config(json.loads(to_json()))
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        return {}
    # What `save_pretrained` of transformers adds; the dtype is that of the file, and said once.
    plain = _without_dtypes(json.loads(config.to_json_string()))
    plain |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).split(".")[1]}
    return add_quantization_config(plain)


def _without_dtypes(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_dtypes(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name != "dtype"
    }


def generation_config(model: nn.Module) -> dict[str, Any]:
    """Return how a model of transformers generates text; empty for a model that does not."""
    config: Any = getattr(model, "generation_config", None)
    can_generate: Any = getattr(model, "can_generate", None)
    return json.loads(config.to_json_string()) if config and can_generate() else {}


def add_quantization_config(config: dict[str, object]) -> dict[str, object]:
    """Return a configuration that says it is quantized.

    It is sorted, so that all ways write the same bytes.

    Where the float weights were on this machine (`_name_or_path`) is left out: the same weights
    give the same file.
    """
    config = {**config, "quantization_config": {"quant_method": "loraq"}}
    return {name: config[name] for name in sorted(config) if name != "_name_or_path"}


def weights_stem(config: dict[str, object]) -> str:
    """Return what the weight files of a model with this configuration are called."""
    return "diffusion_pytorch_model" if "_class_name" in config else "model"
