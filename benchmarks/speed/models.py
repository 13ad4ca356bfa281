"""Whole models on the page of timings: every number is from a result file of `speed.stream`."""

import re
from typing import Any, NamedTuple

from benchmarks.pages import source, table
from benchmarks.results import Record

#: What the models of `speed.stream` are called on the page, in its order.
TITLES = {"pixart-sigma": "PixArt-Σ XL", "sana-1.6b": "SANA 1.6B", "flux.1": "FLUX.1"}
#: The bars: minutes of PixArt-Σ XL at effort default, and fp32 copies of the largest tensor that a
#: worker takes.
BAR_MINUTES, BAR_COPIES = 10, 4
#: What the first of them was set for.
BAR_MODEL, BAR_RECIPE, BAR_LAYERS = "pixart-sigma", "int4-a16+w6a6", 224

INTRO = """## Whole models

`loraq quantize` from files to files, at the shapes and shards of published models with random
weights, on a CPU with two cores. A run of all layers says what it took. One of fewer reads, checks
and writes every byte, and its time is **extrapolated**: the solver's seconds per weight, for all
weights, shared by as many workers. "peak" is the most anonymous memory that all processes held
together, and "copies" is that over the fp32 bytes of the largest tensor, a worker. "error" is the
mean relative error of the layers' weights; the files of older runs do not hold it.
"""


class Run(NamedTuple):
    """One model that was quantized, in one run."""

    model: str
    recipe: str
    effort: str
    layers: int
    all_layers: int
    workers: int
    #: Of the whole run; of all layers if it took fewer.
    minutes: float
    peak_bytes: int
    tensor_bytes: int
    error: float | None
    record: Record

    @classmethod
    def of(cls, record: Record, row: dict[str, Any]) -> "Run":
        """Return the run of a row."""
        n, n_all = row["layers"], row["layers_of_the_model"]
        return cls(
            row["model"],
            row.get("recipe", "unknown"),
            row["effort"],
            n,
            n_all,
            row["workers"],
            row["seconds"] / 60 if n == n_all else 60 * row["hours_for_all_layers"],
            row["peak_anonymous_bytes"],
            row["largest_tensor_fp32_bytes"],
            row.get("mean_relative_error"),
            record,
        )

    @property
    def title(self) -> str:
        """What the model is called."""
        return TITLES.get(self.model, self.model)

    @property
    def is_whole(self) -> bool:
        """Whether every layer was quantized."""
        return self.layers == self.all_layers

    @property
    def copies(self) -> float:
        """Peak memory in fp32 copies of the largest tensor, a worker."""
        return self.peak_bytes / (self.workers * self.tensor_bytes)

    @property
    def time(self) -> str:
        """How long it takes, in minutes or hours; extrapolated where it was."""
        text = f"{self.minutes / 60:.1f} h" if self.minutes >= 60 else f"{self.minutes:.1f} min"
        return text if self.is_whole else f"{text}, extrapolated"


def runs(records: list[Record]) -> list[Run]:
    """Return the newest run of each model, recipe and effort, for records sorted by date."""
    found: dict[tuple[str, str, str], Run] = {}
    for record in records:
        if record["benchmark"] == "speed.stream":
            for row in record["rows"]:
                run = Run.of(record, row)
                key = (run.model, run.recipe, run.effort)
                found.pop(key, None)
                found[key] = run
    order = list(TITLES)
    newest_first = reversed(found.values())
    return sorted(
        newest_first, key=lambda run: order.index(run.model) if run.model in order else len(order)
    )


def judged(records: list[Record]) -> list[Run]:
    """Return the newest run of each model and effort, whatever its recipe."""
    found: dict[tuple[str, str], Run] = {}
    for run in runs(records):  # the newest of a model first
        found.setdefault((run.model, run.effort), run)
    return list(found.values())


def like_for_like(records: list[Record]) -> Run | None:
    """Return the run that the bar of minutes is judged by.

    It is one in the recipe that the bar was set for, if there is one; else the newest.
    """
    whole = [
        run
        for run in runs(records)
        if run.is_whole and (run.model, run.effort) == (BAR_MODEL, "default")
    ]
    return next((run for run in whole if run.recipe == BAR_RECIPE), next(iter(whole), None))


def unlike(run: Run) -> str:
    """Return in what a run is another than the bar was set for; nothing if in nothing."""
    if (run.recipe, run.layers) == (BAR_RECIPE, BAR_LAYERS):
        return ""
    return (
        f"Not like for like: the bar was set for `{BAR_RECIPE}` on {BAR_LAYERS} layers, and this "
        f"run is `{run.recipe}` on {run.layers}."
    )


def without_folder(record: Record) -> Record:
    """Return a record whose command does not say where it wrote: any folder does."""
    return {**record, "command": re.sub(r" --folder \S+", "", record["command"])}


def section(records: list[Record]) -> list[str]:
    """Return the section for records sorted by date."""
    found = runs(records)
    if not found:
        return [INTRO, "No result file yet.", ""]
    body = [
        [
            run.title,
            f"`{run.recipe}`",
            run.effort,
            f"{run.layers} of {run.all_layers}",
            str(run.workers),
            run.time,
            f"{run.peak_bytes / 1e6:.0f}",
            f"{run.copies:.1f}",
            "–" if run.error is None else f"{run.error:.4f}",
            f"{run.record['date'][:10]}, {run.record['commit']}",
        ]
        for run in found
    ]
    headings = ("", "recipe", "effort", "layers", "workers", "time", "peak MB", "copies", "error")
    sources = dict.fromkeys(source(without_folder(run.record)) for run in found)
    return [
        INTRO,
        *table((*headings, "run"), body, "lllrrrrrrl"),
        *(f"* {sentence}" for sentence in sources),
        "",
    ]
