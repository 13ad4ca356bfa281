"""The section on matrices of docs/quality.md: the annealing alone, beside an alternated branch.

Every number is read from the newest result file of `benchmarks.quality.methods`.
"""

from collections.abc import Iterable
from statistics import fmean

from benchmarks.pages import source, table
from benchmarks.quality.methods import RIVAL_BAR, own_label, rival_label
from benchmarks.results import Record

INTRO = f"""## The same branch on matrices

Relative weight error of SVDQuant with 100 alternations, scale search and the same quantized branch,
over LoRaQ's at effort default, on matrices with the statistics of large transformers: the mean over
seeds, and over shapes. The bar is {RIVAL_BAR:.2f}. "Time" is LoRaQ's process time over SVDQuant's.
"""


def newest(records: Iterable[Record]) -> Record | None:
    """Return the newest record that has such rows, from records sorted by date."""
    found = [
        record
        for record in records
        if record["benchmark"] == "quality.methods"
        and any(row.get("table") == "same branch" for row in record["rows"])
    ]
    return found[-1] if found else None


def section(records: Iterable[Record]) -> str:
    """Return the section for these records; empty without one."""
    record = newest(records)
    if record is None:
        return ""
    body = []
    for row in record["rows"]:
        if row.get("table") != "same branch":
            continue
        mean = fmean(row["ratios"])
        said = "met" if mean >= RIVAL_BAR else "**missed**"
        ratios = [f"{ratio:.2f}" for ratio in row["ratios"]]
        time = f"{fmean(times(record, row['main'], row['branch'])):.2f}"
        body.append([f"`{row['main']}`", row["branch"], *ratios, f"{mean:.2f}", said, time])
    shapes = dict.fromkeys(
        f"{row['shape'][0]}×{row['shape'][1]}"
        for row in record["rows"]
        if row.get("table") == "synthetic"
    )
    headings = ("main weight", "branch", *shapes, "mean", "bar", "time")
    columns = "ll" + "r" * (len(shapes) + 1) + "lr"
    return "\n".join([INTRO, f"{source(record)}\n", *table(headings, body, columns)])


def times(record: Record, main: str, branch: str) -> list[float]:
    """Return LoRaQ's process time over that of SVDQuant ×100 beside the same branch, by shape."""
    found = {
        label: [
            fmean(row["cpu_seconds"])
            for row in record["rows"]
            if (row["table"], row["main"], row.get("method")) == ("synthetic", main, label)
        ]
        for label in (own_label(branch), rival_label(branch))
    }
    return [ours / theirs for ours, theirs in zip(*found.values(), strict=True)]
