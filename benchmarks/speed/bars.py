"""The bars that the page of timings judges, each by what the newest result files hold."""

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from benchmarks.pages import table
from benchmarks.results import Record
from benchmarks.speed import models
from benchmarks.speed.machines import Machine, named, newest

#: A line of a result file: timings of one contender.
Timing = dict[str, Any]

NO_FILE = "no result file yet"
MET, MISSED = "met", "**MISSED**"
#: Token counts that the bars are about, and the least size of in and out.
LARGE_TOKENS, LARGE_SIZE = 1024, 1152
#: The bars were set for this many threads of a CPU.
BAR_THREADS = 2
BAR_SPEED, BAR_BRANCH, BAR_RESIDENT, BAR_OPENVINO = 1.5, 0.15, 1.25, 0.9
#: Of bf16, for `low_memory` on a CPU without matrix units; of the packed bytes, for `openvino`.
BAR_LOW_MEMORY, BAR_COPY = 0.75, 1.15

INTRO = f"""## The bars

Promises of the project, on {BAR_THREADS} threads of a CPU: each is judged by the worst value in the
newest result files, but for the one that says median.
"""


class Bar(NamedTuple):
    """One promise, and what the file says of it."""

    promise: str
    #: Values with the place they were measured at, as (value, place).
    measured: list[tuple[float, str]]
    limit: float
    #: Whether values must not be smaller than the limit; else not larger.
    is_least: bool
    show: Callable[[float], str]
    #: What to say of a miss, if the file shows why.
    reason: str = ""
    #: Whether the promise is about the median; else about every value.
    is_of_median: bool = False
    #: The machine or the model.
    where: str = ""
    #: What to know of the values, met or missed.
    note: str = ""

    def met(self) -> bool:
        """Whether the promise is kept."""
        worst, middle = self.worst()[0], median(value for value, _ in self.measured)
        value = middle if self.is_of_median else worst
        return value >= self.limit if self.is_least else value <= self.limit

    def worst(self) -> tuple[float, str]:
        """Return the value that is furthest from the promise, and its place."""
        return (min if self.is_least else max)(self.measured)

    def said(self) -> str:
        """Return met, missed, or that nothing was measured."""
        return (MET if self.met() else MISSED) if self.measured else NO_FILE

    def cells(self) -> list[str]:
        """Return the line of the table."""
        if not self.measured:
            return [self.promise, self.where, "–", "–", "0", self.said()]
        worst, place = self.worst()
        middle = median(value for value, _ in self.measured)
        figures = [f"{self.show(worst)} ({place})", self.show(middle), str(len(self.measured))]
        return [self.promise, self.where, *figures, self.said()]


def section(records: list[Record]) -> list[str]:
    """Return the section of all bars, for records sorted by date."""
    bars = every(records)
    notes = [f"* {note}" for note in dict.fromkeys(explained(bar) for bar in bars) if note]
    body = [bar.cells() for bar in bars]
    lines = table(("bar", "", "worst", "median", "measured", ""), body, "llrrrl")
    return [INTRO, *lines, *notes, *unjudged(records), ""]


def every(records: list[Record]) -> list[Bar]:
    """Return all bars, with what these records say of them."""
    found = [
        bar
        for machine, rows in of_machines(records).items()
        if machine.threads == BAR_THREADS
        for bar in of_layers(machine, rows)
    ]
    return [*found, of_copies(records), *of_models(records)]


def of_machines(records: list[Record]) -> dict[Machine, list[Timing]]:
    """Return the newest rows of `speed.layer` on each CPU."""
    return {
        machine: [row for record in by_model.values() for row in record["rows"]]
        for machine, by_model in newest(records, "speed.layer", "model").items()
        if machine.device == "cpu"
    }


def unjudged(records: list[Record]) -> list[str]:
    """Return lines for the runs that no bar is about."""
    return [
        f"* {named(machine)}: not judged, the bars are for {BAR_THREADS} threads."
        for machine in of_machines(records)
        if machine.threads != BAR_THREADS
    ]


def explained(bar: Bar) -> str:
    """Return what is said of a bar below the table."""
    reason = bar.reason if bar.measured and not bar.met() else ""
    text = " ".join(part for part in (reason, bar.note if bar.measured else "") if part)
    return f"{bar.promise} ({bar.where}): {text}" if text else ""


def of_layers(machine: Machine, rows: list[Timing]) -> list[Bar]:
    """Return the bars of one layer on a CPU."""

    def of(
        contender: str, value: Callable[[Timing], float], among: list[Timing]
    ) -> list[tuple[float, str]]:
        mine = (row for row in among if row["contender"] == contender)
        return [
            (value(row), f"{row['n_in']} → {row['n_out']}, {row['tokens']} tokens") for row in mine
        ]

    def times(row: Timing) -> float:
        return float(row["times_bf16"])

    large, where = [row for row in rows if is_large(row)], named(machine)
    found = [
        Bar(
            f"`int8_row` with branch ≥ {BAR_SPEED} × bf16, from {LARGE_TOKENS} tokens, in and out "
            f"from {LARGE_SIZE}",
            of("int8_row", times, large),
            BAR_SPEED,
            True,
            "{:.2f} ×".format,
            slow_product(large),
            where=where,
        ),
        Bar(
            f"the branch adds ≤ {100 * BAR_BRANCH:.0f} % to `int8_row`",
            of("int8_row", lambda row: row["branch_cost"], rows),
            BAR_BRANCH,
            False,
            percent,
            where=where,
        ),
        Bar(
            f"`openvino` with branch ≥ {BAR_OPENVINO} × bf16 in the median, from {LARGE_TOKENS} "
            "tokens",
            of("openvino", times, large),
            BAR_OPENVINO,
            True,
            "{:.2f} ×".format,
            is_of_median=True,
            where=where,
        ),
        Bar(
            f"`resident`, 16-bit activations, takes ≤ {BAR_RESIDENT} × the time of bf16",
            of("resident a16", lambda row: 1 / row["times_bf16"], rows),
            BAR_RESIDENT,
            False,
            "{:.2f} ×".format,
            where=where,
        ),
    ]
    if "AMX" not in machine.kind or machine.limit:
        found.append(
            Bar(
                f"`low_memory` ≥ {BAR_LOW_MEMORY} × bf16 at {LARGE_TOKENS} tokens, in and out from "
                f"{LARGE_SIZE}, without matrix units",
                of(
                    "low_memory a16",
                    times,
                    [row for row in large if row["tokens"] == LARGE_TOKENS],
                ),
                BAR_LOW_MEMORY,
                True,
                "{:.2f} ×".format,
                where=where,
            )
        )
    return found


def of_copies(records: list[Record]) -> Bar:
    """Return the bar of what `openvino` takes beside the packed bytes."""
    measured, places = [], []
    for machine, by_what in newest(records, "speed.engines", "what").items():
        for what, record in by_what.items():
            mib = {row["contender"]: row["mib"] for row in record["rows"]}
            if {"torch openvino", "torch low_memory"} <= mib.keys():
                ours, packed = mib["torch openvino"], mib["torch low_memory"]
                measured.append((ours / packed, f"{what}, {ours:.0f} of {packed:.0f} MiB"))
                places.append(named(machine))
    return Bar(
        f"`openvino` takes ≤ {BAR_COPY} × the packed bytes",
        measured,
        BAR_COPY,
        False,
        "{:.2f} ×".format,
        where="PixArt-Σ, " + ("; ".join(dict.fromkeys(places)) or "2 threads"),
        note="The files hold peaks of resident memory, not packed bytes: the ratio is to the peak "
        "of `low_memory`, which keeps the packed bytes and nothing beside them; activations and "
        "buffers are in both. A test (`tests/kernels/test_openvino.py`) holds that what a layer "
        "keeps is a copy as large as its packed bytes, which alone makes it twice as much.",
    )


def of_models(records: list[Record]) -> list[Bar]:
    """Return the bars of whole models."""
    runs = models.judged(records)
    peaks = [
        (run.copies, f"{run.title}, {run.peak_bytes / 1e6:.0f} MB, effort {run.effort}")
        for run in runs
    ]
    allowed = [
        f"{run.title} at effort {run.effort} {run.peak_bytes / 1e9:.2f} GB where "
        f"{models.BAR_COPIES * run.workers * run.tensor_bytes / 1e9:.2f} are allowed"
        for run in runs
        if run.copies > models.BAR_COPIES
    ]
    whole = models.like_for_like(records)
    unlike = "" if whole is None else models.unlike(whole)
    return [
        Bar(
            f"PixArt-Σ XL, every layer at effort default, takes ≤ {models.BAR_MINUTES} minutes",
            [(whole.minutes, f"{whole.layers} layers, `{whole.recipe}`")] if whole else [],
            models.BAR_MINUTES,
            False,
            "{:.1f} min".format,
            where="2 workers" if whole is None else f"{whole.workers} workers",
            note=unlike,
        ),
        Bar(
            f"`loraq quantize` takes at its peak ≤ {models.BAR_COPIES} fp32 copies of the largest "
            "tensor a worker",
            peaks,
            models.BAR_COPIES,
            False,
            "{:.1f} copies".format,
            where="whole models",
            reason=f"{'; '.join(allowed)}. What each process takes for itself, some hundred MB of "
            "torch above all, is counted.",
        ),
    ]


def is_large(row: Timing) -> bool:
    """Whether the bar of speed is about this row."""
    return row["tokens"] >= LARGE_TOKENS and min(int(row["n_in"]), int(row["n_out"])) >= LARGE_SIZE


def slow_product(rows: list[Timing]) -> str:
    """Return what explains a miss of `int8_row`, if so: the bare product is too slow."""
    product = [row["times_bf16"] for row in rows if row["contender"] == "int8 product"]
    slow = sum(ratio < BAR_SPEED for ratio in product)
    if not slow:
        return ""
    return (
        f"The bare INT8 product is itself below {BAR_SPEED} × bf16 in {slow} of these "
        f"{len(product)} measurements ({min(product):.2f} to {max(product):.2f} ×): there no INT8 "
        f"layer can be at {BAR_SPEED}."
    )


def percent(share: float) -> str:
    """Return a share as signed percents."""
    return f"{100 * share:+.0f} %"
