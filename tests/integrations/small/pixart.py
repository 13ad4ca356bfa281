"""The PixArt and the Sana on which most tests of transformers run, and their outputs."""

from typing import Any

import torch
from torch import Tensor, nn

from loraq.integrations.diffusers import _quiet_diffusers

_BOTH: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 16,
}
PIXART = _BOTH | {
    "sample_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "use_additional_conditions": False,
}
#: Of a pipeline with a small PixArt: the smallest picture, and none of what is done to prompts.
CALL: dict[str, Any] = {
    "height": 32,
    "width": 32,
    "use_resolution_binning": False,
    "clean_caption": False,
    "max_sequence_length": 16,
}
SANA = _BOTH | {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
}


def small_pixart(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> nn.Module:
    """Return a PixArt with seeded weights, in a dtype to the last parameter."""
    return _build("PixArtTransformer2DModel", PIXART | changes, dtype)


def small_sana(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """Return a Sana with seeded weights, in a dtype to the last parameter."""
    return _build("SanaTransformer2DModel", SANA | changes, dtype)


def velocity(model: nn.Module) -> Tensor:
    """Return what a small PixArt makes of its small inputs, on its device."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    # What is offloaded waits on the meta device, and comes to the CPU.
    devices = (p.device for p in model.parameters() if not p.is_meta)
    device = next(devices, torch.device("cpu"))
    with torch.no_grad():
        return model(
            torch.linspace(-1, 1, 32).view(2, 1, 4, 4).to(device, dtype),
            encoder_hidden_states=torch.linspace(-1, 1, 96).view(2, 3, 16).to(device, dtype),
            timestep=torch.tensor([10.0, 500.0]).to(device),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]


def _build(name: str, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    with _quiet_diffusers() as diffusers:
        torch.manual_seed(0)
        # `nn.Module.to`, because that of diffusers keeps some parameters in fp32.
        return nn.Module.to(getattr(diffusers, name)(**config).eval(), dtype)
