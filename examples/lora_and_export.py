"""Put a LoRA onto a quantized model without its float weights, and write it for another engine.

python examples/lora_and_export.py                           the digits, and a random LoRA
python examples/lora_and_export.py FOLDER LORA --to TARGET   what loraq wrote, a LoRA's file
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

import loraq
from loraq.evaluation.digits import transformer_folder


def quantize_digits(folder: Path) -> Path:
    """Quantize the digits by a recipe that the target holds, and return the folder."""
    recipe = loraq.Recipe.of("sdnq").adjusted(
        budget=5, effort="fast"
    )  # the limits of the target are in it
    loraq.quantize_checkpoint(transformer_folder(), folder, recipe)
    return folder


def random_lora(path: Path, rank: int = 4) -> Path:
    """Write a LoRA of random numbers, which stands for one that was trained."""
    generator = torch.Generator().manual_seed(0)
    name = "transformer.transformer_blocks.0.attn1.to_q"
    factors = {
        f"{name}.lora_A.weight": torch.randn(rank, 192, generator=generator),
        f"{name}.lora_B.weight": torch.randn(192, rank, generator=generator) / 100,
    }
    save_file(factors, path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Append a LoRA, and export what comes of it.")
    parser.add_argument("folder", nargs="?", type=Path, help="that loraq wrote")
    parser.add_argument("lora", nargs="?", type=Path, help="a LoRA of its float model")
    parser.add_argument("--out", type=Path, default=Path("styled"), help="folder to make")
    parser.add_argument("--to", default="sdnq", help="`loraq export --list` lists the targets")
    asked = parser.parse_args()
    folder = asked.folder or quantize_digits(asked.out.with_name("digits"))
    lora = asked.lora or random_lora(asked.out.with_name("style.safetensors"))

    appended = loraq.append_lora(folder, lora, 0.8, target=asked.out)  # `remove_lora` undoes it
    print(f"{', '.join(appended.names)} on {len(appended.factors)} layers, {appended.nbytes} bytes")
    print(f"largest error of its product: {max(f.relative_error for f in appended.factors):.4f}")

    target = asked.out.with_name(f"{asked.out.name}-{asked.to}")
    exported = loraq.export(asked.out, target, to=asked.to)
    print(f"{target}: {exported.counts}; how to load it stands in its README.md")
