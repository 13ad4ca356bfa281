"""Quantize files without ever building the float model, load what was written, draw with it.

python examples/from_files.py            the trained digits of this repository
python examples/from_files.py SOURCE     a whole pipeline: a folder, or a name on the hub
"""

import argparse
import json
from pathlib import Path

import diffusers
import torch
from PIL import Image

import loraq
import loraq.diffusers  # from here on diffusers' own `from_pretrained` knows such folders
from loraq.evaluation.digits import sample, transformer_folder


def draw(folder: Path, prompt: str, call: dict) -> Image.Image:
    """Return a picture by what a quantized folder holds: a pipeline, or the digits' transformer."""
    if not (folder / "model_index.json").exists():
        model = diffusers.PixArtTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16)
        digits = sample(model.eval(), torch.arange(10), seed=0).squeeze(1)
        pixels = torch.cat([*digits], dim=1).add(1).mul(127.5).byte()
        return Image.fromarray(pixels.numpy()).resize((960, 96), Image.Resampling.NEAREST)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    return pipeline(prompt, generator=torch.Generator("cpu").manual_seed(0), **call).images[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Quantize files, load them, draw with them.")
    parser.add_argument("source", nargs="?", help="folder or name on the hub")
    parser.add_argument("--out", type=Path, default=Path("quantized"), help="folder to make")
    parser.add_argument("--recipe", default="int4-a16+w8a8", help="`loraq formats` lists names")
    parser.add_argument("--budget", default="5", help="bits for each weight, branch included")
    parser.add_argument("--prompt", default="a red fox in the snow")
    parser.add_argument("--call", type=json.loads, default={}, help="of the pipeline, as JSON")
    asked = parser.parse_args()
    recipe = loraq.Recipe.of(asked.recipe).adjusted(budget=asked.budget, effort="fast")
    # One tensor is in memory at a time. Killed? The same call goes on, and ends in the same bytes.
    source = asked.source or transformer_folder()
    report = loraq.quantize_checkpoint(source, asked.out, recipe)
    print(f"{report.plan.bits_per_weight:.2f} bits for each weight of {len(report.layers)} layers")
    picture = asked.out.with_name(f"{asked.out.name}.png")
    draw(asked.out, asked.prompt, asked.call).save(picture)
    print(f"Drawn by the quantized model: {picture}")
