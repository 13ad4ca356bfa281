"""How fast are a block and a denoising step of PixArt-Sigma, quantized, against bf16?

Reading guide: a PixArt transformer of real width (1152) with random weights, batch 1, one forward.
"block" has one block, "step" all 28, both with their embeddings. Every linear layer inside the
blocks is quantized; attention and norms are not and cap the gain. All contenders run in turn in one
process; "ms" is the median wall time with its quartiles, "x bf16" is how many times faster than the
bf16 model (more is better), "MiB" is the memory of weights and of what the back end keeps, and
"peak", on a GPU, what the forward takes on top.

    python -m benchmarks.speed.block --threads 2 --save
"""

import copy
from statistics import median

import torch
from torch import nn

from benchmarks.record import DEVICE, device_of, options, report
from benchmarks.timing import interleaved_seconds, peak_mib, spread
from benchmarks.worlds.random_layers import quantize_randomly
from loraq.layers import quantized_layers
from loraq.recipe_names import parse_scheme

CONTENDERS = (
    ("resident a16", "mxfp4-a16+w8a8-r64", "resident"),
    ("low_memory a16", "mxfp4-a16+w8a8-r64", "low_memory"),
    ("int8_row", "int4-a8+int8-r64", "int8_row"),
)
#: Only on a GPU: emulated elsewhere.
ON_GPU = (
    ("fp8_row", "mxfp4-amxfp8_e4m3+w8a8-r64", "fp8_row"),
    ("triton", "mxfp4-amxfp8_e4m3+mxfp8_e4m3-r64", "triton"),
)
#: Of all contenders.
BACKENDS = tuple(dict.fromkeys(backend for _, _, backend in CONTENDERS + ON_GPU))


def main() -> None:
    """Print a table and the JSON line."""
    chosen = options(
        __doc__,
        step="also the whole step of 28 blocks (2 GB of weights for each contender)",
        quick="a tiny model",
        device=DEVICE,
        backends=(BACKENDS, "back ends to measure (default: all)"),
    )
    device = device_of(chosen.device)
    rows: list[dict[str, object]] = []
    heads, side = (2, 8) if chosen.quick else (16, 64)
    deep = 2 if chosen.quick else 28
    wanted = [
        one
        for one in CONTENDERS + (ON_GPU if device.type == "cuda" else ())
        if one[2] in chosen.backends
    ]
    for what, n_blocks in (("block", 1), ("step", deep)) if chosen.step else (("block", 1),):
        for row in measure(pixart(n_blocks, heads, side), side, wanted, chosen.repeats, device):
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


def inputs(side: int, device: torch.device) -> dict[str, object]:
    """Return what the transformer is called with, for one image."""
    return {
        "hidden_states": torch.randn(1, 4, side, side, dtype=torch.bfloat16, device=device),
        "encoder_hidden_states": torch.randn(1, 120, 256, dtype=torch.bfloat16, device=device),
        "timestep": torch.tensor([500], device=device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


@torch.no_grad()
def measure(
    plain: nn.Module,
    side: int,
    contenders: list[tuple[str, str, str]],
    repeats: int,
    device: torch.device,
) -> list[dict[str, object]]:
    """Return one row for every contender."""
    plain = plain.to(device).eval()
    models = {"bf16": plain}
    for label, recipe, backend in contenders:
        models[label] = copy.deepcopy(plain)
        quantize_randomly(models[label].transformer_blocks, parse_scheme(recipe), backend)
    given = inputs(side, device)
    runs = {label: (lambda model=model: model(**given)) for label, model in models.items()}
    seconds = interleaved_seconds(runs, repeats, device)
    base, rows = median(seconds["bf16"]), []
    for label, model in models.items():
        low, middle, high = (1e3 * value for value in spread(seconds[label]))
        kept = sum(layer.kept_nbytes for layer in quantized_layers(model).values())
        nbytes = kept + sum(p.numel() * p.element_size() for p in model.parameters())
        row: dict[str, object] = {"contender": label, "ms": middle, "ms_low": low, "ms_high": high}
        row |= {"times_bf16": base / median(seconds[label]), "mib": nbytes / 2**20}
        rows.append({**row, "peak_mib": peak_mib(runs[label], device)})
    return rows


if __name__ == "__main__":
    main()
