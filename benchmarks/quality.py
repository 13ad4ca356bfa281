"""Which method leaves a trained transformer nearest to itself, at the same stored bytes, on both trained test-beds?

The digits transformer that ships with the package, and the patches transformer (`patches.py`: 20
million parameters, trained on photographs, heavier activation outliers). Every contender gets at
most the bytes of a 16-bit branch of rank 32/1152 of the width, unless its label says otherwise; a
branch-free format has fewer or more. Activations are never mixed in one table. "From weights alone"
sees no data and never runs the model. "Own samples" sees second moments of what goes into each
layer while the float model draws pictures from noise: no data either, but the model must run.

Read the velocity error: one forward on noised real images against the model as trained, one for
each seed of the solver. What the other columns of the record mean, and the tables with confidence
intervals, is on the page that `make docs` makes of it, docs/quality.md.

    python benchmarks/quality.py --fast --workers 2 --save [--tables "W4A16, own samples" ...]
"""

import copy
import gc
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from math import log10
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import loraq
import patches
from common import options, report
from loraq.evaluation import digits
from loraq.evaluation.metrics import frechet_distance, psnr_db, relative_error, ssim
from loraq.layers import linear_layers, quantized_layers
from loraq.pipeline.module import quantize_
from loraq.recipe import Recipe
from loraq.rules import Rule

DIRECT = {"scale_rule": None}
#: Tokens of each layer's real inputs that its output error is measured on, and the seed they come
#: from.
TOKENS, INPUT_SEED = 256, 50
#: Seed of the samples that statistics are collected on.
STATS_SEED = 1000


@dataclass(frozen=True)
class Contender:
    """One row."""

    label: str
    recipe: str
    method: str = "loraq"
    options: dict[str, Any] = field(default_factory=dict)
    #: Whether its bytes are those of the table, so that LoRaQ's best may be among them.
    same_bytes: bool = True
    #: Instead of the world's, and of the command's.
    budget: str | None = None
    effort: str | None = None
    rules: tuple[Rule, ...] = ()

    def asked(self, world: "World", effort: str) -> Recipe:
        """Return the recipe."""
        return replace(
            Recipe.named(self.recipe),
            method=self.method,
            options=self.options,
            budget=self.budget or world.budget,
            effort=self.effort or effort,
            rules=self.rules,
        )


WITHOUT, WITH = "from weights alone", "own samples"
#: A rule's layers are quantized even where the model's class skips them, so the text side is left
#: out by name.
INT8_BLOCK = tuple(
    Rule(f"*blocks.0.{layer}", weight="int8")
    for layer in ("attn1.*", "attn2.to_q", "attn2.to_out.0", "ff.*")
)
CONTENDERS: dict[str, tuple[Contender, ...]] = {
    f"W4A16, {WITHOUT}": (
        Contender("round to nearest", "mxfp4-a16", "rtn"),
        Contender("round to nearest, INT4, no search", "int4-a16", "rtn", DIRECT),
        Contender("round to nearest, INT4", "int4-a16", "rtn"),
        Contender("INT4, first block INT8", "int4-a16", "rtn", rules=INT8_BLOCK, same_bytes=False),
        Contender("LQER, 16-bit branch", "int4-a16+bf16", "lqer"),
        Contender("SVDQuant, 16-bit branch", "int4-a16+bf16", "svdquant", DIRECT),
        Contender("SVDQuant ×20 + scale search", "int4-a16+bf16", "svdquant", {"rounds": 20}),
        Contender("LoRaQ, 16-bit branch", "int4-a16+bf16"),
        Contender("LoRaQ, 8-bit branch", "int4-a16+w8a8"),
        Contender("LoRaQ, 6-bit branch", "int4-a16+w6a6"),
        Contender("LoRaQ, 4-bit branch", "int4-a16+w4a8"),
        Contender("LoRaQ, MXFP4 main, 6-bit branch", "mxfp4-a16+w6a6"),
        Contender(
            "LoRaQ, 6-bit branch, default effort",
            "int4-a16+w6a6",
            effort="default",
            same_bytes=False,
        ),
        Contender("plain INT5 (5.25 bits)", "int5-a16", "rtn", same_bytes=False),
        Contender(
            "LoRaQ, 6-bit branch, 5.25 bits", "int4-a16+w6a6", budget="5.25", same_bytes=False
        ),
        Contender(
            "LoRaQ, 8-bit branch, 5.25 bits", "int4-a16+w8a8", budget="5.25", same_bytes=False
        ),
        Contender(
            "LoRaQ, INT5 main, 8-bit branch, 5.25 bits",
            "int5_b256-a16+w8a8",
            budget="5.25",
            same_bytes=False,
        ),
    ),
    f"W4A16, {WITH}": (
        Contender("GPTQ, INT4", "int4-a16", "gptq"),
        Contender("SVDQuant + GPTQ, 16-bit branch", "int4-a16+bf16", "gptq"),
        Contender("SVDQuant + GPTQ, 6-bit branch", "int4-a16+w6a6", "gptq"),
        Contender("QERA, 16-bit branch", "int4-a16+bf16", "qera"),
        Contender("LoRaQ, 8-bit branch", "int4-a16+w8a8"),
        Contender("LoRaQ, 6-bit branch", "int4-a16+w6a6"),
        Contender("LoRaQ, MXFP4 main, 6-bit branch", "mxfp4-a16+w6a6"),
        Contender("GPTQ, INT5 (5.25 bits)", "int5-a16", "gptq", same_bytes=False),
        Contender(
            "LoRaQ, 6-bit branch, 5.25 bits", "int4-a16+w6a6", budget="5.25", same_bytes=False
        ),
        Contender(
            "LoRaQ, 8-bit branch, 5.25 bits", "int4-a16+w8a8", budget="5.25", same_bytes=False
        ),
        Contender(
            "LoRaQ, INT5 main, 8-bit branch, 5.25 bits",
            "int5_b256-a16+w8a8",
            budget="5.25",
            same_bytes=False,
        ),
        Contender(
            "LoRaQ, INT5 main, 4-bit branch, 5.25 bits",
            "int5_b256-a16+w4a8",
            budget="5.25",
            same_bytes=False,
        ),
    ),
    f"W4A8, {WITHOUT}": (
        Contender("round to nearest", "mxfp4-a8", "rtn"),
        Contender("round to nearest, INT4", "int4-a8+int8", "rtn"),
        Contender("SVDQuant, 16-bit branch", "mxfp4-a8+bf16", "svdquant", DIRECT),
        Contender("SVDQuant ×20 + scale search", "mxfp4-a8+bf16", "svdquant", {"rounds": 20}),
        Contender("LoRaQ, W8A8 branch", "mxfp4-a8+w8a8"),
        Contender("LoRaQ, W6A8 branch", "mxfp4-a8+w6a8"),
        Contender("LoRaQ, INT4 main, INT8 branch", "int4-a8+int8"),
    ),
    f"W4A8, {WITH}": (
        Contender("GPTQ", "mxfp4-a8", "gptq"),
        Contender("SVDQuant + GPTQ, 16-bit branch", "mxfp4-a8+bf16", "gptq"),
        Contender("LoRaQ, W16A16 branch", "mxfp4-a8+bf16"),
        Contender("LoRaQ, W8A8 branch", "mxfp4-a8+w8a8"),
        Contender("LoRaQ, W6A8 branch", "mxfp4-a8+w6a8"),
        Contender("LoRaQ, INT4 main, INT8 branch", "int4-a8+int8"),
    ),
    f"W4A4, {WITHOUT}": (
        Contender("round to nearest", "mxfp4-a4", "rtn"),
        Contender("SVDQuant, 16-bit branch", "mxfp4-a4+bf16", "svdquant", DIRECT),
        Contender("SVDQuant ×20 + scale search", "mxfp4-a4+bf16", "svdquant", {"rounds": 20}),
        Contender("SVDQuant, rotated as LoRaQ's", "mxfp4-a4+bf16-h32", "svdquant", DIRECT),
        Contender("LoRaQ, W8A8 branch, not rotated", "mxfp4-a4+w8a8-h0"),
        Contender("LoRaQ, W8A8 branch", "mxfp4-a4+w8a8"),
        Contender("LoRaQ, W4A8 branch", "mxfp4-a4+w4a8"),
        Contender("LoRaQ, INT4 main, W8A8 branch", "int4-a4+w8a8"),
    ),
    f"W4A4, {WITH}": (
        Contender("GPTQ", "mxfp4-a4", "gptq"),
        Contender("SVDQuant + GPTQ, 16-bit branch", "mxfp4-a4+bf16", "gptq"),
        Contender("SVDQuant + GPTQ, rotated as LoRaQ's", "mxfp4-a4+bf16-h32", "gptq"),
        Contender("LoRaQ, W8A8 branch", "mxfp4-a4+w8a8"),
        Contender("LoRaQ, INT4 main, W8A8 branch", "int4-a4+w8a8"),
    ),
}
#: Rows that are measured on the smaller world alone, for time.
SMALL_ONLY = {
    "round to nearest, INT4, no search",
    "LQER, 16-bit branch",
    "LoRaQ, 16-bit branch",
    "LoRaQ, 4-bit branch",
    "LoRaQ, MXFP4 main, 6-bit branch",
    "LoRaQ, 6-bit branch, default effort",
    "LoRaQ, W8A8 branch, not rotated",
    "LoRaQ, INT5 main, 4-bit branch, 5.25 bits",
}
#: What each part of the solver is worth, on one world only: every row is `fast` unless it says
#: otherwise.
ABLATIONS: dict[str, tuple[Contender, ...]] = {
    f"Ablations, W4A16, {WITHOUT}": (
        Contender("LoRaQ, fast", "int4-a16+w6a6"),
        Contender("branch rounded afterwards only", "int4-a16+w6a6", options={"refine_steps": 0}),
        Contender("cold start", "int4-a16+w6a6", options={"heat": 0.0}),
        Contender("direct scales at the end", "int4-a16+w6a6", options=DIRECT),
        Contender("no decay of the branch", "int4-a16+w6a6", options={"decay": 0.0}),
        Contender("effort default", "int4-a16+w6a6", effort="default"),
        Contender("effort best", "int4-a16+w6a6", effort="best"),
    ),
    f"Ablations, W4A4, {WITHOUT}": (
        Contender("LoRaQ, fast", "mxfp4-a4+w8a8"),
        Contender(
            "without activation noise in J", "mxfp4-a4+w8a8", options={"activation_aware": False}
        ),
        Contender("no rotation in rank space", "mxfp4-a4+w8a8", options={"rotate": False}),
        Contender("no rotation of the input", "mxfp4-a4+w8a8-h0"),
        Contender("rotation of 128 channels' blocks", "mxfp4-a4+w8a8-h128"),
    ),
    f"Ablations, W4A16, {WITH}": (
        Contender("LoRaQ, fast", "int4-a16+w6a6"),
        Contender("channels not weighed", "int4-a16+w6a6", options={"importance_damping": 1e6}),
        Contender("no feedback", "int4-a16+w6a6", options={"feedback_damping": 1e6}),
        Contender("effort default", "int4-a16+w6a6", effort="default"),
    ),
}


class World(NamedTuple):
    """A trained transformer, how to probe it, and how to look at its samples."""

    load: Callable[[torch.dtype], nn.Module]
    probe: Callable[..., Tensor]
    sample: Callable[..., Tensor]
    budget: str
    n_labels: int
    #: Samples of each seed, and samples that statistics are collected on.
    n_samples: int
    n_stats: int
    contenders: dict[str, tuple[Contender, ...]]
    #: Features in which a Fréchet distance means something, and those of real images; `None` if
    #: there are none.
    features: Callable[[Tensor], Tensor] | None = None


def digit_features(images: Tensor | None = None) -> Tensor:
    """Return the judge's features of images, or of all real digits."""
    return digits.Judge.from_assets().features(
        digits.real_digits()[0] if images is None else images
    )


WORLDS = {
    "digits": World(
        digits.load_transformer,
        digits.velocity_probe,
        digits.sample,
        "r16=5",
        10,
        200,
        128,
        CONTENDERS | ABLATIONS,
        digit_features,
    ),
    "patches": World(
        patches.load_transformer,
        patches.velocity_probe,
        patches.sample,
        "r16=11",
        patches.NULL_LABEL,
        32,
        32,
        {
            group: tuple(c for c in rows if c.label not in SMALL_ONLY)
            for group, rows in CONTENDERS.items()
        },
    ),
}


class Exact(NamedTuple):
    """What the float model of a world does; what every row is compared with."""

    velocities: list[Tensor]
    samples: list[Tensor]
    #: Real inputs of every layer.
    inputs: dict[str, Tensor]
    #: File of the statistics of its own samples.
    stats: Path


def main() -> None:
    """Print a line for every row, and a JSON line for every world, from which `make docs` makes docs/quality.md."""
    chosen = options(
        __doc__,
        seeds=(
            3,
            "seeds of the solver, each with images and noise of its own (default: 3, at most 8)",
        ),
        worlds=(tuple(WORLDS), "trained transformers (default: both)"),
        tables=(
            (*CONTENDERS, *ABLATIONS),
            "tables, by their titles (default: all that a world has)",
        ),
        fast="effort 'fast' instead of the default",
        workers=(1, "rows measured at a time, one thread each (default: 1)"),
    )
    effort = "fast" if chosen.fast else "default"
    for title in chosen.tables:
        if title not in CONTENDERS | ABLATIONS:
            raise SystemExit(
                f"There is no table '{title}'. Tables: {'; '.join(CONTENDERS | ABLATIONS)}."
            )
    for name in chosen.worlds:
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            exact = looked_at(WORLDS[name], chosen.seeds, Path(folder) / "stats.safetensors")
            tables = {
                title: rows
                for title, rows in WORLDS[name].contenders.items()
                if title in chosen.tables
            }
            jobs = [
                (title, i) for title, contenders in tables.items() for i in range(len(contenders))
            ]
            # A process for each row, so that its memory is its own.
            with ProcessPoolExecutor(
                chosen.workers, get_context("spawn"), max_tasks_per_child=1
            ) as pool:
                for row in pool.map(
                    partial(measured, name, exact, effort), *zip(*jobs, strict=True)
                ):
                    print(
                        f"{name}: {row['group']}: {row['label']}: {fmean(row['velocity']):.4f}",
                        flush=True,
                    )
                    rows.append(row)
        report(rows, save=chosen.save)


def looked_at(world: World, n_seeds: int, stats: Path) -> Exact:
    """Run the float model."""
    trained = world.load(torch.float32)
    names = [layer.name for layer in loraq.plan_model(trained, "int4+bf16-r5").quantized]
    labels = torch.arange(world.n_stats) % world.n_labels
    collected = loraq.collect_stats(
        trained, lambda: world.sample(trained, labels, seed=STATS_SEED), names
    )
    loraq.save_stats(collected, stats)
    seeds = range(n_seeds)
    samples = [samples_of(trained, world, seed) for seed in seeds]
    return Exact(
        [world.probe(trained, seed=seed) for seed in seeds],
        samples,
        inputs_of(trained, world, names),
        stats,
    )


def samples_of(model: nn.Module, world: World, seed: int) -> Tensor:
    """Return the samples that one seed is judged by, drawn in ten steps without guidance."""
    return world.sample(
        model, torch.arange(world.n_samples) % world.n_labels, seed=seed, steps=10, guidance=1.0
    )


def inputs_of(model: nn.Module, world: World, names: list[str]) -> dict[str, Tensor]:
    """Return some tokens of what goes into each layer."""
    found: dict[str, Tensor] = {}

    def keep(name: str, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].flatten(0, -2)
        found[name] = tokens[:: max(1, len(tokens) // TOKENS)][:TOKENS].clone()

    layers = linear_layers(model)
    hooks = [layers[name].register_forward_pre_hook(partial(keep, name)) for name in names]
    world.probe(model, seed=INPUT_SEED)
    for hook in hooks:
        hook.remove()
    return found


def measured(name: str, exact: Exact, effort: str, group: str, index: int) -> dict[str, Any]:
    """Return one row: what becomes of the model with each seed."""
    torch.set_num_threads(1)
    world = WORLDS[name]
    contender = world.contenders[group][index]
    trained = world.load(torch.float32)
    asked = contender.asked(world, effort)
    row: dict[str, Any] = {
        "world": name,
        "group": group,
        "label": contender.label,
        "recipe": contender.recipe,
    }
    row |= {
        "method": contender.method,
        "effort": asked.effort,
        "same_bytes": contender.same_bytes,
        "velocity": [],
    }
    drawn, growth = [], 0
    for seed, velocity in enumerate(exact.velocities):
        model = copy.deepcopy(trained)
        gc.collect()
        before = reset_peak()
        stats = exact.stats if group.endswith(WITH) else None
        done = quantize_(model, replace(asked, seed=seed), stats=stats, progress=False)
        if seed == 0:
            growth = peak_kib() - before
            row["layers"] = fmean(output_errors(trained, model, exact.inputs))
            row["seconds"] = sum(layer.seconds for layer in done.layers)
        row["velocity"].append(relative_error(velocity, world.probe(model, seed=seed)))
        drawn.append(samples_of(model, world, seed))
    row |= {
        "bits": done.plan.bits_per_weight,
        "weight": done.mean_relative_error,
        "peak_mb": growth / 1024,
    }
    ours, theirs = torch.cat(drawn), torch.cat(exact.samples)
    row["psnr"] = -10 * log10((10 ** (-psnr_db(theirs, ours, 2.0) / 10)).mean())
    row["ssim"] = ssim(theirs, ours, 2.0).mean().item() if ours.shape[-1] >= 11 else None
    if world.features is not None:
        real = world.features()
        row["frechet"] = frechet_distance(world.features(ours), real)
        row["frechet_as_trained"] = frechet_distance(world.features(theirs), real)
    return row


def reset_peak() -> int:
    """Forget the process's peak memory, as Linux lets it, and return what it has now, in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_kib()


def peak_kib() -> int:
    """Return the process's peak memory in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


@torch.no_grad()
def output_errors(trained: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> list[float]:
    """Return the relative output error of every quantized layer on its own real inputs."""
    exact = linear_layers(trained)
    return [
        relative_error(exact[name](inputs[name]), layer(inputs[name]))
        for name, layer in quantized_layers(model).items()
    ]


if __name__ == "__main__":
    main()
