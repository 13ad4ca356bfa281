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

import argparse
import copy
import json
import lzma
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.worlds import patches
from loraq.evaluation import digits
from loraq.evaluation.flow import interpolate, predict_velocity
from train_digits import build_transformer, say

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
WARMUP_STEPS = 100


class Training:
    """The state of a training run: weights, their average, the optimizer, finished steps."""

    def __init__(self, settings: dict[str, float]) -> None:
        torch.manual_seed(int(settings["seed"]))
        self.settings = settings
        self.done = 0
        self.model = build_transformer(TRANSFORMER).train()
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings["learning_rate"], weight_decay=0.01, fused=True
        )
        # What the first step would create, so that a checkpoint can fill it.
        for parameter in self.model.parameters():
            moments = {
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that changes during training, by name."""
        named = {f"average.{name}": tensor for name, tensor in self.average.named_parameters()}
        for name, parameter in self.model.named_parameters():
            named[f"model.{name}"] = parameter.detach()
            named |= {
                f"{key}.{name}": tensor for key, tensor in self.optimizer.state[parameter].items()
            }
        return named

    def save(self, file: Path) -> None:
        """Write a checkpoint that is whole or not there."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        save_file(
            self.tensors(), partial, {"done": str(self.done), "settings": json.dumps(self.settings)}
        )
        partial.replace(file)

    def resume(self, file: Path) -> None:
        """Continue from a checkpoint, which must be of the same settings."""
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
            if json.loads(metadata["settings"]) != self.settings:
                raise SystemExit(
                    f"'{file}' is a checkpoint of {metadata['settings']}, not of "
                    f"{json.dumps(self.settings)}. Give the same settings, or another --out."
                )
            for name, tensor in self.tensors().items():
                tensor.copy_(stored.get_tensor(name))
        self.done = int(metadata["done"])

    def step(self, parts: list[Tensor]) -> float:
        """Take one step and return its loss.

        All randomness comes from the seed and the number of the step.
        """
        batch, steps = int(self.settings["batch"]), int(self.settings["steps"])
        generator = torch.Generator().manual_seed(
            int(self.settings["seed"]) * 1_000_003 + self.done
        )
        images, labels = patches.cut_patches(parts, batch, generator)
        times = torch.randn(batch, generator=generator).sigmoid()
        noise = torch.randn(images.shape, generator=generator)
        labels = torch.where(
            torch.rand(batch, generator=generator) < 0.1, patches.NULL_LABEL, labels
        )
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.done / steps))
        rate = self.settings["learning_rate"] * min(1, (self.done + 1) / WARMUP_STEPS) * cosine
        self.optimizer.param_groups[0]["lr"] = rate
        # The other back ends train slower.
        with (
            torch.autocast("cpu", torch.bfloat16),
            sdpa_kernel(SDPBackend.MATH),
        ):
            velocity = predict_velocity(
                self.model, interpolate(images, noise, times), times, patches.class_tokens(labels)
            )
        loss = F.mse_loss(velocity, noise - images)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(0.999, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), 1 - decay
            )
        self.done += 1
        return loss.item()

    def run(self, until: int, checkpoint: Path, every: int = 100) -> None:
        """Train up to a step, with a checkpoint now and then and at the end."""
        parts = patches.photographs(heldout=False)
        losses: list[float] = []
        start = time.monotonic()
        while self.done < until:
            losses.append(self.step(parts))
            if self.done % 25 == 0:
                seconds = (time.monotonic() - start) / len(losses)
                say(
                    f"step {self.done}/{until}  loss {sum(losses[-25:]) / len(losses[-25:]):.4f}  "
                    f"{seconds:.2f} s/step  {seconds * (until - self.done) / 60:.0f} min left"
                )
            if self.done % every == 0 or self.done == until:
                self.save(checkpoint)


def write_assets(model: nn.Module) -> None:
    """Write the averaged weights in bf16, compressed without loss: exponents compress well."""
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in model.named_parameters()}
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 1, "pb": 1}]
    patches.ASSETS.mkdir(parents=True, exist_ok=True)
    (patches.ASSETS / "config.json").write_text(json.dumps(TRANSFORMER, indent=2) + "\n")
    packed = lzma.compress(save(tensors), format=lzma.FORMAT_XZ, filters=filters)
    (patches.ASSETS / "transformer.safetensors.xz").write_bytes(packed)


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=1500, help="planned steps, which fix the learning rates"
    )
    parser.add_argument(
        "--until", type=int, help="stop at this step and take the weights as they are"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path("studies/patches"), help="folder of the checkpoint"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {name: getattr(args, name) for name in ("seed", "steps", "batch", "learning_rate")}
    training = Training(settings)
    checkpoint = args.out / "checkpoint.safetensors"
    if checkpoint.exists():
        training.resume(checkpoint)
        say(f"going on after step {training.done}")
    training.run(args.until or args.steps, checkpoint)
    write_assets(training.average)
    print(json.dumps(measure(), indent=2))


if __name__ == "__main__":
    main()
