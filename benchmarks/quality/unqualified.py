"""Rows without a line in the qualification: how far they are from the finalists.

Those are SVDQuant's with the most rounds, which take longest. Each has a twin with fewer, whose
error tells how much less it would have to have.
"""

from collections.abc import Iterable
from statistics import fmean
from typing import NamedTuple

from benchmarks.quality import ledger
from benchmarks.quality.field import ROUNDS
from benchmarks.quality.ranking import (
    FIRST,
    SAME_BITS,
    Lines,
    declared,
    judged_too,
    name_of,
    qualifiers,
    strongest,
)
from benchmarks.quality.tables import COMPARISONS, FINALISTS, QUALIFYING

Name = tuple[str, str, str]


class Unqualified(NamedTuple):
    """What is known of the rows of a table that did not qualify."""

    count: int
    #: With so many times the error of its twin the nearest of them would be a finalist.
    needed: float
    #: What rows with the most rounds have, where they are measured.
    measured: list[float]


def unqualified(lines: Lines, group: str) -> Unqualified | None:
    """Return what is known of them; `None` if there are none, or none that has a twin."""
    rows = ledger.rows(lines, FIRST, group, QUALIFYING)
    errors = {name_of(row): fmean(row.velocity_errors) for row in rows}
    bits = {name_of(row): row.bits_per_weight for row in rows}
    entrants = COMPARISONS[group].entrants
    names = [name_of(entrants[i]) for i in sorted(qualifiers(lines, FIRST, group))]
    bounds = []
    for ours in (declared(rows, group), *(row for _, row in judged_too(rows, group))):
        best = strongest(rows, ours)[:FINALISTS]
        if ours and len(best) == FINALISTS:
            bounds.append((ours.bits_per_weight + SAME_BITS, fmean(best[-1].velocity_errors)))
    twins = [(name, twin) for name in names if (twin := _twin_of(name)) in errors]
    missing = [twin for name, twin in twins if name not in errors]
    needed = [
        bound / errors[twin] for twin in missing for most, bound in bounds if bits[twin] <= most
    ]
    if not needed:
        return None
    measured = sorted(_ratios(lines, group, twins))
    return Unqualified(len(missing), max(needed), measured)


def _twin_of(name: Name) -> Name:
    label, *others = name
    return label.replace(f"×{ROUNDS[-1]}", f"×{ROUNDS[-2]}"), *others


def _ratios(lines: Lines, group: str, pairs: Iterable[tuple[Name, Name]]) -> Iterable[float]:
    """Return the errors of rows over those of their twins, each on the seeds that both have."""
    for pair in pairs:
        if pair[0] == pair[1]:
            continue
        row, twin = (lines.get((FIRST, group, *name), {}) for name in pair)
        if shared := [seed for seed in QUALIFYING if seed in row and seed in twin]:
            yield fmean(row[s]["velocity_error"] / twin[s]["velocity_error"] for s in shared)
