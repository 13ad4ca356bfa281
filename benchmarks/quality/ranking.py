"""Who is judged by what: the declared LoRaQ row, the strongest rival, and what their ratio says."""

from collections.abc import Sequence, Set
from math import sqrt
from statistics import fmean, stdev
from typing import NamedTuple

from benchmarks.quality import ledger
from benchmarks.quality.row import ModelRow
from benchmarks.quality.tables import (
    COMPARISONS,
    FINALISTS,
    NARROWED,
    QUALIFYING,
    SEEDS,
    WEIGHED,
)
from loraq.evaluation.contender import Contender

#: Two-sided 95 % quantile of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
#: The world whose rows take seconds, so that all of them are measured there.
FIRST = "digits"
#: Rows that differ by less than this many bits store the same.
SAME_BITS = 0.05
Lines = dict[ledger.RowKey, dict[int, ledger.Line]]


def qualifiers(lines: Lines, world: str, group: str) -> set[int]:
    """Return the rows of a table that are measured on the qualifying seeds, by their index.

    They are all rows, but where statistics are weighed by sensitivity: there they are the judged
    rows, and the rivals that are strongest without it of those that store no more than one of them.
    """
    rows = COMPARISONS[group].entrants
    if not group.endswith(WEIGHED):
        return set(range(len(rows)))
    index = {name_of(row): i for i, row in enumerate(rows)}
    chosen = {i for i, row in enumerate(rows) if is_declared(row, group) or is_beside(row, group)}
    names = {name_of(rows[i]) for i in chosen}
    qualified = ledger.rows(lines, world, group.removesuffix(WEIGHED), QUALIFYING)
    for ours in (row for row in qualified if name_of(row) in names):
        # Rows that need calls told apart have none there.
        best = [name for row in strongest(qualified, ours) if (name := name_of(row)) in index]
        chosen |= {index[name] for name in best[:NARROWED]}
    return chosen


def count_qualified(lines: Lines, world: str, group: str) -> tuple[int, int]:
    """Return how many of the rows that are to qualify in a table did so, and how many they are."""
    entrants = COMPARISONS[group].entrants
    wanted = {name_of(entrants[i]) for i in qualifiers(lines, FIRST, group)}
    met = set(map(name_of, ledger.rows(lines, world, group, QUALIFYING)))
    return len(wanted & met), len(wanted)


def finalists(lines: Lines, world: str, group: str) -> set[int]:
    """Return the rows of a table that are measured on the page's seeds, by their index.

    They are the declared one, those that are judged beside it or were declared before, those as
    published, and the strongest rivals in the qualification that store no more than one of these.
    LoRaQ's own row is never chosen by its result here. Of a world without a qualification of its
    own they are those of `FIRST`. Who has met one of the page's seeds meets the others too.
    """
    comparison = COMPARISONS[group]
    rows = comparison.entrants
    index = {name_of(row): i for i, row in enumerate(rows)}
    chosen = {
        i
        for i, row in enumerate(rows)
        if row.as_published
        or is_declared(row, group)
        or is_withdrawn(row, group)
        or is_beside(row, group)
    }
    measured = final_rows(lines, world, group)
    chosen |= {index[name] for name in map(name_of, measured) if name in index}
    qualified = ledger.rows(lines, world, group, QUALIFYING) or ledger.rows(
        lines, FIRST, group, QUALIFYING
    )
    for ours in (declared(qualified, group), *(row for _, row in judged_too(qualified, group))):
        best = strongest(qualified, ours)[:FINALISTS]
        chosen |= {index[name] for name in map(name_of, best) if name in index}
    return chosen


def unmeasured(lines: Lines, world: str, group: str) -> int:
    """Return how many finalists of a table have no line on the page's seeds: nobody met them."""
    met = set(map(name_of, final_rows(lines, world, group)))
    entrants = COMPARISONS[group].entrants
    return sum(name_of(entrants[i]) not in met for i in finalists(lines, world, group))


def name_of(row: Contender | ModelRow) -> tuple[str, str, str]:
    """Return what tells a row of a table apart."""
    return row.label, row.recipe, row.budget or ""


def is_declared(row: Contender | ModelRow, group: str) -> bool:
    """Whether a row is the one that its table is judged by."""
    comparison = COMPARISONS.get(group)
    ours = comparison and (comparison.label, comparison.declared, comparison.budget)
    return name_of(row) == ours


def is_beside(row: Contender | ModelRow, group: str) -> bool:
    """Whether a row is judged beside the declared one."""
    comparison = COMPARISONS.get(group)
    return comparison is not None and name_of(row) in {
        (comparison.label, recipe, comparison.budget) for recipe, _ in comparison.beside
    }


def is_withdrawn(row: Contender | ModelRow, group: str) -> bool:
    """Whether a table was judged by a row before."""
    comparison = COMPARISONS.get(group)
    return comparison is not None and name_of(row) in {
        ("LoRaQ", recipe, comparison.budget) for recipe in comparison.withdrawn
    }


def declared(rows: Sequence[ModelRow], group: str) -> ModelRow | None:
    """Return the row that a table is judged by, if it is measured."""
    return next((row for row in rows if is_declared(row, group)), None)


def withdrawn(rows: Sequence[ModelRow], group: str) -> list[ModelRow]:
    """Return the rows that a table was judged by before."""
    return [row for row in rows if is_withdrawn(row, group)]


def beside(rows: Sequence[ModelRow], group: str) -> list[tuple[str, ModelRow]]:
    """Return the rows that are judged beside the declared one, each with what it is."""
    why = dict(COMPARISONS[group].beside)
    return [(why[row.recipe], row) for row in rows if is_beside(row, group)]


def judged_too(rows: Sequence[ModelRow], group: str) -> list[tuple[str, ModelRow]]:
    """Return all other rows that have a verdict, each with what it is."""
    before = [("declared before, and withdrawn", row) for row in withdrawn(rows, group)]
    return before + beside(rows, group)


def rivals(rows: Sequence[ModelRow], ours: ModelRow | None) -> list[ModelRow]:
    """Return the rows of other methods that store no more than a row of ours."""
    most = ours.bits_per_weight + SAME_BITS if ours else float("inf")
    return [row for row in rows if row.method != "loraq" and row.bits_per_weight <= most]


def strongest(rows: Sequence[ModelRow], ours: ModelRow | None) -> list[ModelRow]:
    """Return the rivals of a row of ours, the least error first."""
    return sorted(rivals(rows, ours), key=lambda row: fmean(row.velocity_errors))


class Verdict(NamedTuple):
    """A table's strongest rival against its declared row."""

    rival: ModelRow
    ours: ModelRow
    #: Rival / ours, run by run.
    ratios: list[float]
    bar: float

    @property
    def outcome(self) -> str:
        """Won, tied or lost by the confidence interval, or not judged."""
        mean, half = fmean(self.ratios), half_width(self.ratios)
        if len(self.ratios) < 2:
            return "not judged"
        return "won" if mean - half > 1 else "lost" if mean + half < 1 else "tied"

    @property
    def is_met(self) -> bool:
        """Whether the bar is met: by the mean, of several seeds."""
        return len(self.ratios) > 1 and fmean(self.ratios) >= self.bar

    @property
    def said(self) -> str:
        """The outcome, and whether the bar is met."""
        if len(self.ratios) < 2:
            return "not judged: one seed"
        won = "won" if self.outcome == "won" else f"**{self.outcome}**"
        few = "" if len(self.ratios) == len(SEEDS) else f"; {len(self.ratios)} seeds"
        return f"{won}, bar {self.bar:.2f} {'met' if self.is_met else '**missed**'}{few}"


def verdict(rows: Sequence[ModelRow], group: str, ours: ModelRow | None = None) -> Verdict | None:
    """Return the verdict on a table, by the seeds that a row of ours and all its rivals have.

    Args:
        rows: of the table.
        group: its title.
        ours: the row that is judged; by default the declared one.
    """
    ours = ours or declared(rows, group)
    if ours is None:
        return None
    field = rivals(rows, ours)
    # On other seeds a run has not met them all yet, and the strongest take longest.
    shared = set(ours.seeds).intersection(*(rival.seeds for rival in field))
    if not field or not shared:
        return None
    rival = min(field, key=lambda rival: fmean(ratios(rival, ours, shared)))
    return Verdict(rival, ours, ratios(rival, ours, shared), COMPARISONS[group].bar)


def ratios(row: ModelRow, reference: ModelRow, seeds: Set[int] | None = None) -> list[float]:
    """Return the ratio of two rows' velocity errors, run by run.

    Args:
        row: above.
        reference: below.
        seeds: of the runs; by default those that both have.
    """
    theirs = dict(zip(reference.seeds, reference.velocity_errors, strict=True))
    pairs = zip(row.seeds, row.velocity_errors, strict=True)
    wanted = theirs.keys() if seeds is None else seeds & theirs.keys()
    return [error / theirs[seed] for seed, error in pairs if seed in wanted]


def half_width(values: Sequence[float]) -> float:
    """Return half the width of a 95 % confidence interval of the mean; 0 for one value."""
    return STUDENT[len(values) - 1] * stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def interval(values: Sequence[float], digits: int) -> str:
    """Return the mean and half the width of its 95 % confidence interval."""
    half = f" ± {half_width(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{half}"


def final_rows(lines: Lines, world: str, group: str) -> list[ModelRow]:
    """Return the rows of a table that are measured on the page's seeds."""
    return ledger.rows(lines, world, group, SEEDS)
