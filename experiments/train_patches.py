"""Train the patches world of `benchmarks/worlds/patches.py`, on real photographs.

    PYTHONPATH=. python experiments/train_patches.py

Trains a `PixArtTransformer2DModel` (384 wide, 8 transformer blocks, 20 M parameters) as a rectified
flow on 32×32 patches of photographs, writes `benchmarks/assets/patches` and measures what it wrote.

Expected, with the defaults (40 CPU-minutes of one thread, 1.6 seconds a step):

    loss of the last 25 steps                              0.106 (many times near the middle)
    held-out loss                                          0.133 (uniform times: not to be compared)
    largest value of a layer's input / its rms             17 (median of the layers), 42 (most); digits 10, 24
    kurtosis of a layer's input                            13 (median of the layers), 51 (most); digits 10, 35

Stop it whenever you like: started again, it goes on after the last checkpoint and ends at the same
bytes.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.worlds import patches
from flow_training import Draw, train
from loraq.evaluation import digits
from loraq.evaluation.flow import interpolate, predict_velocity

TRANSFORMER = {
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "num_layers": 8,
    "patch_size": 4,
    "sample_size": patches.SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "cross_attention_dim": 384,
    "caption_channels": 64,
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000,
    "use_additional_conditions": False,
    "interpolation_scale": 1,
}


@torch.no_grad()
def measure() -> dict[str, float]:
    """Return the held-out loss, and how far activations stand out, here and in the digits."""
    model = patches.load_transformer(torch.float32)
    generator = torch.Generator().manual_seed(1)
    images, labels = patches.cut_patches(patches.photographs(heldout=True), 512, generator)
    times = torch.rand(512, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    velocity = predict_velocity(
        model, interpolate(images, noise, times), times, patches.class_tokens(labels)
    )
    small = digits.load_transformer(torch.float32)
    record = {"held-out loss": F.mse_loss(velocity, noise - images).item()}
    record |= {
        f"patches, {name}": value for name, value in outliers(model, patches.velocity_probe).items()
    }
    return record | {
        f"digits, {name}": value for name, value in outliers(small, digits.velocity_probe).items()
    }


def outliers(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> dict[str, float]:
    """Return how heavy the tails of the layers' inputs are: medians and maxima over layers."""
    found: dict[str, list[float]] = {
        "largest value / rms": [],
        "largest channel rms / median": [],
        "kurtosis": [],
    }

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float().flatten(0, -2)
        rms, channels = x.square().mean().sqrt(), x.square().mean(0).sqrt()
        found["largest value / rms"].append((x.abs().max() / rms).item())
        found["largest channel rms / median"].append((channels.max() / channels.median()).item())
        found["kurtosis"].append(((x - x.mean()) ** 4).mean().item() / x.var().item() ** 2)

    linears = [
        module
        for name, module in model.named_modules()
        if "blocks" in name and isinstance(module, nn.Linear)
    ]
    hooks = [module.register_forward_pre_hook(look) for module in linears]
    run(model)
    for hook in hooks:
        hook.remove()
    pairs = {"median": lambda values: sorted(values)[len(values) // 2], "most": max}
    return {
        f"{name}, {of}": round(f(values), 2)
        for name, values in found.items()
        for of, f in pairs.items()
    }


def main() -> None:
    """Train, write the assets, measure what was written."""
    parts = patches.photographs(heldout=False)
    draw = Draw(partial(patches.cut_patches, parts), patches.class_tokens, patches.NULL_LABEL)
    out = Path("studies/patches")
    train(TRANSFORMER, draw, steps=1500, batch=64, out=out, assets=patches.ASSETS)
    print(json.dumps(measure(), indent=2))


if __name__ == "__main__":
    main()
