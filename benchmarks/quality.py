"""Which method leaves a trained transformer nearest to itself, at the same stored bytes, on both trained test-beds?

The digits transformer that ships with the package, and the patches transformer (`patches.py`: 19 million parameters,
trained on photographs, heavier activation outliers). Every contender gets at most the bytes of a 16-bit branch of rank
32/1152 of the width. Read the velocity error: one forward on noised real images against the model as trained, the mean
over seeds of the solver, each with images and noise of its own, with a 95 % confidence interval (Student's t) and its
ratio to LoRaQ's best row of the group, run by run: 1.20 is 20 % more error. Activations are never mixed in one group.

    python benchmarks/quality.py --fast --save --write
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import patches
from common import HERE, options, report
from loraq.evaluation import digits
from loraq.evaluation.metrics import relative_error
from loraq.pipeline.quantize import quantize_
from loraq.recipe import Recipe

PAGE = HERE.parent / "docs" / "quality.md"
DIRECT = {"scale_rule": None}
#: Label, recipe, method, options, by group. A rank's bytes come from the world's budget.
CONTENDERS: dict[str, tuple[tuple[str, str, str, dict[str, Any]], ...]] = {
    "W4A16": (
        ("round to nearest", "mxfp4-a16", "rtn", {}),
        ("round to nearest, INT4", "int4-a16", "rtn", {}),
        ("plain INT5 (more bytes)", "int5-a16", "rtn", {}),
        ("SVDQuant, 16-bit branch", "mxfp4-w16a16-a16", "svdquant", DIRECT),
        ("SVDQuant ×20 + scale search", "mxfp4-w16a16-a16", "svdquant", {"rounds": 20}),
        ("LoRaQ, 8-bit branch", "mxfp4-w8a8-a16", "loraq", {}),
        ("LoRaQ, 6-bit branch", "mxfp4-w6a6-a16", "loraq", {}),
        ("LoRaQ, INT4 main, 6-bit branch", "int4-w6a6-a16", "loraq", {}),
    ),
    "W4A8": (
        ("round to nearest", "mxfp4-a8", "rtn", {}),
        ("SVDQuant, 16-bit branch", "mxfp4-w16a16-a8", "svdquant", DIRECT),
        ("LoRaQ, W8A8 branch", "mxfp4-w8a8-a8", "loraq", {}),
        ("LoRaQ, W6A8 branch", "mxfp4-w6a8-a8", "loraq", {}),
    ),
    "W4A4": (
        ("round to nearest", "mxfp4-a4", "rtn", {}),
        ("SVDQuant, 16-bit branch", "mxfp4-w16a16-a4", "svdquant", DIRECT),
        ("SVDQuant, rotated as LoRaQ's", "mxfp4-w16a16-h32-a4", "svdquant", DIRECT),
        ("LoRaQ, W8A8 branch, not rotated", "mxfp4-w8a8-h0-a4", "loraq", {}),
        ("LoRaQ, W8A8 branch", "mxfp4-w8a8-a4", "loraq", {}),
        ("LoRaQ, W4A8 branch", "mxfp4-w4a8-a4", "loraq", {}),
    ),
}
#: Two-sided 95 % quantile of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


class World(NamedTuple):
    """A trained transformer and how to probe it."""

    load: Callable[[torch.dtype], nn.Module]
    probe: Callable[..., Tensor]
    budget: str


WORLDS = {
    "digits": World(digits.load_transformer, digits.velocity_probe, "r16=5"),
    "patches": World(patches.load_transformer, patches.velocity_probe, "r16=11"),
}


def main() -> None:
    """Print the tables and the JSON line; with `--write`, also the page of the documents."""
    chosen = options(
        __doc__,
        seeds=(3, "seeds of the solver, each with images and noise of its own (default: 3, at most 8)"),
        fast="effort 'fast' instead of the default",
        write="write docs/quality.md",
    )
    effort = "fast" if chosen.fast else "default"
    rows: list[dict[str, object]] = []
    text = []
    for name, world in WORLDS.items():
        found = measured(world, effort, chosen.seeds)
        rows += [{"world": name, "effort": effort, **row} for row in found]
        text.append(table(name, found))
        print(text[-1], flush=True)
    if chosen.write:
        command = f"python benchmarks/quality.py --seeds {chosen.seeds}{' --fast' if chosen.fast else ''} --write"
        intro = (__doc__ or "").split("\n\n")
        PAGE.write_text(f"# Quality\n\nWritten by `{command}`. {intro[0]}\n\n{intro[1]}\n\n" + "\n".join(text))
    report(rows, save=chosen.save)


def measured(world: World, effort: str, n_seeds: int) -> list[dict[str, object]]:
    """Return one row for every contender: its velocity error with each seed."""
    trained = world.load(torch.float32)
    exact = [world.probe(trained, seed=seed) for seed in range(n_seeds)]
    rows: list[dict[str, object]] = []
    for group, contenders in CONTENDERS.items():
        for label, recipe, method, settings in contenders:
            asked = replace(Recipe.named(recipe), method=method, options=settings, budget=world.budget, effort=effort)
            errors = []
            for seed, velocity in enumerate(exact):
                model = copy.deepcopy(trained)
                done = quantize_(model, replace(asked, seed=seed), progress=False)
                errors.append(relative_error(velocity, world.probe(model, seed=seed)))
            row = {"group": group, "label": label, "recipe": recipe, "method": method, "velocity": errors}
            rows.append({**row, "bits": done.plan.bits_per_weight, "weight": done.mean_relative_error})
    return rows


def table(world: str, rows: list[dict[str, Any]]) -> str:
    """Return the rows of one world as Markdown."""
    lines = [f"## The {world} transformer", ""]
    for group in CONTENDERS:
        mine = [row for row in rows if row["group"] == group]
        best = min((row for row in mine if row["method"] == "loraq"), key=lambda row: fmean(row["velocity"]))
        lines += [f"**{group}**", "", "| | recipe | bits | weight error | velocity error | / best LoRaQ |"]
        lines.append("|---|---|---|---|---|---|")
        for row in mine:
            ratios = [ours / theirs for ours, theirs in zip(row["velocity"], best["velocity"], strict=True)]
            lines.append(
                f"| {row['label']} | `{row['recipe']}` | {row['bits']:.2f} | {row['weight']:.4f} "
                f"| {interval(row['velocity'], 4)} | {'1' if row is best else interval(ratios, 2)} |"
            )
        lines.append("")
    return "\n".join(lines)


def interval(values: list[float], digits: int) -> str:
    """Return the mean and half the width of its 95 % confidence interval."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    half = STUDENT[len(values) - 1] * stdev(values) / sqrt(len(values))
    return f"{fmean(values):.{digits}f} ± {half:.{digits}f}"


if __name__ == "__main__":
    main()
