"""Quantize a model that is in memory, run it, and compare it with the float model.

python examples/in_memory.py              the trained digits of this repository
python examples/in_memory.py PIPELINE     a pipeline of diffusers: a folder, or a name on the hub
"""

import argparse
import json

import diffusers
import numpy as np
import torch

import loraq
from loraq.evaluation.digits import load_transformer, sample

#: INT4 weights with an 8-bit branch, 5 bits for each weight in all, activations as they are.
RECIPE, OPTIONS = "int4-a16+w8a8", {"budget": 5, "effort": "fast"}


def draw_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the ten digits as the float model draws them, and as the quantized one does."""
    model, labels = load_transformer(torch.float32), torch.arange(10)
    before = sample(model, labels, seed=0)
    report = loraq.quantize_(model, RECIPE, **OPTIONS)  # in place; the float weights are gone
    print(f"{report.plan.bits_per_weight:.2f} bits for each weight of {len(report.layers)} layers")
    print(f"mean relative error of the weights: {report.mean_relative_error:.4f}")
    return before.numpy(), sample(model, labels, seed=0).numpy()


def draw_prompt(name: str, prompt: str, call: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the picture of a pipeline before and after its transformers are quantized."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(name, dtype=torch.bfloat16).to(device)

    def picture() -> np.ndarray:
        seeded = torch.Generator("cpu").manual_seed(0)
        return pipeline(prompt, generator=seeded, output_type="np", **call).images[0]

    before = picture()
    for component, report in loraq.quantize_(pipeline, RECIPE, **OPTIONS).items():
        print(f"{component}: {report.plan.bits_per_weight:.2f} bits for each weight")
    return before, picture()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Quantize a model in memory, and run it.")
    parser.add_argument("pipeline", nargs="?", help="folder or name on the hub")
    parser.add_argument("--prompt", default="a red fox in the snow")
    parser.add_argument("--call", type=json.loads, default={}, help="of the pipeline, as JSON")
    asked = parser.parse_args()
    if asked.pipeline:
        first, second = draw_prompt(asked.pipeline, asked.prompt, asked.call)
    else:
        first, second = draw_digits()
    print(f"mean difference of the pictures: {100 * abs(first - second).mean():.2f} %")
