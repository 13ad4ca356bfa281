"""Records that benchmarks have saved, also under the names that earlier commits gave to things."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]

#: What a benchmark is called now, by what its older records call it.
RENAMED = {
    "linear_latency": "speed.layer",
    "block_latency": "speed.block",
    "solver_seconds": "speed.solver",
    "stream_models": "speed.stream",
    "quantize_throughput": "speed.rounding",
    "quality": "quality.run",
    "solver_error_per_second": "quality.methods",
    "scale_rules": "quality.scale_rules",
    "against_rivals": "rivals.run",
    "coverage": "architectures",
}
#: The same for the figures of a row. `rotation` and `self_calibration`, now tables of
#: `quality.run`, keep the form that they were saved in.
RENAMED_FIGURES = {
    "quality.run": {
        "bits": "bits_per_weight",
        "weight": "weight_error",
        "layers": "output_error",
        "velocity": "velocity_errors",
        "psnr": "psnr_db",
    },
    "rivals.run": {
        "table": "group",
        "contender": "label",
        "bits": "bits_per_weight",
        "output_error": "output_errors",
        "cpu_seconds": "seconds",
    },
}
#: Recipe of `speed.stream` by commit, for records whose rows do not name it: the default of then,
#: in the names of today.
STREAMED_RECIPES = {
    "f339d65": "mxfp4-a8+w6a8",
    "ce4749b": "mxfp4-a8+w8a8",
    "ab5d27f": "int4-a8+int8",
}


def read(folder: Path = RESULTS) -> list[Record]:
    """Return every record of every result file, oldest first. A file has one record a line."""
    lines = (
        line for path in sorted(folder.glob("*/*.json")) for line in path.read_text().splitlines()
    )
    records = (rename(json.loads(line)) for line in lines)
    return sorted(records, key=lambda record: record["date"])


def rename(record: Record) -> Record:
    """Return a record with the names of today."""
    benchmark = RENAMED.get(record["benchmark"], record["benchmark"])
    rows = record["rows"]
    if benchmark != record["benchmark"]:
        figures = RENAMED_FIGURES.get(benchmark, {})
        rows = [_rename_figures(row, figures) for row in rows]
    if benchmark == "speed.stream" and (recipe := STREAMED_RECIPES.get(record["commit"])):
        rows = [{"recipe": recipe, **row} for row in rows]
    return {**record, "benchmark": benchmark, "rows": rows}


def _rename_figures(row: dict[str, Any], figures: dict[str, str]) -> dict[str, Any]:
    renamed = {figures.get(name, name): value for name, value in row.items()}
    if renamed.get("loraq"):  # a row of `rivals.run` holds our row at the same bytes
        renamed["loraq"] = _rename_figures(renamed["loraq"], figures)
    if "peak_mb" in renamed:
        renamed["peak_bytes"] = round(renamed.pop("peak_mb") * 2**20)
    return renamed
