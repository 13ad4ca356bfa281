"""What the page says of rows that did not qualify: how far they are from the finalists."""

import pytest

pytest.importorskip("benchmarks")
pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from benchmarks.quality import ledger
from benchmarks.quality.tables import COMPARISONS, QUALIFYING
from benchmarks.quality.unqualified import unqualified

TITLE = "W4A8, own samples"
DECLARED = COMPARISONS[TITLE].declared
LABEL, RECIPE = "SVDQuant ×{} + GPTQ", "int4-aint8+w4a16-h0"


def line(label, recipe, error, seed=QUALIFYING[0], bits=4.9):
    names = {"world": "digits", "group": TITLE, "label": label, "recipe": recipe, "seed": seed}
    names |= {"method": "loraq" if label == "LoRaQ" else "gptq", "effort": "fast", "budget": ""}
    names |= {"fingerprint": "f", "date": f"2026-01-02T00:00:{seed:02}", "commit": "abc1234"}
    figures = {"bits_per_weight": bits, "weight_error": 0.1, "output_error": 0.1, "seconds": 1.0}
    return names | figures | {"peak_bytes": 1, "velocity_error": error}


@pytest.fixture
def lines():
    """Three strong rivals, a pair of rows of 20 and of 100 rounds, and one of 20 rounds alone."""
    return [
        line("LoRaQ", DECLARED, 1.0),
        *(line("QERA", f"int4-aint8+{b}-h0", e) for b, e in (("bf16", 1.0), ("w8a8", 1.1))),
        line("GPTQ", "int4-aint8-h0", 1.2),
        line(LABEL.format(20), RECIPE, 2.0),
        line(LABEL.format(100), RECIPE, 1.8),
        line(LABEL.format(20) + ", smoothing 0.3", RECIPE, 1.5),
    ]


def of(folder, lines):
    for one in lines:
        ledger.add(one, folder)
    return unqualified(ledger.read(folder), TITLE)


def test_a_row_that_did_not_qualify_is_as_far_from_the_finalists_as_its_twin(tmp_path, lines):
    found = of(tmp_path, lines)
    assert found.count == 1
    assert found.needed == pytest.approx(1.2 / 1.5)
    assert found.measured == [pytest.approx(0.9)]


def test_a_row_that_stores_more_than_any_of_ours_would_be_no_finalist(tmp_path, lines):
    lines[-1]["bits_per_weight"] = 5.1
    assert of(tmp_path, lines) is None


def test_where_every_row_qualified_there_is_nothing_to_say(tmp_path, lines):
    lines.append(line(LABEL.format(100) + ", smoothing 0.3", RECIPE, 1.4))
    assert of(tmp_path, lines) is None
