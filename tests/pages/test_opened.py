"""Pages in a real browser: nothing sticks out, nothing is loaded, nothing is complained of."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraq.pages.frame import document
from loraq.pages.markup import Markup, tag
from loraq.pages.report import draw_report
from tests import browser

if browser.find() is None:
    why = "no browser is installed (chromium), so no page is opened"
    if os.environ.get("CI"):
        why += "; the machine of CI needs one for these tests"
    pytest.skip(why, allow_module_level=True)

WIDTHS = (360, 1280)


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Browser]:
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        browser.running(Path(folder)) as opened,
    ):
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A report with long and hostile names, and the demo's page, of digits and in colour."""
    pytest.importorskip("diffusers")
    from loraq.evaluation.page import draw_page
    from loraq.pages.contents import read_models
    from tests.evaluation.test_demo import invented
    from tests.pages.test_contents import HOSTILE, plain

    place = tmp_path_factory.mktemp("pages")
    long = "a_name_without_any_place_to_break_it_" * 8
    folder = plain(place / "out", long, f"{HOSTILE}{long}", "short")
    texts = {
        "report": draw_report(long, read_models(folder)),
        "demo": draw_page(invented()),
        "demo in colour": draw_page(invented((3, 64, 64))),
    }
    for name, text in texts.items():
        (place / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: place / f"{name}.html" for name in texts}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "demo", "demo in colour"])
def test_a_page_fits_and_is_quiet(tab, pages, name, width):
    for dark in (False, True):
        assert tab.open(pages[name], width, dark=dark) == []
    assert tab.evaluate("document.images.length") == (0 if name == "report" else 6)


def test_light_and_dark_differ(tab, pages):
    ground = "getComputedStyle(document.body).backgroundColor"
    colours = []
    for dark in (False, True):
        tab.open(pages["report"], 360, dark=dark)
        colours.append(tab.evaluate(ground))
    assert colours[0] != colours[1]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (tag("div", "x", style="width:500px"), "reaches to"),
        (tag("img", src="data:image/png;base64,AAAA", alt="broken"), "no image: broken"),
        (Markup("<script>console.log(1)</script>"), "Content Security Policy"),
        (tag("img", src="https://example.org/x.png", alt=""), "https://example.org/x.png"),
    ],
    ids=["wide", "broken image", "script", "loaded"],
)
def test_a_planted_fault_is_found(tab, tmp_path, content, fault):
    page = tmp_path / "page.html"
    page.write_text(document("x", content), encoding="utf-8")
    assert fault in " ".join(tab.open(page, 360))
