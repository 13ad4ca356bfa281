"""Every figure of the README is what a committed result file gives, or what the code computes."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from loraq.budget import Budget, with_rank
from loraq.cli.demo import print_demo
from loraq.recipe_names import NAMED, parse_scheme

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
if not README.is_file():
    pytest.skip("the documents are only in a clone of the repository", allow_module_level=True)
pytest.importorskip("diffusers")

from benchmarks.pages import extent, table  # noqa: E402
from benchmarks.quality import ledger  # noqa: E402
from benchmarks.quality.ranking import (  # noqa: E402
    Verdict,
    beside,
    final_rows,
    verdict,
    withdrawn,
)
from benchmarks.quality.summary import weighed_by_sensitivity  # noqa: E402
from benchmarks.quality.tables import COMPARISONS  # noqa: E402
from benchmarks.results import read  # noqa: E402
from loraq.evaluation.demo import HELPED, SHORT_ROUNDS, DemoRow  # noqa: E402

#: What hours are shown of, and under which name.
MODELS = {"pixart-sigma": "PixArt-Σ XL", "sana-1.6b": "SANA", "flux.1": "FLUX.1"}
#: What no run measures: numbers of bits, of rounds, of versions and papers.
NO_FIGURES = (
    r"\b\d+(-bit\b| bits?\b)|\balternated up to 100 times, mostly up to 20 where smoothed\b|"
    r"\bPython 3\.11\b|\b2604\.18117\b|\bApache-2\.0\b"
)
#: What a run measures: decimals, intervals, and numbers of what is counted.
FIGURE = r"\d+\.\d+|±|\b\d+(?= (?:%|(?:times|hours|minutes|seconds|million|layers|MB|GB)\b))"


def text() -> str:
    return README.read_text(encoding="utf-8")


def newest(benchmark: str) -> dict[str, Any]:
    return [record for record in read() if record["benchmark"] == benchmark][-1]


def stray_figures(page: str) -> list[str]:
    """Return the figures of a page that no test of a sentence or a table holds."""
    rest = re.sub(r"```.*?```|<!--.*?-->|\]\([^)]*\)", "", page, flags=re.DOTALL)
    rest = re.sub(r"^\|.* \| [\d.]+ B \| [\d.]+ \|$", "", rest, flags=re.MULTILINE)  # the hours
    rest = " ".join(rest.split())
    for sentence in SENTENCES:
        rest = rest.replace(sentence(), "")
    rest = re.sub(NO_FIGURES, "", rest)
    return re.findall(rf".{{0,30}}(?:{FIGURE}).{{0,20}}", rest)


@cache
def verdicts(world: str = "digits") -> dict[str, Any]:
    """Return those of the tables that are measured."""
    lines = ledger.read()
    found = {title: verdict(final_rows(lines, world, title), title) for title in COMPARISONS}
    return {title: one for title, one in found.items() if one is not None}


def counts(found: Iterable[Verdict]) -> list[int]:
    """Return how many are won, tied and lost."""
    said = [one.said for one in found]
    count = [sum(each.startswith(w) for each in said) for w in ("won", "**tied**", "**lost**")]
    assert sum(count) == len(said)
    return count


def demo() -> tuple[DemoRow, ...]:
    return tuple(DemoRow.from_record(row) for row in newest("quality.demo")["rows"])


def against_the_published() -> str:
    title = "W4A16, from weights alone"
    ours = verdicts()[title].ours
    main = ours.recipe.partition("+")[0]
    (published,) = (
        row
        for row in final_rows(ledger.read(), "digits", title)
        if row.label == "SVDQuant as published" and row.recipe.startswith(f"{main}+")
    )
    errors = fmean(ours.velocity_errors), fmean(published.velocity_errors)
    assert 0.5 < errors[0] / errors[1] < 0.6  # "nearly halves"
    assert len(ours.velocity_errors) == len(published.velocity_errors) == 5
    return (
        "over five seeds, LoRaQ nearly halves the velocity error of SVDQuant as it is published "
        f"({errors[0]:.4f} instead of {errors[1]:.4f}"
    )


def how_tables_end(found: Iterable[Verdict]) -> str:
    """Return what is said of the tables of one transformer, all of them measured alike."""
    found = list(found)
    won, tied, lost = counts(found)
    assert {len(one.ratios) for one in found} == {5}
    assert len(found) == len(COMPARISONS)
    least, most = (pick(fmean(one.ratios) for one in found) for pick in (min, max))
    met = sum(one.is_met for one in found)
    ratios = f"{least:.2f} to {most:.2f}; {met} bars met"
    return f"wins {won}, ties in {tied} and loses {lost} of {len(found)} tables ({ratios})"


def against_the_strongest() -> str:
    return f"on digits LoRaQ {how_tables_end(verdicts().values())}"


def on_photographs() -> str:
    return f"on a model of photographs it {how_tables_end(verdicts('patches').values())}"


def what_is_judged_beside() -> str:
    lines, said = ledger.read(), {}
    for title in COMPARISONS:
        rows = final_rows(lines, "digits", title)
        for what, row in beside(rows, title):
            found = verdict(rows, title, row)
            assert found is not None
            said[what, title] = f"{fmean(found.ratios):.2f} times", found.outcome
    with_samples = "W4A8, own samples"
    plain, smoothed = (
        said[what, with_samples] for what in ("default recipe", "default recipe, smoothed")
    )
    nvfp4 = said["NVFP4, a quarter bit more", "W4A4, own samples"]
    return (
        f"with samples the strongest rival has {plain[0]} the error of the default recipe "
        f"({plain[1]}), {smoothed[0]} with `-s` ({smoothed[1]}), and {nvfp4[0]} that of NVFP4 "
        f"({nvfp4[1]})"
    )


def what_was_withdrawn() -> str:
    lines = ledger.read()
    tables = {title: final_rows(lines, "digits", title) for title in COMPARISONS}
    before = [
        verdict(rows, title, row)
        for title, rows in tables.items()
        for row in withdrawn(rows, title)
    ]
    won, tied, lost = counts(before)
    return (
        f"On digits {len(before)} rows were declared before and withdrawn, which won {won}, "
        f"tied {tied} and lost {lost}"
    )


def bytes_of_a_branch() -> str:
    scheme = with_rank(parse_scheme("int4-a16+w8a8"), (1152, 1152), Budget.parse("r16=32"))
    return (
        f"a 16-bit branch of rank 32 takes the bytes of an 8-bit one of rank {scheme.branch.rank}"
    )


def bits_of_a_whole_model() -> str:
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    (bits,) = re.findall(r"^\| PixArt-Σ XL \|.*\| ([\d.]+) \|$", page, re.MULTILINE)
    return f"PixArt-Σ XL comes to {float(bits):.1f} bits a parameter"


def newest_hours() -> dict[str, dict[str, Any]]:
    """Return the newest row of each model of the table of hours."""
    return {
        row["model"]: row | {"date": record["date"][:10]}
        for record in read()
        if record["benchmark"] == "speed.stream"
        for row in record["rows"]
        if row["workers"] == 2 and row["effort"] == "fast"
    }


def hours_in_words() -> str:
    found = {round(row["parameters"] / 1e8) / 10: row for row in newest_hours().values()}
    small, large = min(found), max(found)
    assert found[small]["hours_for_all_layers"] < 0.5
    assert 1 <= found[large]["hours_for_all_layers"] < 2
    return f"minutes for {small:.1f} B parameters, an hour or two for {large:.0f} B"


def how_hours_are_counted() -> str:
    (layers,) = {row["layers"] for row in newest_hours().values()}
    return f"extrapolated from {layers} layers with random weights of the real shapes"


def rounds_of_the_demo() -> str:
    assert f"SVDQuant ×{SHORT_ROUNDS}" in text()
    return (
        f"SVDQuant ×{SHORT_ROUNDS}, which takes the SVD and rounds {SHORT_ROUNDS} times in turn "
        f"(`loraq demo --all`: {HELPED['rounds']})"
    )


def a_whole_run() -> str:
    record = newest("speed.stream")
    (row,) = (
        row
        for row in record["rows"]
        if (row["model"], row["effort"]) == ("pixart-sigma", "default")
    )
    command = re.sub(r" --(?:save|folder \S+)", "", record["command"])
    assert f"(`{command}`)" in text()
    assert row["layers"] == row["layers_of_the_model"]
    minutes, peak = round(row["seconds"] / 60), row["peak_anonymous_bytes"] / 1e9
    return (
        f"All {row['layers']} layers of PixArt-Σ XL at effort `default` took {minutes} minutes and "
        f"{peak:.1f} GB"
    )


def what_sensitivity_brings() -> str:
    ours, rivals = weighed_by_sensitivity(ledger.read())
    return (
        "`--sensitivity` weighs timesteps and outputs by what their errors do to the image: "
        f"{extent(ours)} times the velocity error (rivals given it {extent(rivals)})."
    )


def size_of_the_emoji_model() -> str:
    trained = demo()[0]
    return f"of {round(trained.memory / 2 / 1e6)} million parameters"


SENTENCES = (
    against_the_published,
    against_the_strongest,
    on_photographs,
    what_is_judged_beside,
    what_was_withdrawn,
    bytes_of_a_branch,
    bits_of_a_whole_model,
    hours_in_words,
    how_hours_are_counted,
    rounds_of_the_demo,
    a_whole_run,
    size_of_the_emoji_model,
    what_sensitivity_brings,
)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_says_what_was_measured(sentence):
    assert sentence() in " ".join(text().split())


def test_the_table_of_the_demo_is_that_of_its_newest_result_file(capsys):
    print_demo(demo())
    printed = capsys.readouterr().out.partition("\nVelocity error")[0].strip().splitlines()
    (shown,) = re.findall(r"<!-- demo -->\n```\n(.*?)```\n<!-- /demo -->", text(), re.DOTALL)
    assert [line.rstrip() for line in shown.strip().splitlines()] == [
        line.rstrip() for line in printed
    ]


def test_own_samples_more_than_halve_the_error():
    found = verdicts()
    alone, own = (found[f"W4A16, {way}"].ours for way in ("from weights alone", "own samples"))
    assert fmean(own.velocity_errors) < fmean(alone.velocity_errors) / 2


def test_the_hours_are_those_of_the_newest_run_of_each_model():
    found = newest_hours()
    dates = ", ".join(sorted({row["date"] for row in found.values()}))
    (layers,) = {row["layers"] for row in found.values()}
    (recipe,) = {row["recipe"] for row in found.values()}
    command = f"python -m benchmarks.speed.stream --layers {layers}"
    command += "" if recipe == NAMED["default"] else f" --recipe {recipe}"
    assert f"(`{command}`, {dates})" in text()
    body = []
    for model, name in MODELS.items():
        n, hours = found[model]["parameters"] / 1e9, found[model]["hours_for_all_layers"]
        digits = 0 if n >= 10 else 1
        body.append([name, f"{n:.{digits}f} B", f"{hours:.1f}"])
    assert "\n".join(table(("", "parameters", "hours"), body)) in text()


def test_no_other_figure_stands_there():
    assert stray_figures(text()) == []


@pytest.mark.parametrize("planted", ["1.3 better", "3 times", "in 12 minutes", "5 %", "2 ± 1"])
def test_a_planted_figure_is_found(planted):
    assert stray_figures(f"{text()}\nLoRaQ, {planted}.\n")


def test_it_is_short():
    assert len(text().splitlines()) <= 150
