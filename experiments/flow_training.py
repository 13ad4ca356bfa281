"""Train a transformer of the PixArt family as a rectified flow on a CPU, so that it can be stopped.

Started again, a training goes on after its last checkpoint and ends at the same bytes.
"""

import argparse
import copy
import json
import lzma
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from loraq.evaluation.flow import interpolate, predict_velocity
from train_digits import build_transformer, say

WARMUP_STEPS = 100


class Draw(NamedTuple):
    """What is learned."""

    #: Images and their labels, for a number of them and a generator.
    images: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    #: Caption tokens of labels.
    captions: Callable[[Tensor], Tensor]
    #: Label of the empty caption.
    null_label: int


class Training:
    """The state of a training run: weights, their average, the optimizer, finished steps."""

    def __init__(self, config: dict[str, object], settings: dict[str, float], draw: Draw) -> None:
        torch.manual_seed(int(settings["seed"]))
        self.settings = settings
        self.draw = draw
        self.done = 0
        self.model = build_transformer(config).train()
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

    def step(self) -> float:
        """Take one step and return its loss.

        All randomness comes from the seed and the number of the step.
        """
        batch, steps = int(self.settings["batch"]), int(self.settings["steps"])
        generator = torch.Generator().manual_seed(
            int(self.settings["seed"]) * 1_000_003 + self.done
        )
        images, labels = self.draw.images(batch, generator)
        times = torch.randn(batch, generator=generator).sigmoid()
        noise = torch.randn(images.shape, generator=generator)
        labels = torch.where(
            torch.rand(batch, generator=generator) < 0.1, self.draw.null_label, labels
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
                self.model, interpolate(images, noise, times), times, self.draw.captions(labels)
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
        losses: list[float] = []
        start = time.monotonic()
        while self.done < until:
            losses.append(self.step())
            if self.done % 25 == 0:
                seconds = (time.monotonic() - start) / len(losses)
                say(
                    f"step {self.done}/{until}  loss {sum(losses[-25:]) / len(losses[-25:]):.4f}  "
                    f"{seconds:.2f} s/step  {seconds * (until - self.done) / 60:.0f} min left"
                )
            if self.done % every == 0 or self.done == until:
                self.save(checkpoint)


def write_assets(model: nn.Module, config: dict[str, object], folder: Path) -> None:
    """Write the averaged weights in bf16, compressed without loss: exponents compress well."""
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in model.named_parameters()}
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 1, "pb": 1}]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    packed = lzma.compress(save(tensors), format=lzma.FORMAT_XZ, filters=filters)
    (folder / "transformer.safetensors.xz").write_bytes(packed)


def train(
    config: dict[str, object], draw: Draw, *, steps: int, batch: int, out: Path, assets: Path
) -> None:
    """Train as the command line says, or to the end of an earlier run, and write the assets.

    Args:
        config: of the transformer.
        draw: what is learned.
        steps: planned steps, unless the command line says otherwise.
        batch: images of a step, likewise.
        out: folder of the checkpoint, likewise.
        assets: where the weights go.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--steps", type=int, default=steps, help="planned steps, which fix the learning rates"
    )
    parser.add_argument(
        "--until", type=int, help="stop at this step and take the weights as they are"
    )
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=out, help="folder of the checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {name: getattr(args, name) for name in ("seed", "steps", "batch", "learning_rate")}
    training = Training(config, settings, draw)
    checkpoint = args.out / "checkpoint.safetensors"
    if checkpoint.exists():
        training.resume(checkpoint)
        say(f"going on after step {training.done}")
    training.run(args.until or args.steps, checkpoint)
    write_assets(training.average, config, assets)
