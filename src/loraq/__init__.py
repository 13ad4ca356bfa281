"""Data-free 4-bit quantization of diffusion transformers: an optimized, quantized branch (LoRaQ).

The public names below are imported on first use, so that `import loraq` and `loraq --help` stay
light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loraq.version import __version__ as __version__

if TYPE_CHECKING:
    from loraq.budget import Budget
    from loraq.checkpoint import load_into, save
    from loraq.checkpoint.floats import dequantize_
    from loraq.checkpoint.stats_file import load_stats, save_stats
    from loraq.errors import LoraqError
    from loraq.exports.importing import import_checkpoint
    from loraq.exports.run import export, plan_export
    from loraq.formats import QTensor, get_format
    from loraq.integrations.absorb import absorb_lora
    from loraq.integrations.activations import ActivationSchedule, set_activations
    from loraq.integrations.append import append_lora, remove_lora
    from loraq.integrations.checkpoints import quantize_checkpoint
    from loraq.integrations.diffusers import load
    from loraq.integrations.models import quantize, quantize_
    from loraq.integrations.pipelines import collect_pipeline_stats
    from loraq.layers import set_backend
    from loraq.nn import QuantizedLinear
    from loraq.packed import LayerSolution, PackedWeight
    from loraq.pipeline.collect import collect_stats
    from loraq.pipeline.module import plan_model, quantize_weight
    from loraq.recipe import Recipe
    from loraq.rules import Rule
    from loraq.scheme import Branch, Scheme
    from loraq.stats import ActivationStats

_HOMES = {
    "ActivationSchedule": "loraq.integrations.activations",
    "ActivationStats": "loraq.stats",
    "Branch": "loraq.scheme",
    "Budget": "loraq.budget",
    "LayerSolution": "loraq.packed",
    "LoraqError": "loraq.errors",
    "PackedWeight": "loraq.packed",
    "QTensor": "loraq.formats",
    "QuantizedLinear": "loraq.nn",
    "Recipe": "loraq.recipe",
    "Rule": "loraq.rules",
    "Scheme": "loraq.scheme",
    "absorb_lora": "loraq.integrations.absorb",
    "append_lora": "loraq.integrations.append",
    "collect_pipeline_stats": "loraq.integrations.pipelines",
    "collect_stats": "loraq.pipeline.collect",
    "dequantize_": "loraq.checkpoint.floats",
    "export": "loraq.exports.run",
    "get_format": "loraq.formats",
    "import_checkpoint": "loraq.exports.importing",
    "load": "loraq.integrations.diffusers",
    "load_into": "loraq.checkpoint",
    "load_stats": "loraq.checkpoint.stats_file",
    "plan_export": "loraq.exports.run",
    "plan_model": "loraq.pipeline.module",
    "quantize": "loraq.integrations.models",
    "quantize_": "loraq.integrations.models",
    "quantize_checkpoint": "loraq.integrations.checkpoints",
    "quantize_weight": "loraq.pipeline.module",
    "remove_lora": "loraq.integrations.append",
    "save": "loraq.checkpoint",
    "save_stats": "loraq.checkpoint.stats_file",
    "set_activations": "loraq.integrations.activations",
    "set_backend": "loraq.layers",
}

__all__ = [
    "ActivationSchedule",
    "ActivationStats",
    "Branch",
    "Budget",
    "LayerSolution",
    "LoraqError",
    "PackedWeight",
    "QTensor",
    "QuantizedLinear",
    "Recipe",
    "Rule",
    "Scheme",
    "absorb_lora",
    "append_lora",
    "collect_pipeline_stats",
    "collect_stats",
    "dequantize_",
    "export",
    "get_format",
    "import_checkpoint",
    "load",
    "load_into",
    "load_stats",
    "plan_export",
    "plan_model",
    "quantize",
    "quantize_",
    "quantize_checkpoint",
    "quantize_weight",
    "remove_lora",
    "save",
    "save_stats",
    "set_activations",
    "set_backend",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'loraq' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
