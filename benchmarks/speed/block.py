"""How fast are a block and a denoising step of PixArt-Sigma, quantized, against bf16?

Reading guide: a PixArt transformer of real width (1152) with random weights, batch 1, one forward.
"block" has one block, "step" all 28, both with their embeddings. Every linear layer inside the
blocks is quantized; attention and norms are not and cap the gain. All contenders run in turn in one
process; "ms" is the median wall time with its quartiles, "x bf16" is how many times faster than the
bf16 model (more is better), "MiB" is the memory of weights and of what the back end keeps.

    python -m benchmarks.speed.block --threads 2 --save
"""

import copy
from statistics import median

import torch
from torch import nn

from benchmarks.record import options, report
from benchmarks.timing import interleaved_seconds, spread
from benchmarks.worlds.random_layers import quantize_randomly
from loraq.layers import quantized_layers
from loraq.recipe_names import parse_scheme

CONTENDERS = (
    ("resident a16", "mxfp4-a16+w8a8-r64", "resident"),
    ("low_memory a16", "mxfp4-a16+w8a8-r64", "low_memory"),
    ("int8_row", "int4-a8+int8-r64", "int8_row"),
)
#: Only on a GPU: emulated elsewhere.
ON_GPU = (("fp8_row", "mxfp4-amxfp8_e4m3+w8a8-r64", "fp8_row"),)


def main() -> None:
    """Print a table and the JSON line."""
    chosen = options(
        __doc__,
        step="also the whole step of 28 blocks (2 GB of weights for each contender)",
        quick="a tiny model",
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, object]] = []
    heads, side = (2, 8) if chosen.quick else (16, 64)
    for what, n_blocks in (("block", 1), ("step", 28)) if chosen.step else (("block", 1),):
        for row in measure(n_blocks, heads, side, chosen.repeats, device):
            rows.append({"what": what, "tokens": (side // 2) ** 2, **row})
            quartiles = f"{row['ms_low']:.1f}-{row['ms_high']:.1f}"
            print(
                f"{what:6}{row['contender']:16}{row['ms']:10.1f} "
                f"ms{quartiles:>18}{row['times_bf16']:8.2f} x bf16{row['mib']:9.0f} MiB"
            )
    report(rows, save=chosen.save, device=device.type)


def pixart(n_blocks: int, heads: int, side: int) -> nn.Module:
    """Return a PixArt transformer with random weights in bf16."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=72,
        cross_attention_dim=heads * 72,
        num_layers=n_blocks,
        sample_size=side,
        caption_channels=256,
        use_additional_conditions=False,
    ).to(torch.bfloat16)


@torch.no_grad()
def measure(
    n_blocks: int, heads: int, side: int, repeats: int, device: torch.device
) -> list[dict[str, object]]:
    """Return one row for every contender."""
    plain = pixart(n_blocks, heads, side).to(device).eval()
    models = {"bf16": plain}
    for label, recipe, backend in CONTENDERS + (ON_GPU if device.type == "cuda" else ()):
        models[label] = copy.deepcopy(plain)
        quantize_randomly(models[label].transformer_blocks, parse_scheme(recipe), backend)
    latents = torch.randn(1, 4, side, side, dtype=torch.bfloat16, device=device)
    text = torch.randn(1, 120, 256, dtype=torch.bfloat16, device=device)
    time = torch.tensor([500], device=device)
    given = {"encoder_hidden_states": text, "timestep": time, "return_dict": False}
    given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    runs = {label: (lambda model=model: model(latents, **given)) for label, model in models.items()}
    seconds = interleaved_seconds(runs, repeats, device)
    base, rows = median(seconds["bf16"]), []
    for label, model in models.items():
        low, middle, high = (1e3 * value for value in spread(seconds[label]))
        kept = sum(layer.kept_nbytes for layer in quantized_layers(model).values())
        nbytes = kept + sum(p.numel() * p.element_size() for p in model.parameters())
        row: dict[str, object] = {"contender": label, "ms": middle, "ms_low": low, "ms_high": high}
        rows.append({**row, "times_bf16": base / median(seconds[label]), "mib": nbytes / 2**20})
    return rows


if __name__ == "__main__":
    main()
