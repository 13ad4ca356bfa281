"""What the generated pages share: tables, folds, and the sentence that says where one is from."""

from collections.abc import Iterable
from html import escape

from benchmarks.results import Record


def table(headings: Iterable[str], rows: Iterable[Iterable[str]], align: str = "") -> list[str]:
    """Return the lines of a Markdown table, and an empty one.

    Args:
        headings: of the columns.
        rows: the cells of each line.
        align: a letter for each column, `l` left or `r` right; the first column to the left and
            the others to the right if nothing is said.
    """
    headings = list(headings)
    marks = {"l": "|---", "r": "|--:"}
    rule = "".join(marks[side] for side in align or "l" + "r" * (len(headings) - 1))
    return [_line(headings), rule + "|", *(_line(row) for row in rows), ""]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def folded(summary: str, lines: Iterable[str]) -> list[str]:
    """Return lines that a page shows when somebody opens them.

    The attribute lets mkdocs read what is inside as Markdown (`md_in_html`); others ignore it.

    Args:
        summary: what stands there instead; plain text.
        lines: Markdown.
    """
    opening = ['<details markdown="1">', f"<summary>{escape(summary, quote=False)}</summary>", ""]
    return [*opening, *lines, "</details>", ""]


def extent(values: Iterable[float], form: str = "{:.2f}") -> str:
    """Return the lowest and the highest value in a form, or one of them if they look alike."""
    ordered = sorted(values)
    low, high = form.format(ordered[0]), form.format(ordered[-1])
    return low if low == high else f"{low} to {high}"


def source(record: Record) -> str:
    """Return the sentence that says where a table's numbers come from."""
    changed = ", **with changes that were not committed**" if record["changed"] else ""
    command, now = record["command"], f"benchmarks.{record['benchmark']}"
    renamed = "" if now in command else f" (`{now}` now)"
    return (
        f"`{command}`{renamed}, {record['date'][:10]}, commit {record['commit']}{changed}; torch "
        f"{record['torch']}, {record['cpu_count']} cores."
    )
