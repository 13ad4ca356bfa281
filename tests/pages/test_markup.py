"""Markup by construction: nothing that a stranger wrote becomes an element."""

from html import unescape

import pytest

from loraq.pages.frame import Bar, Strip, bars, document, stack, strips, table
from loraq.pages.markup import Markup, join, tag

HOSTILE = "</td><script>alert(1)</script>\"' onload=x \u202ea\x1b[2J&amp;"


def test_an_element_is_written_with_its_attributes():
    assert tag("a", "b & c", href="#x", class_="y", data_name="z", id=None) == (
        '<a href="#x" class="y" data-name="z">b &amp; c</a>'
    )
    assert tag("img", src="data:,", alt='"') == '<img src="data:," alt="&quot;">'
    assert join("<", None, tag("b", 1), 2) == "&lt;<b>1</b>2"


@pytest.mark.parametrize(
    "made",
    [
        tag("td", HOSTILE),
        tag("td", title=HOSTILE),
        table((HOSTILE, HOSTILE), [(HOSTILE, HOSTILE)]),
        bars([(HOSTILE, [Bar(HOSTILE, 1.0, HOSTILE)])]),
        strips([Strip(HOSTILE, [(HOSTILE, 0.5)], HOSTILE)]),
        stack([(HOSTILE, 1)], 2),
        Markup(document(HOSTILE, HOSTILE)),
    ],
    ids=["text", "attribute", "table", "bars", "strips", "stack", "document"],
)
def test_what_strangers_write_is_text(made):
    assert "<script" not in made
    assert "&lt;script&gt;" in made
    assert "\x1b" not in made
    assert "\u202e" not in made
    assert "onload=x" in made
    assert "\"' onload" not in made


def test_bars_and_columns_are_on_one_scale_from_zero():
    chart = bars([("", [Bar("a", 2.0, "2")]), ("more", [Bar("b", 0.5, "0.5", ours=True)])])
    assert "width:100.00%" in chart
    assert "width:25.00%" in chart
    assert chart.count('class="ours"') == 1
    drawn = strips([Strip("a", [("x", 0.4), ("y", None)], ""), Strip("b", [("z", 0.1)], "")])
    assert 'height="1.0000"' in drawn
    assert 'height="0.2500"' in drawn
    assert drawn.count("<rect") == 2


def test_charts_of_nothing():
    assert "NaN" not in bars([("", [Bar("a", 0.0, "0")])]) + strips([Strip("a", [("x", 0.0)], "")])
    assert bars([]) == '<ul class="bars"></ul>'


def test_a_page_loads_nothing():
    page = document("x", "y")
    assert "default-src 'none'" in unescape(page)
    for word in ("http://", "https://", "@import", "<link", "<script"):
        assert word not in page
    assert page.index('<meta name="generator" content="loraq">') < 200
