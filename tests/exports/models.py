"""The models that are exported in tests: tiny ones, and the PixArt that ships with loraq."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loraq
from loraq.evaluation.digits import transformer_folder
from loraq.integrations.diffusers import _quiet_diffusers, load_float
from loraq.layers import linear_layers, matrix_of, quantized_layers
from loraq.recipe import Recipe
from loraq.transforms import unrotate

FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 12, 16],
    "guidance_embeds": False,
}
SANA: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 1,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 128,
    "caption_channels": 64,
    "mlp_ratio": 2.0,
    "sample_size": 8,
    "patch_size": 1,
}


@dataclass(frozen=True)
class Model:
    """A float model, and inputs for its forward."""

    class_name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def _seeded(name: str) -> nn.Module:
    with _quiet_diffusers() as diffusers:
        torch.manual_seed(0)
        config = FLUX if name.startswith("Flux") else SANA
        model = getattr(diffusers, name)(**config).eval()
    with torch.no_grad():
        for layer in linear_layers(model).values():
            matrix = matrix_of(layer)
            # As trained weights have it: a few directions that stand out, for a branch to take.
            n_out, n_in = matrix.shape
            large = torch.randn(n_out, 4) @ torch.randn(4, n_in)
            matrix += large * (1.5 * matrix.norm() / large.norm())
    return model


MODELS = {
    "flux": Model(
        "FluxTransformer2DModel",
        lambda: copy.deepcopy(_seeded("FluxTransformer2DModel")),
        lambda: {
            "hidden_states": _rand(1, 16, 16),
            "encoder_hidden_states": _rand(1, 8, 64, seed=1),
            "pooled_projections": _rand(1, 32, seed=2),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(8, 3),
        },
    ),
    "sana": Model(
        "SanaTransformer2DModel",
        lambda: copy.deepcopy(_seeded("SanaTransformer2DModel")),
        lambda: {
            "hidden_states": _rand(1, 4, 8, 8),
            "encoder_hidden_states": _rand(1, 7, 64, seed=1),
            "timestep": torch.tensor([500]),
        },
    ),
    "pixart": Model(
        "PixArtTransformer2DModel",
        lambda: nn.Module.to(load_float(transformer_folder()), torch.float32),
        lambda: {
            "hidden_states": _rand(2, 1, 8, 8),
            "encoder_hidden_states": _rand(2, 1, 64, seed=1),
            "timestep": torch.tensor([500, 500]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
}


def save_quantized(name: str, recipe: str | dict[str, Any], folder: Path) -> nn.Module:
    """Quantize a model by a fast method, save it, and return it."""
    model = MODELS[name].build()
    asked = {"scheme": recipe} if isinstance(recipe, str) else recipe
    made = Recipe.from_dict({"method": "svdquant", "keep": "float", **asked})
    loraq.quantize_(model, made, progress=False)
    loraq.save(model, folder)
    return model


def exact_output(model: nn.Module, name: str, *, branch: bool = True) -> Tensor:
    """Return the exact weight-only forward in fp32, with the branches or without."""
    dense = copy.deepcopy(model)
    loraq.dequantize_(dense)
    if not branch:
        for layer_name, layer in quantized_layers(model).items():
            weight = dense.get_submodule(layer_name).weight
            with torch.no_grad():
                main = unrotate(layer.packed.main.dequantize(), layer.scheme.rotation)
                weight.copy_(main.view(weight.shape))
    return output(nn.Module.to(dense, torch.float32), name)


def output(model: nn.Module, name: str) -> Tensor:
    """Return what a model makes of its inputs."""
    with torch.no_grad():
        return model(**MODELS[name].inputs(), return_dict=False)[0].float()


def distance(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm())
