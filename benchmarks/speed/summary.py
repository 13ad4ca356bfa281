"""The page of timings in ten lines, each counted from the newest result files."""

from collections import Counter
from statistics import median
from typing import Any

from benchmarks.pages import extent
from benchmarks.results import Record
from benchmarks.speed import bars, models
from benchmarks.speed.bars import LARGE_TOKENS, MET, MISSED, NO_FILE
from benchmarks.speed.machines import named, newest

#: Contenders of one layer that stand in a line of the summary, by what they are called in it.
LAYERS = {
    "low_memory a16": "`low_memory`",
    "resident a16": "`resident`",
    "int8_row": "`int8_row`",
    "openvino": "`openvino`",
    "fp8_row": "`fp8_row`",
    "triton": "`triton`",
}
#: The same for engines.
ENGINES = {
    "torch low_memory": "`low_memory`",
    "torch resident": "`resident`",
    "torch openvino": "`openvino`, layer by layer",
    "openvino bf16": "one graph of OpenVINO (`loraq export`)",
    "onnxruntime 4": "one of ONNX Runtime",
}


def section(records: list[Record]) -> list[str]:
    """Return the section for records sorted by date."""
    lines = [
        *of_bars(records),
        *of_layers(records),
        *of_steps(records),
        *of_engines(records),
        *of_solver(records),
        *of_models(records),
        *of_gpus(records),
    ]
    return ["## In short", "", *(f"* {line}" for line in lines), ""]


def of_bars(records: list[Record]) -> list[str]:
    """Return the line that counts the bars."""
    found = Counter(bar.said() for bar in bars.every(records))
    return [
        f"**Bars**: {found[MET]} met, {found[MISSED]} missed, {found[NO_FILE]} without a result "
        "file; the table is below."
    ]


def of_layers(records: list[Record]) -> list[str]:
    """Return a line for each machine: the median of each back end."""
    lines = []
    for machine, by_model in newest(records, "speed.layer", "model").items():
        rows = [row for record in by_model.values() for row in record["rows"]]
        large = [row for row in rows if row["tokens"] >= LARGE_TOKENS]
        said = [
            f"{name} {median(ratios):.2f}"
            for contender, name in LAYERS.items()
            if (ratios := [r["times_bf16"] for r in large if r["contender"] == contender])
        ]
        if said:
            lines.append(
                f"**A layer** from {LARGE_TOKENS} tokens, median of × bf16 ({named(machine)}): "
                f"{', '.join(said)}."
            )
    return lines


def of_steps(records: list[Record]) -> list[str]:
    """Return the line of a denoising step and of the memory of its weights."""
    steps = of_what(records, "speed.block", "step")
    if not steps:
        return []
    floats = extent((row["mib"] for row in steps if row["contender"] == "bf16"), "{:.0f}")
    said = [
        f"{name} {extent(row['times_bf16'] for row in mine)} × bf16 in "
        f"{extent((row['mib'] for row in mine), '{:.0f}')} MiB"
        for contender, name in LAYERS.items()
        if (mine := [row for row in steps if row["contender"] == contender])
    ]
    return [f"**A step of PixArt-Σ**, whose weights take {floats} MiB in bf16: {', '.join(said)}."]


def of_engines(records: list[Record]) -> list[str]:
    """Return the line of engines beside each other."""
    steps = of_what(records, "speed.engines", "step")
    if not steps:
        return []
    said = [
        f"{name} {extent(row['times_bf16'] for row in mine)} × bf16, "
        f"{extent((row['mib'] for row in mine), '{:.0f}')} MiB"
        for contender, name in ENGINES.items()
        if (mine := [row for row in steps if row["contender"] == contender])
    ]
    floats = extent((row["mib"] for row in steps if row["contender"] == "torch bf16"), "{:.0f}")
    return [
        f"**Engines**, the same step with the peak of a forward ({floats} MiB in bf16): "
        f"{'; '.join(said)}."
    ]


def of_solver(records: list[Record]) -> list[str]:
    """Return the line of the solver at effort default: seconds before and after."""
    runs = [record for record in records if record["benchmark"] == "speed.solver"]
    before, after = (
        {(tuple(row["shape"]), row["scheme"]): row for row in of_label}
        for of_label in (
            [
                row
                for record in runs
                for row in record["rows"]
                if (row["label"], row.get("effort", "default")) == (label, "default")
            ]
            for label in ("before", "after")
        )
    )
    said = []
    for shape in {shape: None for shape, _ in after}:
        new = [row for key, row in after.items() if key[0] == shape]
        old = [row["seconds"] for key, row in before.items() if key[0] == shape and key in after]
        how = ["extrapolated"] if any(row["extrapolated"] for row in new) else []
        how += [f"before {extent(old, '{:.1f}')}"] if old else []
        text = f"{shape[0]}×{shape[1]} {extent((row['seconds'] for row in new), '{:.1f}')}"
        said.append(text + (f" ({', '.join(how)})" if how else ""))
    return [f"**The solver**, seconds a layer: {', '.join(said)}."] if said else []


def of_models(records: list[Record]) -> list[str]:
    """Return the lines of whole models: how long, and in how much memory."""
    found = models.judged(records)
    if not found:
        return []
    said = [f"{run.title} at effort {run.effort} {run.time}" for run in found]
    peaks: dict[str, list[float]] = {}
    for run in found:
        peaks.setdefault(run.title, []).append(run.peak_bytes / 1e9)
    memory = [f"{title} {extent(values)}" for title, values in peaks.items()]
    return [
        f"**Whole models**, on two cores: {'; '.join(said)}.",
        f"**Memory while quantizing**, GB of all processes: {', '.join(memory)}.",
    ]


def of_gpus(records: list[Record]) -> list[str]:
    """Return the line on GPUs, where none was measured."""
    if any(record["device"] != "cpu" for record in records):
        return []
    return ["**GPUs**: not measured, and nothing is claimed for them."]


def of_what(records: list[Record], benchmark: str, what: str) -> list[dict[str, Any]]:
    """Return the newest rows of one thing, of all machines."""
    return [
        row
        for by_what in newest(records, benchmark, "what").values()
        if what in by_what
        for row in by_what[what]["rows"]
    ]
