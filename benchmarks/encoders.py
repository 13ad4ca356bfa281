"""Which classes of transformers the pipelines of diffusers name, and what becomes of their layers.

`benchmarks.architectures` makes the second half of docs/architectures.md of them.
"""

import inspect
import math
import re
import typing
import warnings
from collections import Counter
from typing import Any

import torch
from torch import nn

from benchmarks.pages import table
from loraq.pipeline.plan import Plan
from loraq.recipe import Recipe

#: Classes that are only named for what is derived from them, and the one that is meant.
ABSTRACT = {"Gemma2PreTrainedModel": "Gemma2Model", "GemmaPreTrainedModel": "GemmaModel"}

#: Classes that have nothing to quantize, and why.
NOTHING = {
    "GPT2LMHeadModel": "its matrices are `Conv1D`, stored transposed, and no linear layers",
    "SpeechT5HifiGan": "a vocoder of convolutions",
}

#: Settings of models that pipelines use; the other classes have their default configuration.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "T5 v1.1 XXL (FLUX.1, SD3, PixArt)": (
        "T5EncoderModel",
        {
            "vocab_size": 32128,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "UMT5 XXL (Wan)": (
        "UMT5EncoderModel",
        {
            "vocab_size": 256384,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
        },
    ),
    "CLIP L/14 (SD, SDXL, FLUX.1)": (
        "CLIPTextModel",
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
    ),
    "CLIP bigG/14 (SDXL, SD3)": (
        "CLIPTextModelWithProjection",
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
        },
    ),
    "Gemma 2 2B (SANA)": ("Gemma2Model", {}),
    "Qwen 3 4B (FLUX.2 klein, Z-Image)": (
        "Qwen3ForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
}

INTRO = """
## Text encoders

Every class of transformers that a pipeline of diffusers names in its constructor, found by the
annotations there, in its default configuration, planned with the same recipe. A test quantizes,
runs, saves and loads each of them at a small size, from files and in memory, by all loaders, bit
for bit. Every layer is weight-only. Embeddings are tables and stay, and what shares its weight with
one stays with it.
"""


def encoder_classes() -> dict[str, type[nn.Module]]:
    """Return the classes of transformers that pipelines of the installed diffusers name."""
    import diffusers
    import transformers

    found: dict[str, type[nn.Module]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipelines = [getattr(diffusers, name, None) for name in dir(diffusers)]
        for pipeline in pipelines:
            if isinstance(pipeline, type) and issubclass(pipeline, diffusers.DiffusionPipeline):
                for hint in typing.get_type_hints(pipeline.__init__).values():
                    for kind in _flatten(hint):
                        if issubclass(kind, transformers.PreTrainedModel):
                            found[kind.__name__] = kind
    found.pop("PreTrainedModel", None)
    for abstract, meant in ABSTRACT.items():
        if abstract in found:
            del found[abstract]
            found[meant] = getattr(transformers, meant)
    ours = {name for name, kind in found.items() if kind.__module__.startswith("transformers.")}
    return {name: found[name] for name in sorted(ours)}


def _flatten(hint: Any) -> list[type]:
    inner = typing.get_args(hint)
    if inner:
        return [kind for each in inner for kind in _flatten(each)]
    return [hint] if inspect.isclass(hint) else []


def config_of(kind: Any, settings: dict[str, Any]) -> Any:
    """Return the configuration of a class; encoders of a larger model have that of the encoder."""
    import transformers

    whole = {"T5Gemma2Encoder": "T5Gemma2Config"}.get(kind.__name__, kind.config_class.__name__)
    config = getattr(transformers, whole)(**settings)
    if kind.__name__ in ("T5GemmaEncoder", "T5Gemma2Encoder"):
        return config.encoder
    if kind.__name__ == "T5GemmaEncoderModel":
        config.is_encoder_decoder = False
    return config


def empty_encoder(kind: Any, settings: dict[str, Any]) -> nn.Module:
    """Return a model on the meta device, of the default configuration but for some settings."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = kind(config_of(kind, settings))
    return model


def section(recipe: Recipe) -> list[str]:
    """Return the section on text encoders of docs/architectures.md."""
    classes = encoder_classes()
    rows = {
        name: empty_encoder(classes[kind], settings) for name, (kind, settings) in PUBLISHED.items()
    }
    lines = [INTRO]
    headings = ["parameters", "layers", "4-bit", "tables and others", "kept, and why"]
    of_classes = {
        f"`{name}`": empty_encoder(kind, {})
        for name, kind in classes.items()
        if name not in NOTHING
    }
    for first, models in (("published model", rows), ("class", of_classes)):
        body = [[name, *_cells(model, recipe)] for name, model in models.items()]
        lines += table([first, *headings], body, "lrrrrl")
    lines += ["Nothing is quantized of:", ""]
    lines += [f"* `{name}`: {reason}." for name, reason in NOTHING.items()]
    return lines


def _cells(model: nn.Module, recipe: Recipe) -> list[str]:
    plan = Plan.of_model(model, recipe)
    total = sum(parameter.numel() for parameter in model.parameters())
    linear = sum(math.prod(layer.shape) for layer in plan.layers)
    quantized = sum(math.prod(layer.shape) for layer in plan.quantized)
    # What shares its weight with a table is counted there.
    tied = sum(math.prod(layer.shape) for layer in plan.kept if "shares" in layer.reason)
    kept = Counter(re.sub(r" with '.*", " with a table", layer.reason) for layer in plan.kept)
    return [
        f"{total / 1e9:.2f} B",
        f"{len(plan.quantized)} of {len(plan.layers)}",
        f"{quantized / total:.1%}",
        f"{1 - (linear - tied) / total:.1%}",
        "; ".join(f"{count} {reason}" for reason, count in kept.items()) or "–",
    ]
