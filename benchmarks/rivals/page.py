"""The section on installable packages of docs/quality.md.

Every number is read from a result file of `benchmarks.rivals.run`.
"""

from collections.abc import Callable, Iterable

from benchmarks.pages import folded, source, table
from benchmarks.results import Record
from benchmarks.rivals.row import RivalRow

#: A rival's error over LoRaQ's is to be at least this.
BAR = 1 / 0.85

INTRO = """## Installable packages

The same weights, quantized without data by {packages} installable packages, each in an environment of its own and
through its public interface where it has one. Two matrices with the statistics of large transformers, and 16 layers of
the digits transformer, which are 192 wide; one seed.

Each ratio is the rival's error over that of LoRaQ (default effort, 6-bit branch, no rotation) in the same bytes or
fewer: above 1 LoRaQ is better. In turn for {tables}; "–" stands where nothing was measured,
"∅" where the bytes pay for no branch. "bits" and "weight error" are of {first}, every stored tensor counted;
`*` marks packages that keep unpacked codes or only simulate, counted as packed. In the last column the main path's
inputs are rounded to 4 bits; beside that our branch sees 8-bit inputs and theirs 16-bit ones.
"""


def newest(records: Iterable[Record]) -> Record | None:
    """Return the newest complete record, from records sorted by date."""
    found = [
        r
        for r in records
        if r["benchmark"] == "rivals.run" and "--" not in r["command"].replace("--save", "")
    ]
    return found[-1] if found else None


def rival_rows(record: Record | None) -> list[RivalRow]:
    """Return the rows of packages that a record has, each with LoRaQ's in the same bytes."""
    lines = [] if record is None else record["rows"]
    found = [RivalRow.from_record(row) for row in lines if "failure" not in row]
    return [row for row in found if row.package != "loraq"]


def section(records: Iterable[Record]) -> str:
    """Return the section for these records, which are sorted by date; empty without one."""
    record = newest(records)
    if record is None:
        return ""
    rows = rival_rows(record)
    titles = tuple(dict.fromkeys(row.group for row in rows))
    rivals: dict[str, dict[str, RivalRow]] = {}
    for row in rows:
        rivals.setdefault(row.label, {})[row.group] = row
    body = []
    for name, by_title in rivals.items():
        first = by_title[titles[0]]
        mark = "" if first.counted == "stored" else " *"
        columns = (
            " / ".join(shown(by_title.get(title), kind) for title in titles)
            for kind in (weight, output)
        )
        figures = (f"{first.bits_per_weight:.3f}", f"{first.weight_error:.4f}")
        body.append([f"{name}{mark}", *figures, *columns])
    intro = INTRO.format(
        packages=len({row.package for row in rows}), tables=" / ".join(titles), first=titles[0]
    )
    headings = (
        "",
        "bits",
        "weight error",
        "ratio, weight",
        "ratio, output with 4-bit activations",
    )
    raw = folded(f"All {len(rivals)} rows of packages", table(headings, body, "lrrll"))
    return "\n".join([intro, f"{source(record)}\n", *verdict(rows), *raw])


def verdict(rows: list[RivalRow]) -> list[str]:
    """Return the lines that say whether the bar is kept."""
    lines = []
    for what, kind, bar in (
        (f"weight error ≥ {BAR:.3f} times LoRaQ's", weight, BAR),
        ("output error with 4-bit activations ≥ LoRaQ's", output, 1.0),
    ):
        found = [(ratio, row) for row in rows if (ratio := kind(row)) is not None]
        worst, rival = min(found, key=lambda pair: pair[0])
        place = f"{worst:.3f} ({rival.label}, {rival.group})"
        below = sum(ratio < bar for ratio, _ in found)
        said = "met" if not below else f"**MISSED** by {below}"
        lines.append([what, place, str(len(found)), said])
    return table(("bar", "worst", "compared", ""), lines, "lrrl")


def weight(row: RivalRow) -> float | None:
    """Return the ratio of weight errors, or `None` if no LoRaQ layer fits the bytes."""
    return row.weight_error / row.loraq.weight_error if row.loraq else None


def output(row: RivalRow) -> float | None:
    """Return the ratio of output errors with 4-bit activations, or `None` where there is none."""
    theirs = row.output_errors["A4"]
    return theirs / row.loraq.output_errors["A4"] if theirs and row.loraq else None


def shown(row: RivalRow | None, kind: Callable[[RivalRow], float | None]) -> str:
    """Return a ratio as the table shows it."""
    if row is None:
        return "–"
    ratio = kind(row)
    return f"{ratio:.2f}" if ratio is not None else ("∅" if not row.loraq else "–")
