"""Rivals get what LoRaQ gets: the property that makes the page of quality fair."""

from dataclasses import replace
from itertools import product

import pytest

pytest.importorskip("benchmarks")
pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from benchmarks.quality.field import OWN_SMOOTHING, ROUNDS, SMOOTHINGS
from benchmarks.quality.ranking import is_declared, is_withdrawn
from benchmarks.quality.tables import COMPARISONS
from loraq.methods import METHODS
from loraq.recipe_names import parse_scheme

tables = pytest.mark.parametrize("title", COMPARISONS)


def setting(row):
    """What a row is given: everything but its method, and how long that works."""
    return row.recipe, row.budget, row.statistics, row.rules, row.allocation


def rows_of(title):
    rows = COMPARISONS[title].entrants
    ours = [row for row in rows if row.method == "loraq"]
    assert ours
    return ours, [row for row in rows if row.method != "loraq"]


def is_like_ours(rival, statistics):
    """Whether a rival has scale search, and rank-space rotation, rounding and filter as ours."""
    scheme, method = parse_scheme(rival.recipe), METHODS[rival.method](**rival.options)
    quantized = scheme.branch.weight_format.bits < 16
    rounded = scheme.activation_format.bits < 16
    return (
        method.scale_rule == "search"
        and method.rotate is quantized
        and (not statistics or method.noise_filter is rounded)
    )


@tables
def test_for_each_row_of_ours_every_rival_has_a_row_with_the_same_help(title):
    ours, rivals = rows_of(title)
    statistics = COMPARISONS[title].statistics
    method = "gptq" if statistics else "svdquant"
    for row in ours:
        # Smoothing is an option of rivals, and in the name of ours.
        unsmoothed = replace(row, recipe=row.recipe.replace("-s-h", "-h"))
        alike = [r for r in rivals if setting(r) == setting(unsmoothed)]
        helped = [r for r in alike if r.method == method and is_like_ours(r, statistics)]
        assert {r.options.get("rounds", 1) for r in helped if not r.smoothing} == set(ROUNDS)
        assert any(r.method == ("qera" if statistics else "lqer") for r in alike)
        if statistics:
            smoothed = {(r.options["rounds"], r.smoothing) for r in helped if r.smoothing}
            # Ours is gated beside 4-bit activations, where statistics tell calls apart.
            is_gated = title == "W4A4, own samples"
            ways = (*SMOOTHINGS, OWN_SMOOTHING) if is_gated else SMOOTHINGS
            assert smoothed == set(product(ROUNDS, ways))


@tables
def test_a_smoothed_row_of_ours_stands_beside_every_branch_that_leaves_room(title):
    comparison, ours = COMPARISONS[title], {(row.recipe, row.budget) for row in rows_of(title)[0]}
    expected = {
        (f"{main.recipe}+{branch}-s-h{side}", main.budget)
        for main in comparison.mains
        for branch in set(main.branches) - set(main.full)
        for side in main.rotations
    }
    found = {row for row in ours if "-s-h" in row[0]}
    assert found == (expected if comparison.statistics else set())


@tables
def test_every_branch_precision_stands_beside_every_main_weight(title):
    ours, _ = rows_of(title)
    precisions = {}
    for row in ours:
        scheme = parse_scheme(row.recipe)
        kind = (scheme.weight, scheme.activation, scheme.rotation, row.budget)
        precisions.setdefault(kind, set()).add(scheme.branch.weight_format.bits)
    assert set(map(frozenset, precisions.values())) == {frozenset({16, 8, 6, 4})}


@tables
def test_every_main_weight_is_there_without_a_branch(title):
    ours, rivals = rows_of(title)
    plain = {row.recipe for row in rivals if "+" not in row.recipe}
    assert {f"{row.recipe.split('+')[0]}-h{row.recipe.split('-h')[1]}" for row in ours} <= plain


def test_native_formats_are_among_the_rivals_of_four_bit_activations():
    for title, comparison in COMPARISONS.items():
        if title.startswith("W4A4"):
            published = {row.recipe for row in comparison.entrants if row.as_published}
            assert {"int4-a4+bf16-h0", "nvfp4-a4+bf16-h0", "mxfp4-a4+bf16-h0"} <= published


@tables
def test_the_declared_row_is_one_and_rows_are_told_apart(title):
    comparison = COMPARISONS[title]
    ours, _ = rows_of(title)
    same = [row for row in ours if is_declared(row, title)]
    assert [row.effort or "fast" for row in same] == [comparison.effort]
    assert sum(is_withdrawn(row, title) for row in ours) == len(comparison.withdrawn)
    assert len({row.key for row in comparison.entrants}) == len(comparison.entrants)
    assert {row.statistics for row in comparison.entrants} == {comparison.statistics}
    assert comparison.bar == (1.10 if title.startswith("W4A4") else 1.05)
