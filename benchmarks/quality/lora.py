"""Does a LoRA do on a quantized model what it does on the float model, loaded on top or absorbed?

    python -m benchmarks.quality.lora      # 1 minute on one core; needs `pip install "loraq[lora]"`

A SANA transformer of random weights (128 wide, two transformer blocks) and a random LoRA of rank 4
on its attention projections. `change error` is ‖Δ_quantized − Δ_float‖ / ‖Δ_float‖, Δ being what
the LoRA does to the output; `output error` is that of the quantized model without any LoRA, and is
what the change error has to be read against. Random weights say that it works; they say nothing
about a trained LoRA's look.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import diffusers
import peft
import torch
from torch import Tensor, nn

import loraq
import loraq.diffusers
from loraq.recipe import Recipe

RECIPES = ("mxint8", "mxfp4-a8+w8a8-r16", "mxfp4+w8a8-r16", "mxfp4")


def transformer() -> nn.Module:
    """Return the float model, the same each time."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 32, "num_cross_attention_heads": 4}
    sizes |= {
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 128,
        "caption_channels": 64,
        "num_layers": 2,
    }
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, sample_size=16, patch_size=1, **sizes
    ).eval()


def output(model: nn.Module) -> Tensor:
    """Return one forward on seeded latents and text."""
    generator = torch.Generator().manual_seed(1)
    latents, text = (
        torch.randn(2, 4, 16, 16, generator=generator),
        torch.randn(2, 8, 64, generator=generator),
    )
    with torch.no_grad():
        return model(latents, text, torch.tensor([100.0, 800.0]), return_dict=False)[0]


def relative(difference: Tensor, reference: Tensor) -> float:
    """Return the norm of a difference as a share of a reference's."""
    return (difference.norm() / reference.norm()).item()


def main() -> None:
    """Print one row for each recipe."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        source, lora = Path(place) / "float", Path(place) / "lora"
        model = transformer()
        model.save_pretrained(source)
        exact = output(model)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        torch.manual_seed(2)
        model.add_adapter(
            peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
        )
        model.save_lora_adapter(lora)
        change = output(model) - exact
        print(
            f"The LoRA changes the float model's output by {relative(change, exact):.3f} of its "
            f"norm.\n"
        )
        print(
            "recipe               output error   change error, loaded   absorbed   absorb: layers, "
            "s a layer"
        )
        for name in RECIPES:
            loaded, absorbed = (type(model).from_pretrained(source) for _ in range(2))
            recipe = replace(Recipe.named(name), effort="fast")
            for quantized in (loaded, absorbed):
                loraq.quantize_(quantized, recipe, progress=False)
            before = output(loaded)
            loaded.load_lora_adapter(lora, prefix=None, use_safetensors=True)
            on_top = output(loaded) - before
            begin = time.perf_counter()
            report = loraq.absorb_lora(absorbed, lora, source, progress=False)
            seconds = (time.perf_counter() - begin) / len(report.layers)
            inside = output(absorbed) - before
            errors = (relative(on_top - change, change), relative(inside - change, change))
            print(
                f"{name:20} {relative(before - exact, exact):12.4f} {errors[0]:22.4f} "
                f"{errors[1]:10.4f} {len(report.layers):16} {seconds:11.2f}"
            )


if __name__ == "__main__":
    main()
