"""The demo: its rows are comparable, and the report is drawn."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from loraq.budget import Budget
from loraq.errors import LoraqError
from loraq.evaluation import demo, digits
from loraq.evaluation.demo import CONTENDERS, DemoResult, DemoRow, run
from loraq.evaluation.page import draw_page
from loraq.evaluation.picture import draw, require_drawable, strips_of
from loraq.methods import EFFORTS
from loraq.recipe import Recipe
from loraq.recipe_names import NAMED

#: The shapes of the layers that are quantized in the shipped transformer.
SHAPES = [(192, 192), (768, 192), (192, 768)]

#: What decoding the largest layer takes: two bytes a value, and half as much on the way to them.
LARGEST = 3 * max(map(math.prod, SHAPES))

SUBJECT = digits.subject()

each_group = pytest.mark.parametrize("group", CONTENDERS)


@each_group
def test_every_contender_is_a_recipe_that_can_be_planned(group):
    for contender in CONTENDERS[group]:
        recipe = contender.to_recipe(budget=SUBJECT.budget, effort="fast")
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert recipe.method == contender.method
        for shape in SHAPES:
            scheme = recipe.scheme_for("transformer_blocks.0.ff.net.2", shape)
            assert (scheme.branch is None) == ("+" not in contender.recipe)


@each_group
def test_no_contender_stores_more_bytes_than_the_16_bit_branch(group):
    """Smoothing factors come on top, for LoRaQ and for its rival in the same recipe."""

    def nbytes(contender: demo.Contender) -> list[int]:
        recipe = contender.to_recipe(budget=SUBJECT.budget, effort="fast")
        schemes = [(recipe.scheme_for("layer", shape), shape) for shape in SHAPES]
        return [scheme.nbytes(shape) - scheme.smoothing * shape[1] for scheme, shape in schemes]

    limit = nbytes(next(c for c in CONTENDERS[group] if "+bf16" in c.recipe))
    rank = Budget.parse(SUBJECT.budget).rank_16bit
    for contender in CONTENDERS[group]:
        if "more bytes" in contender.label:
            assert nbytes(contender) > limit
            continue
        sizes = nbytes(contender)
        assert all(size <= most for size, most in zip(sizes, limit, strict=True)), contender
        if "+" in contender.recipe:  # and it uses what it is given, up to one more rank
            branch = (
                contender.to_recipe(budget=SUBJECT.budget, effort="fast")
                .scheme_for("layer", SHAPES[0])
                .branch
            )
            assert limit[0] - sizes[0] < 2 * rank * 384 / branch.rank * 1.6


@each_group
def test_activations_are_not_mixed_in_a_group(group):
    assert (
        len(
            {
                c.to_recipe(budget=SUBJECT.budget, effort="fast").scheme.activation
                for c in CONTENDERS[group]
            }
        )
        == 1
    )


@each_group
def test_every_row_of_ours_has_a_rival_that_got_all_that_it_got(group):
    ours = [c for c in CONTENDERS[group] if c.method == "loraq"]
    assert ours
    for row in ours:
        (twin,) = (
            c
            for c in CONTENDERS[group]
            if (c.recipe, c.statistics) == (row.recipe, row.statistics)
            and c.method == ("gptq" if row.statistics else "svdquant")
            and c.options == {"rounds": 100, "rotate": True}
        )
        assert (twin.budget, twin.rules, twin.keep) == (row.budget, row.rules, row.keep)


def test_the_short_demo_is_the_same_rows_under_shorter_labels():
    short = demo.choose_short()
    for group, contenders in short.items():
        for each in contenders:
            (full,) = (
                full
                for full in CONTENDERS[group]
                if (full.recipe, full.method) == (each.recipe, each.method)
            )
            options = full.options | ({"rounds": 20} if "rounds" in full.options else {})
            assert replace(full, label=each.label, options=options) == each
    assert [
        (each.label, each.recipe, each.method, bool(each.statistics))
        for contenders in short.values()
        for each in contenders
    ] == [
        ("round to nearest", "int4-a16", "rtn", False),
        ("SVDQuant ×20", "int4-a16+w8a8", "svdquant", False),
        ("LoRaQ", "int4-a16+w8a8", "loraq", False),
        ("SVDQuant ×20 + GPTQ", "int4-a16+w4a8-s", "gptq", True),
        ("LoRaQ", "int4-a16+w4a8-s", "loraq", True),
    ]


def test_every_short_row_of_ours_has_its_rival_beside_it():
    for group, contenders in demo.choose_short().items():
        ours = [each for each in contenders if each.method == "loraq"]
        rivals = [each for each in contenders if each.recipe == demo.SHORT_RECIPES[group]]
        assert len(ours) == 1
        assert len(rivals) == 2


def test_the_short_demo_has_the_rows_that_the_quality_page_is_judged_by():
    tables = pytest.importorskip("benchmarks.quality.tables")
    declared = [
        tables.COMPARISONS[f"W4A16, {way}"].declared for way in (tables.WITHOUT, tables.WITH)
    ]
    assert [f"{recipe}-h0" for recipe in demo.SHORT_RECIPES.values()] == declared


def test_the_default_recipe_takes_part():
    recipes = {contender.recipe for group in CONTENDERS.values() for contender in group}
    assert NAMED["default"] in recipes


@pytest.fixture(scope="module")
def result() -> DemoResult:
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    star = next(
        c
        for group in CONTENDERS.values()
        for c in group
        if (c.recipe, c.method) == (NAMED["default"], "loraq")
    )
    few = {
        name: (group[0], next(c for c in group if "+bf16" in c.recipe))
        for name, group in CONTENDERS.items()
    }
    # The default must also be drawn where lines are.
    few["weight-only"] = (
        CONTENDERS["weight-only"][0],
        star,
    )
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "CONTENDERS", few)
        patch.setitem(EFFORTS, "fast", (6, 3))
        small = SUBJECT._replace(n_own=4, probe=partial(digits.velocity_probe, count=32))
        result = run(small, every=True, n_images=10, steps=4, effort="fast", progress=lines.append)
    assert lines[0] == "statistics of the model's own samples"
    assert len(lines[1:]) == 2 * len(CONTENDERS) == 10
    assert lines[1].startswith("[1 of 10] weight-only: ")
    return result


@pytest.mark.slow
def test_rows_are_plausible(result):
    first, *rows = result.rows
    assert (first.label, first.weight_error, first.velocity_error, first.bits_per_weight) == (
        "16 bits",
        0,
        0,
        16,
    )
    assert first.psnr_db == math.inf
    assert first.accuracy >= 0.8
    assert [row.group for row in rows] == [name for name in CONTENDERS for _ in range(2)]
    for row in rows:
        assert 4.2 < row.bits_per_weight < 6
        assert row.nbytes == pytest.approx(first.nbytes * row.bits_per_weight / 16, rel=1e-6)
        assert 0.02 < row.weight_error < 0.2
        assert 0.001 < row.velocity_error < 0.3
        assert 10 < row.psnr_db < 60
        assert 0.5 <= row.accuracy <= 1
        assert math.isfinite(row.frechet)
        assert row.seconds > 0
    for plain, branched in zip(rows[::2], rows[1::2], strict=True):
        assert branched.weight_error < plain.weight_error
    assert [row.label.endswith(" ★") for row in rows] == [False, True] + 8 * [False]


@pytest.mark.slow
def test_memory_is_what_inspect_measures_and_one_decoded_layer(result):
    first, *rows = result.rows
    others = first.memory - first.nbytes
    assert 0 < others < first.nbytes
    for row in rows:
        assert row.memory == others + row.nbytes + LARGEST


@pytest.mark.slow
def test_every_row_has_its_pictures(result):
    assert len(result.images) == len(result.rows)
    assert {images.shape for images in result.images} == {(10, 1, 8, 8)}


@pytest.mark.slow
def test_the_report_is_a_picture(result, tmp_path):
    pytest.importorskip("matplotlib")
    draw(result, tmp_path / "deep" / "report.png")
    content = (tmp_path / "deep" / "report.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000


def invented(shape: tuple[int, int, int] = (1, 8, 8)) -> DemoResult:
    row = DemoRow(
        group="weight-only",
        label="LoRaQ ★",
        recipe="mxfp4",
        bits_per_weight=5.0,
        weight_error=0.07,
        velocity_error=0.02,
        psnr_db=30.0,
        accuracy=0.99,
        frechet=1.0,
        nbytes=1024,
        memory=2048,
        seconds=2.0,
    )
    trained = replace(row, group="as trained", label="16 bits", recipe="", method="", nbytes=4096)
    rival = replace(row, label="SVDQuant", method="svdquant", velocity_error=0.01)
    ramp = torch.linspace(-1, 1, 12 * math.prod(shape)).view(12, *shape)
    pictures = tuple(ramp * scale for scale in (1, 0.9, 0))
    return DemoResult(SUBJECT, (trained, row, rival), pictures, "fast")


def test_every_row_has_a_bar(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = []
    barh = Axes.barh

    def noting(self, places, widths, **kwargs):
        drawn.extend(widths)
        return barh(self, places, widths, **kwargs)

    monkeypatch.setattr(Axes, "barh", noting)
    draw(invented(), tmp_path / "report.png")
    assert drawn == [0.02, 0.01]


def test_differences_are_shown_ten_times():
    trained = torch.full((12, 1, 8, 8), 0.5)
    samples, difference = strips_of(trained + 0.1, trained)
    assert samples.shape == difference.shape == (8, 10 * 9 - 1)
    assert {*samples[:, 0]} == {round(255 * 0.8)}
    assert {*difference[:, 0]} == {round(255 * 0.5)}
    assert {*strips_of(trained, trained)[1][:, 0]} == {0}


def test_colours_are_shown():
    red = torch.full((12, 3, 8, 8), -1.0)
    red[:, 0] = 1
    samples, difference = strips_of(red, red)
    assert samples.shape == difference.shape == (8, 10 * 9 - 1, 3)
    assert samples[0, 0].tolist() == [255, 0, 0]
    assert samples[0, 8].tolist() == [89, 89, 89]  # between two pictures


def test_the_page_shows_every_row_and_who_is_better():
    page = draw_page(invented())
    assert page.count("<img ") == 2 * 3
    assert page.count("data:image/png;base64,") == 2 * 3
    assert "SVDQuant at no more bytes 0.0100" in page  # also when LoRaQ does not win
    assert "LoRaQ ★" in page
    assert "every format" in page
    assert "<code>loraq demo --all</code>" in page
    assert "What was asked for: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in page
    assert "4-bit weights (INT4)" in draw_page(
        replace(
            invented(),
            rows=tuple(replace(r, recipe=r.recipe and "int4-a16+w6a6") for r in invented().rows),
        )
    )


def test_a_report_that_cannot_be_written(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "report.png", tmp_path):
        with pytest.raises(LoraqError, match="Cannot write"):
            require_drawable(path, SUBJECT.folder)
        with pytest.raises(LoraqError, match="Cannot write"):
            draw(invented(), path)


def test_looking_whether_a_report_can_be_written_writes_none(tmp_path):
    pytest.importorskip("matplotlib")
    require_drawable(Path(tmp_path / "a" / "report.png"), SUBJECT.folder)
    assert list((tmp_path / "a").iterdir()) == []
