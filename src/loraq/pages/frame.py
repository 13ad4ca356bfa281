"""The frame that all pages share: the document, its style, tiles, tables and charts."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from loraq.figures import number
from loraq.pages.markup import Content, Markup, join, tag
from loraq.version import __version__

#: By which a page of ours is known: it stands within the first bytes.
GENERATOR = tag("meta", name="generator", content="loraq")
#: A page loads nothing, and runs nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, *body: Content) -> str:
    """Return a whole page as one self-contained file."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        GENERATOR,
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("style", Markup(style)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *body)), lang='en')}\n"


def footer(*content: Content) -> Markup:
    """Return the last lines of a page."""
    return tag("footer", *content, f" loraq {__version__}.")


def tiles(*figures: tuple[str, str]) -> Markup:
    """Return the few figures to read first: number and meaning."""
    shown = (
        tag("p", tag("b", number), tag("span", text), class_="tile") for number, text in figures
    )
    return tag("div", *shown, class_="tiles")


def table(
    headings: Sequence[str], rows: Iterable[Sequence[Content]], ours: Iterable[int] = ()
) -> Markup:
    """Return a table; on a narrow screen each row becomes a list.

    Args:
        headings: of the columns. One that begins with "#" holds numbers.
        rows: their cells; the first one names the row.
        ours: rows that stand out, by their numbers.
    """
    names, kinds = [name.removeprefix("#") for name in headings], []
    for name in headings:
        kinds.append("number" if name.startswith("#") else None)
    head = [tag("th", name, class_=kind) for name, kind in zip(names, kinds, strict=True)]
    marked, body = set(ours), []
    for i, row in enumerate(rows):
        cells = [
            tag(
                "td",
                cell if not j or cell in (None, "") else tag("span", cell),
                class_=kind,
                data_name=name if j else None,
            )
            for j, (cell, name, kind) in enumerate(zip(row, names, kinds, strict=True))
        ]
        body.append(tag("tr", *cells, class_="ours" if i in marked else None))
    return tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body))


class Bar(NamedTuple):
    """One bar of a chart."""

    name: Content
    value: float
    text: Content
    ours: bool = False


def bars(groups: Iterable[tuple[str, Sequence[Bar]]]) -> Markup:
    """Return a bar chart, all on one scale that begins at 0.

    Args:
        groups: a heading, or "" for none, and the bars below it.
    """
    groups = list(groups)
    most = max((bar.value for _, group in groups for bar in group), default=0.0)
    items = []
    for heading, group in groups:
        if heading:
            items.append(tag("li", heading, class_="group"))
        for bar in group:
            width = f"width:{100 * bar.value / most if most else 0:.2f}%"
            fill = tag("span", class_="fill", style=width)
            items.append(
                tag(
                    "li",
                    tag("span", bar.name, class_="name"),
                    tag("span", fill, class_="track"),
                    tag("span", bar.text, class_="value"),
                    class_="ours" if bar.ours else None,
                )
            )
    return tag("ul", *items, class_="bars")


class Strip(NamedTuple):
    """One row of a chart of strips: a value for each cell, `None` where there is none."""

    name: Content
    cells: Sequence[tuple[str, float | None]]
    text: Content


def strips(rows: Iterable[Strip]) -> Markup:
    """Return a chart of columns for each row, all on one scale that begins at 0."""
    rows = list(rows)
    values = [value for row in rows for _, value in row.cells if value is not None]
    most = max(values, default=0.0) or 1.0
    items = []
    for row in rows:
        drawn = [
            tag(
                "rect",
                tag("title", f"{name}: {number(value)}"),
                x=i,
                y=f"{1 - value / most:.4f}",
                width=0.92,
                height=f"{value / most:.4f}",
            )
            for i, (name, value) in enumerate(row.cells)
            if value is not None
        ]
        figure = tag(
            "svg",
            *drawn,
            viewBox=f"0 0 {len(row.cells)} 1",
            preserveAspectRatio="none",
            role="img",
            aria_label="error by depth",
        )
        items.append(
            tag(
                "li",
                tag("span", row.name, class_="name"),
                figure,
                tag("span", row.text, class_="value"),
            )
        )
    return tag("ul", *items, class_="strips")


def stack(parts: Sequence[tuple[str, int]], whole: int) -> Markup:
    """Return one bar of up to four parts, whose length is their share of a whole."""
    drawn = [
        tag("span", class_=f"s{i}", style=f"width:{100 * size / max(1, whole):.3f}%", title=name)
        for i, (name, size) in enumerate(parts)
    ]
    return tag("div", *drawn, class_="stack")


def key(index: int, name: str) -> Markup:
    """Return the name of a part of `stack` with its colour before it."""
    return join(tag("span", class_=f"key s{index}"), name)
