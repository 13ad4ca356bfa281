"""Does streaming stay inside its memory limit, and how long do whole models take?

Checkpoints with the names, shapes and shards of published models are written with random bf16
weights, and quantized by the command `loraq quantize`, in its own process, as a user would. Reading
guide: "peak MB" is the most anonymous memory that the command and its workers held together (file
pages that the kernel can drop are not counted), and "tensor MB" is the largest weight in fp32. If
streaming works, the first follows the second and not the GB of the model.

A whole FLUX.1 takes hours on two cores. `--layers N` quantizes N layers, from the smallest to the
largest, and keeps the others in 16 bits: every byte of the checkpoint is still read, checked and
written, and "hours" tells what all layers would take on as many workers at the measured seconds per
weight.

    python -m benchmarks.speed.stream --layers 40 --save                  all three, a subset
    python -m benchmarks.speed.stream --models pixart-sigma --layers 0 --effort default --save
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.record import options, report
from loraq import Recipe, Rule, plan_model
from loraq.integrations.diffusers import model_of
from loraq.json_files import write_json
from loraq.pipeline.plan import Plan
from loraq.recipe_names import NAMED
from loraq.safetensors.header import DTYPE_NAMES, TensorSpec
from loraq.safetensors.layout import ShardLayout

#: The published configurations, as far as they differ from the defaults of the classes.
CONFIGS: dict[str, dict[str, object]] = {
    "pixart-sigma": {
        "_class_name": "PixArtTransformer2DModel",
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "sample_size": 128,
        "patch_size": 2,
        "interpolation_scale": 2,
        "use_additional_conditions": False,
    },
    "sana-1.6b": {
        "_class_name": "SanaTransformer2DModel",
        "num_attention_heads": 70,
        "attention_head_dim": 32,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
        "num_layers": 20,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "sample_size": 32,
        "patch_size": 1,
    },
    "flux.1": {
        "_class_name": "FluxTransformer2DModel",
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "in_channels": 64,
        "patch_size": 1,
    },
}
#: Largest shard of what diffusers wrote: FLUX.1 comes in three files.
SHARD_BYTES = 10_000_000_000


def write_checkpoint(config: dict[str, object], folder: Path) -> torch.nn.Module:
    """Write a checkpoint with random weights, and return its model on the meta device.

    One tensor is in memory at a time.
    """
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    model = model_of(config, folder / "config.json")
    specs = {
        name: TensorSpec(
            DTYPE_NAMES[torch.bfloat16 if t.is_floating_point() else t.dtype], tuple(t.shape)
        )
        for name, t in model.state_dict().items()
    }
    layout = ShardLayout.of(specs, "diffusion_pytorch_model", SHARD_BYTES)
    layout.allocate(folder)
    rng = torch.Generator().manual_seed(0)
    for name, spec in specs.items():
        width = math.prod(spec.shape[1:]) or 1
        layout.write(
            folder, {name: (torch.randn(spec.shape, generator=rng) * width**-0.5).bfloat16()}
        )
    return model


def subset(plan: Plan, recipe: Recipe, n_layers: int) -> Recipe:
    """Return the recipe for some layers, from the smallest to the largest (0: for all)."""
    if not n_layers:
        return recipe
    by_size = sorted(plan.quantized, key=lambda layer: math.prod(layer.shape))
    step = (len(by_size) - 1) / max(1, n_layers - 1)
    chosen = {by_size[round(i * step)].name for i in range(n_layers)}
    rules = (
        *(Rule(name) for name in sorted(chosen)),
        Rule("*", skip=True, reason="not in the subset"),
    )
    return replace(recipe, rules=rules)


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous memory of a process and of all that it has started."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return 0
    own = next(
        int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Anonymous:")
    )
    return own + sum(anonymous_bytes(int(child)) for child in children)


def measure(source: Path, target: Path, recipe: Path, workers: int) -> tuple[dict, float, int]:
    """Run the command; return what it reports, its seconds, and its peak of anonymous memory."""
    command = [
        sys.executable,
        "-m",
        "loraq",
        "quantize",
        source,
        target,
        "--recipe",
        recipe,
        "--json",
    ]
    begin, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([*command, "--workers", str(workers)], stdout=output)
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.05)
        if process.returncode:
            raise SystemExit(process.returncode)
        output.seek(0)
        return json.loads(output.read()), time.monotonic() - begin, peak


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Print a table and the JSON line."""
    chosen = options(
        __doc__,
        models=(tuple(CONFIGS), f"which ones (default: all of {', '.join(CONFIGS)})"),
        layers=(8, "layers to quantize in each, spread evenly; 0 for all (default: 8)"),
        workers=(2, "worker processes (default: 2)"),
        effort=("fast", "effort of the solver (default: fast)"),
        recipe=("default", "recipe by its name (default: the default)"),
        folder=("", "where to write; 30 GB for FLUX.1 (default: a temporary folder)"),
    )
    columns = (
        "layers",
        "GB in",
        "GB out",
        "min",
        "s/layer",
        "GB/s",
        "tensor MB",
        "peak MB",
        "hours",
    )
    print(f"{'':14}" + "".join(f"{column:>11}" for column in columns))
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir=chosen.folder or None) as place:
        for name in chosen.models:
            source, target = Path(place, name, "source"), Path(place, name, "target")
            model = write_checkpoint(CONFIGS[name], source)
            recipe = replace(Recipe.named(chosen.recipe), effort=chosen.effort)
            plan = plan_model(model, recipe)
            write_json(Path(place, "recipe.json"), subset(plan, recipe, chosen.layers).to_dict())
            found, seconds, peak = measure(
                source, target, Path(place, "recipe.json"), chosen.workers
            )
            n_layers, n_all = len(found["layers"]), len(plan.quantized)
            largest = max(parameter.numel() for parameter in model.parameters()) * 4
            weights = {layer.name: math.prod(layer.shape) for layer in plan.quantized}
            solver = sum(layer["seconds"] for layer in found["layers"])
            share = sum(weights[layer["name"]] for layer in found["layers"]) / sum(weights.values())
            hours = solver / share / chosen.workers / 3600
            row = {
                "model": name,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "layers": n_layers,
                "layers_of_the_model": n_all,
                "workers": chosen.workers,
                "effort": chosen.effort,
                "recipe": NAMED.get(chosen.recipe, chosen.recipe),
                "shards": len(list(source.glob("*.safetensors"))),
                "bytes_in": folder_bytes(source),
                "bytes_out": folder_bytes(target),
                "seconds": seconds,
                "solver_seconds_per_layer": solver / n_layers,
                "largest_tensor_fp32_bytes": largest,
                "peak_anonymous_bytes": peak,
                "share_of_the_weights": share,
                "hours_for_all_layers": hours,
                "mean_relative_error": found["mean_relative_error"],
            }
            rows.append(row)
            gb_in = folder_bytes(source) / 1e9
            cells = (
                f"{n_layers}/{n_all}",
                f"{gb_in:.2f}",
                f"{folder_bytes(target) / 1e9:.2f}",
                f"{seconds / 60:.1f}",
                f"{solver / n_layers:.1f}",
                f"{gb_in / seconds:.3f}",
                f"{largest / 1e6:.0f}",
                f"{peak / 1e6:.0f}",
                f"{hours:.1f}",
            )
            print(f"{name:14}" + "".join(f"{cell:>11}" for cell in cells), flush=True)
            for path in (*source.iterdir(), *target.iterdir()):
                path.unlink()  # the next model needs the space
    print()
    report(rows, save=chosen.save)


if __name__ == "__main__":
    main()
