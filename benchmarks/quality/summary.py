"""The page of quality in ten lines, each counted from the same rows as its tables."""

from collections import Counter
from collections.abc import Iterable
from statistics import fmean, median

from benchmarks.pages import extent
from benchmarks.quality import ledger
from benchmarks.quality.field import ROUNDS
from benchmarks.quality.ranking import (
    Lines,
    Verdict,
    beside,
    count_qualified,
    declared,
    final_rows,
    name_of,
    ratios,
    verdict,
    withdrawn,
)
from benchmarks.quality.tables import (
    COMPARISONS,
    FINER,
    SEEDS,
    WEIGHED,
    WITH,
    WITHOUT,
    finer_weights,
)
from benchmarks.quality.unqualified import unqualified
from benchmarks.results import Record
from benchmarks.rivals import page as packages
from benchmarks.worlds.world import WORLDS

#: Widths of activations, by how the titles of their tables begin.
WIDTHS = {"W4A16": "16-bit activations", "W4A8": "8-bit", "W4A4": "4-bit"}
#: Labels of rows that are what others publish.
OTHERS = ("SVDQuant as published", "SVDQuant + GPTQ as published", "ConvRot")
#: A table: its world and its title.
Place = tuple[str, str]


def section(lines: Lines, records: list[Record]) -> list[str]:
    """Return the section for the lines of the ledger and for records sorted by date."""
    verdicts = {
        (world, title): found
        for world in WORLDS
        for title in COMPARISONS
        if (found := verdict(final_rows(lines, world, title), title))
    }
    said = [
        *of_worlds(verdicts),
        *of_widths(verdicts),
        *of_withdrawn(lines),
        *of_rows_beside(lines),
        *of_strongest(verdicts),
        *of_others(lines),
        *of_samples(verdicts),
        *of_sensitivity(lines),
        *of_finer_weights(lines),
        *of_packages(records),
        *of_limits(lines, verdicts),
    ]
    return ["## In short", "", *(f"* {line}" for line in said or ["Not measured yet."]), ""]


def counted(verdicts: Iterable[Verdict]) -> str:
    """Return how many tables were won, tied and lost."""
    found = Counter(each.outcome for each in verdicts)
    unclear = found.total() - sum(found[name] for name in ("won", "tied", "lost"))
    tail = f", {unclear} not judged" if unclear else ""
    return f"{found['won']} won, {found['tied']} tied, {found['lost']} lost{tail}"


def of_worlds(verdicts: dict[Place, Verdict]) -> list[str]:
    """Return a line for each transformer."""
    said = []
    for world in WORLDS:
        tables = {title: found for (there, title), found in verdicts.items() if there == world}
        mine = list(tables.values())
        if mine:
            met = sum(found.is_met for found in mine)
            missed = sum(found.outcome != "not judged" for found in mine) - met
            means = [fmean(found.ratios) for found in mine]
            said.append(
                f"**{world}**: of {len(mine)} tables {counted(mine)} ({_by_kind(tables)}). The "
                f"strongest rival has {extent(means)} times the error of the declared row; the bar "
                f"on that is met in {met} and missed in {missed}."
            )
    return said


def _by_kind(tables: dict[str, Verdict]) -> str:
    """Return the counts of tables by what everyone was given."""
    parts = []
    for kind in (WITHOUT, WITH, WEIGHED):
        if mine := [found for title, found in tables.items() if title.endswith(kind)]:
            parts.append(f"{kind.removeprefix(', ')} {counted(mine)}")
    return "; ".join(parts)


def of_widths(verdicts: dict[Place, Verdict]) -> list[str]:
    """Return the line that counts tables by their activations."""
    said = [
        f"{name} {counted(mine)}"
        for width, name in WIDTHS.items()
        if (mine := [found for (_, title), found in verdicts.items() if title.startswith(width)])
    ]
    return [f"**By activations**, both together: {'; '.join(said)}."] if said else []


def of_withdrawn(lines: Lines) -> list[str]:
    """Return the line of the rows that were declared before."""
    found = [
        judged
        for world in WORLDS
        for title in COMPARISONS
        for rows in [final_rows(lines, world, title)]
        for before in withdrawn(rows, title)
        if (judged := verdict(rows, title, before))
    ]
    return (
        [
            f"**Withdrawn**: {len(found)} verdicts on rows that were declared before these, "
            f"{counted(found)}; they stay folded under the table."
        ]
        if found
        else []
    )


def of_rows_beside(lines: Lines) -> list[str]:
    """Return the line of the rows that are judged beside the declared ones."""
    found: dict[str, list[str]] = {}
    for title in COMPARISONS:
        for world in WORLDS:
            rows = final_rows(lines, world, title)
            for what, row in beside(rows, title):
                if judged := verdict(rows, title, row):
                    place = f"{what}, {title.partition(', ')[2]}"
                    said = f"{world} {judged.outcome}, {fmean(judged.ratios):.2f}"
                    found.setdefault(place, []).append(said)
    places = [f"{place}: {', '.join(each)}" for place, each in found.items()]
    return [f"**Beside the declared rows**, the same ratio: {'; '.join(places)}."] * bool(places)


def of_strongest(verdicts: dict[Place, Verdict]) -> list[str]:
    """Return the line that says who the strongest rivals are."""
    if not verdicts:
        return []
    found = Counter(each.rival.label.split(",")[0] for each in verdicts.values())
    same = sum(each.rival.recipe == each.ours.recipe for each in verdicts.values())
    said = [f"{label} in {n}" for label, n in found.most_common()]
    return [
        f"**The strongest rival** is {', '.join(said)}; in {same} of {len(verdicts)} tables in the "
        "very formats of the declared row."
    ]


def of_others(lines: Lines) -> list[str]:
    """Return the line of what others leave as they were published."""
    found: dict[str, list[float]] = {}
    for world in WORLDS:
        for title in COMPARISONS:
            rows = final_rows(lines, world, title)
            ours = declared(rows, title)
            for row in rows if ours else []:
                if row.label in OTHERS and ours and (shared := ratios(row, ours)):
                    found.setdefault(row.label, []).append(fmean(shared))
    said = [
        f"{name} {extent(values)} times (median {median(values):.2f})"
        for name, values in found.items()
    ]
    return [f"**As published**, the error over the declared row's: {', '.join(said)}."] * bool(said)


def of_samples(verdicts: dict[Place, Verdict]) -> list[str]:
    """Return the line of what the model's own samples buy."""
    found = []
    for (world, title), with_samples in verdicts.items():
        alone = verdicts.get((world, title.replace(WITH, WITHOUT)))
        if title.endswith(WITH) and alone:
            found.append(velocity(with_samples) / velocity(alone))
    return (
        [
            f"**Own samples** leave the declared rows {extent(found)} times the error that they "
            "have from weights alone."
        ]
        if found
        else []
    )


def velocity(found: Verdict) -> float:
    """Return the velocity error of a declared row."""
    return fmean(found.ours.velocity_errors)


def weighed_by_sensitivity(lines: Lines) -> tuple[list[float], list[float]]:
    """Return errors with statistics by sensitivity over those without: LoRaQ's, and rivals'."""
    ours: list[float] = []
    rivals: list[float] = []
    for world in WORLDS:
        for title in COMPARISONS:
            if not title.endswith(WEIGHED):
                continue
            plain = {
                name_of(row): row for row in final_rows(lines, world, title.removesuffix(WEIGHED))
            }
            for row in final_rows(lines, world, title):
                before = plain.get(name_of(row))
                if before and (shared := ratios(row, before)):
                    (ours if row.method == "loraq" else rivals).append(fmean(shared))
    return ours, rivals


def of_sensitivity(lines: Lines) -> list[str]:
    """Return the line of what statistics by sensitivity bring."""
    ours, rivals = weighed_by_sensitivity(lines)
    if not ours or not rivals:
        return []
    return [
        "**Own samples weighed by sensitivity** (`loraq stats --sensitivity`) leave LoRaQ's rows "
        f"{extent(ours)} times the error that they have without, and rivals' {extent(rivals)} "
        "times."
    ]


def of_finer_weights(lines: Lines) -> list[str]:
    """Return the line of what 4-bit main weights cost beside 4-bit activations."""
    found: dict[str, list[float]] = {}
    for world in WORLDS:
        for title in finer_weights():
            rows = {row.label: row for row in ledger.rows(lines, world, title, SEEDS)}
            shared = [
                ratios(rows[label + FINER], row)
                for label, row in rows.items()
                if label + FINER in rows
            ]
            found.setdefault(title.split(", ")[-1], []).extend(map(fmean, filter(None, shared)))
    said = [f"{what} {extent(values)} times" for what, values in found.items() if values]
    return [
        "**Room in W4A4**: with 8-bit main weights beside the same activations and branch, "
        f"{', '.join(said)} the error. Nearly all of that is of 4-bit activations, which all "
        "methods share."
    ] * bool(said)


def of_packages(records: list[Record]) -> list[str]:
    """Return the line of installable packages."""
    rows = packages.rival_rows(packages.newest(records))
    found = [ratio for row in rows if (ratio := packages.weight(row)) is not None]
    if not found:
        return []
    kept = sum(ratio >= packages.BAR for ratio in found)
    return [
        f"**Installable packages**, without data: {kept} of {len(found)} comparisons of weight "
        f"error keep the bar of {packages.BAR:.3f} times LoRaQ's; {extent(found)} times."
    ]


def of_limits(lines: Lines, verdicts: dict[Place, Verdict]) -> list[str]:
    """Return the line of what was not measured."""
    said = []
    for world in WORLDS:
        mine = [len(found.ratios) for (there, _), found in verdicts.items() if there == world]
        if not mine:
            continue
        seeds = f"{world} has {extent(mine, '{}')} of {len(SEEDS)} seeds"
        counts = [count_qualified(lines, world, title) for title in COMPARISONS]
        met, total = map(sum, zip(*counts, strict=True))
        qualified = f"{met} of {total} rows in the qualification"
        said.append(f"{seeds}, {qualified}")
    if not said:
        return []
    for title in COMPARISONS:
        if rows_of := unqualified(lines, title):
            said.append(
                f"in {title} {rows_of.count} of SVDQuant ×{ROUNDS[-1]} did not qualify: with "
                f"{rows_of.needed:.2f} times the error of its twin ×{ROUNDS[-2]} the nearest would "
                f"be a finalist, and the {len(rows_of.measured)} that did have "
                f"{extent(rows_of.measured)} times"
            )
    return [
        f"**What is missing**: {'; '.join(said)}. Both transformers are small; nothing here is "
        "measured on a published model."
    ]
