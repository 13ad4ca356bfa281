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


def newest(records: Iterable[Record]) -> list[Record]:
    """Return the newest record of all packages, and later ones of some (`--only`), oldest first.

    Args:
        records: sorted by date.
    """
    found: list[Record] = []
    for record in records:
        if record["benchmark"] != "rivals.run" or "--quick" in record["command"]:
            continue
        if "--only" not in record["command"]:
            found = [record]
        elif found:
            found.append(record)
    return found


def rival_rows(records: Iterable[Record]) -> list[RivalRow]:
    """Return the newest row of each package and table, each with LoRaQ's in the same bytes."""
    found: dict[tuple[str, str], RivalRow] = {}
    for record in records:
        for line in record["rows"]:
            if "failure" not in line:
                row = RivalRow.from_record(line)
                found[row.label, row.group] = row
    return [row for row in found.values() if row.package != "loraq"]


def section(records: Iterable[Record]) -> str:
    """Return the section for these records, which are sorted by date; empty without one."""
    found = newest(records)
    if not found:
        return ""
    rows = rival_rows(found)
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
    return "\n".join([intro, *(f"{source(record)}\n" for record in found), *verdict(rows), *raw])


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
