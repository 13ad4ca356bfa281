"""The demo's page: the same as its picture, to be read on a phone too."""

import base64
import platform
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from loraq.evaluation.demo import SHORT_RECIPES, SHORT_ROUNDS, DemoResult, DemoRow
from loraq.evaluation.picture import AMPLIFIED, SHOWN, strips_of
from loraq.figures import number, size_of
from loraq.pages.files import require_place, write_whole
from loraq.pages.frame import Bar, bars, document, footer, table, tiles
from loraq.pages.markup import Content, Markup, join, tag


def require_page(path: Path, assets: Path) -> None:
    """See that a page can be written, not among the demo's files; raises as `require_place`."""
    require_place(path, assets)


def write_page(result: DemoResult, path: Path) -> None:
    """Write the page as one self-contained file, which appears when it is whole.

    Raises:
        LoraqError: the file cannot be written.
        CheckpointError: the file would be among those that the demo reads.
    """
    require_page(path, result.subject.folder)
    write_whole(path, draw_page(result).encode())


def draw_page(result: DemoResult) -> str:
    """Return the page."""
    rows = result.rows
    trained, groups = rows[0], _group(rows[1:])
    recipes = {row.recipe for row in rows[1:]}
    what = "4-bit weights (INT4), activations in 16 bits"
    mains = {recipe.partition("+")[0] for recipe in SHORT_RECIPES.values()}
    if not {recipe.partition("+")[0] for recipe in recipes} <= mains:
        what = "every format and activation precision that the demo knows"
    return document(
        "loraq demo",
        tag("h1", "A small transformer in 4 bits, without any data"),
        tag(
            "p",
            f"A trained diffusion transformer {result.subject.about}, quantized in "
            f"{len(rows) - 1} ways: {what}.",
            class_="lead",
        ),
        _summary(trained, groups),
        tag("h2", "Velocity error"),
        tag(
            "p",
            "How far one forward on noised real images is from that of the model as trained. "
            "Shorter is better.",
            class_="note",
        ),
        tag("div", bars([(name, list(map(_bar, each))) for name, each in groups]), class_="panel"),
        tag("h2", "Samples"),
        tag(
            "p",
            f"All from the same noise; beside them |difference| × {AMPLIFIED} to the samples of "
            f"the model as trained. {_name_samples(result)}",
            class_="note",
        ),
        tag(
            "div",
            *(
                _draw_row(row, strips_of(images, result.images[0]))
                for row, images in zip(rows, result.images, strict=True)
            ),
            class_="panel",
        ),
        tag("h2", "Numbers"),
        tag("div", _numbers(rows), class_="panel"),
        tag("h2", "How to read it"),
        *_explain(result),
        footer(
            f"torch {torch.__version__} on {platform.machine()}, one seed. Again: ",
            tag("code", result.subject.command),
            ", every row: ",
            tag("code", f"{result.subject.command} --all"),
            ".",
        ),
    )


def _group(rows: tuple[DemoRow, ...]) -> list[tuple[str, list[DemoRow]]]:
    groups: dict[str, list[DemoRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return list(groups.items())


def _summary(trained: DemoRow, groups: list[tuple[str, list[DemoRow]]]) -> Markup:
    """Return the figures of LoRaQ, and beside its error that of the best rival here, who may win.

    A rival stores no more bytes.
    """
    figures = []
    for name, rows in groups:
        ours = min(
            (row for row in rows if row.method == "loraq"),
            key=lambda row: row.velocity_error,
            default=None,
        )
        if ours is None:
            continue
        rivals = [row for row in rows if row.method != "loraq" and row.nbytes <= ours.nbytes]
        best = min(rivals, key=lambda row: row.velocity_error, default=None)
        against = f"; {best.label} at no more bytes {number(best.velocity_error)}" if best else ""
        figures.append((number(ours.velocity_error), f"LoRaQ, {name}{against}"))
        if len(figures) == 1:
            size = f"of {size_of(trained.memory)} in 16 bits: the whole model when it runs"
            figures.append((size_of(ours.memory), size))
    return tiles(*figures)


def _bar(row: DemoRow) -> Bar:
    name = join(row.label, tag("small", f" {row.bits_per_weight:.2f} bits", class_="note"))
    return Bar(name, row.velocity_error, number(row.velocity_error), row.method == "loraq")


def _draw_row(row: DemoRow, pictures: tuple[Any, Any]) -> Markup:
    facts = [
        row.recipe,
        f"{row.bits_per_weight:.2f} bits a weight",
        f"{size_of(row.memory)} in memory",
        f"velocity error {number(row.velocity_error)}" if row.recipe else None,
    ]
    head = tag(
        "div",
        tag("h3", row.label),
        tag("p", " · ".join(fact for fact in facts if fact), class_="note"),
        tag("p", row.group, class_="note") if row.recipe else None,
    )
    texts = ("samples", f"difference × {AMPLIFIED}")
    figures = [
        tag("figure", _embed(strip, f"{row.label}: {text}"), tag("figcaption", text))
        for strip, text in zip(pictures, texts, strict=True)
    ]
    return tag("div", head, *figures, class_="row ours" if row.method == "loraq" else "row")


def _embed(strip: Any, text: str) -> Markup:
    from PIL import Image

    picture = BytesIO()
    Image.fromarray(strip).save(picture, format="PNG")
    data = base64.b64encode(picture.getvalue()).decode()
    return tag("img", src=f"data:image/png;base64,{data}", alt=text)


def _numbers(rows: tuple[DemoRow, ...]) -> Markup:
    headings = ("", "recipe", "#weights", "#bits", "#memory", "#velocity error", "#PSNR", "#time")
    cells: list[tuple[Content, ...]] = [
        (
            row.label,
            row.recipe,
            size_of(row.nbytes),
            f"{row.bits_per_weight:.2f}",
            size_of(row.memory),
            number(row.velocity_error),
            f"{row.psnr_db:.1f} dB",
            f"{row.seconds:.0f} s",
        )
        for row in rows
    ]
    ours = [i for i, row in enumerate(rows) if row.method == "loraq"]
    return table(headings, cells, ours)


def _name_samples(result: DemoResult) -> str:
    shown = result.subject.labels(len(result.images[0]))[:SHOWN].tolist()
    return f"What was asked for: {', '.join(map(result.subject.name, shown))}."


def _explain(result: DemoResult) -> list[Markup]:
    subject, effort = result.subject, result.effort
    judged = (
        " At 4 bits a judge reads every sample of every row correctly, so pictures alone cannot "
        "tell the rows apart."
    )
    texts = (
        "Velocity error is the figure to read: ‖v − v̂‖ / ‖v‖." + (judged if subject.judge else ""),
        "The rival is SVDQuant with all that LoRaQ gets: the same formats, the same bytes for its "
        f"branch ({subject.budget}), {SHORT_ROUNDS} alternations (100 with --all), searched "
        "scales, factors rotated in rank space, and with own samples GPTQ on the same statistics "
        f"of {subject.n_own} samples that the model itself has drawn. It is not the strongest "
        "that is known: the quality page has others.",
        "Weights are the bytes of the quantized layers, memory those of the whole model when it "
        "runs: the packed bytes, as loraq inspect --memory measures them, and one layer at a time "
        "decoded. Activations are not counted. Time is that of the solver, all layers one after "
        f"the other; LoRaQ is at effort {effort}.",
        "One seed: differences of a few percent are within its spread. Several seeds, with "
        "intervals, are on the quality page of the documentation.",
    )
    return [tag("p", text) for text in texts]
