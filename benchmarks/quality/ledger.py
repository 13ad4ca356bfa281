"""The results of `benchmarks.quality.run`: a line for each row and seed, added as it is measured.

So a run can be killed and goes on, several sessions can add to it, and a row whose method has
changed since is measured again: each line carries the fingerprint of what the method makes of a
fixed matrix. The newest line of a row and seed counts.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.field import Entrant, asks_calls
from benchmarks.quality.row import ModelRow
from benchmarks.results import RESULTS
from benchmarks.worlds.matrices import dit_like, gaussian
from benchmarks.worlds.world import OWN_SENSITIVITY
from loraq.evaluation.contender import Contender
from loraq.formats import BlockFormat, Format
from loraq.pipeline.module import quantize_weight
from loraq.stats import ActivationStats

FOLDER = RESULTS / "quality"
Line = dict[str, Any]
#: World, table, label, recipe, budget.
RowKey = tuple[str, str, str, str, str]


def add(line: Line, folder: Path = FOLDER) -> None:
    """Add a line to the file of its world and table."""
    letters = "".join(c if c.isalnum() else "-" for c in line["group"].lower())
    path = folder / line["world"] / f"{letters}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(folder: Path = FOLDER) -> dict[RowKey, dict[int, Line]]:
    """Return the newest line of every row and seed."""
    found: dict[RowKey, dict[int, Line]] = {}
    lines = [
        json.loads(text)
        for path in sorted(folder.glob("*/*.jsonl"))
        for text in path.read_text().splitlines()
    ]
    for line in sorted(lines, key=lambda line: line["date"]):
        key = (line["world"], line["group"], line["label"], line["recipe"], line["budget"])
        found.setdefault(key, {})[line["seed"]] = line
    return found


def rows(
    lines: dict[RowKey, dict[int, Line]], world: str, group: str, seeds: Iterable[int]
) -> list[ModelRow]:
    """Return the rows of a table that were measured with any of the seeds."""
    wanted = set(seeds)
    found = []
    for key, by_seed in lines.items():
        if key[:2] == (world, group) and (chosen := sorted(wanted & by_seed.keys())):
            found.append(ModelRow.of_lines([by_seed[seed] for seed in chosen]))
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread, as the rows are measured: more of them sum otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def fixed_matrix() -> tuple[torch.Tensor, ActivationStats]:
    """Return a weight, and statistics of inputs, that tell what a method does."""
    # Large enough for the smallest budget of any table to leave a branch of rank 1.
    with one_thread():
        inputs = gaussian(512, 256, 1) @ gaussian(256, 256, 2) / 16
        return dit_like(192, 256), ActivationStats(512, inputs.mT @ inputs / 512)


def rounds_signed(activation: Format) -> bool:
    """Whether dynamic activations of a format have scales with a sign."""
    rows = activation.for_rows()
    return isinstance(rows, BlockFormat) and rows.scale_rule().signed


def fingerprint(contender: Contender, budget: str, effort: str) -> str:
    """Return a hash of what a contender makes of a fixed matrix, and of what it does besides."""
    recipe = contender.to_recipe(budget=budget, effort=effort)
    weight, stats = fixed_matrix()
    given = stats if contender.statistics else None
    if contender.statistics == OWN_SENSITIVITY:
        given = replace(stats, output_sensitivity=weight.square().mean(1))
    with one_thread():
        packed = quantize_weight(weight, recipe, stats=given).packed
    digest = hashlib.sha256()
    for name, tensor in sorted(packed.tensors.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    besides = contender.smoothing if isinstance(contender, Entrant) else ""
    digest.update(f"{contender.statistics}/{besides}/{contender.allocation}".encode())
    # Part of no packed tensor, and since 2026-11-30 not what it was.
    if rounds_signed(recipe.scheme.activation_format):
        digest.update(b"/signed activations")
    # The fixed matrix's statistics have no calls.
    if recipe.scheme.smoothing and asks_calls(recipe.scheme, contender.statistics):
        digest.update(b"/no call worse")
    return digest.hexdigest()[:16]
