"""The page of quality says what the newest result files say, and judges beyond noise only."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "docs").is_dir():
    pytest.skip("the documents are only in a clone of the repository", allow_module_level=True)
quality_page = pytest.importorskip("benchmarks.quality.page")
from benchmarks.quality.row import ModelRow  # noqa: E402
from benchmarks.results import RENAMED, read, rename  # noqa: E402
from benchmarks.rivals import page as rivals_section  # noqa: E402


def row(
    label,
    velocity,
    *,
    method="loraq",
    bits=4.9,
    same_bytes=True,
    group="W4A16, own samples",
    world="digits",
):
    numbers = {
        "bits_per_weight": bits,
        "weight_error": 0.1,
        "output_error": 0.05,
        "psnr_db": 40.0,
        "ssim": 0.99,
        "seconds": 3.0,
        "peak_bytes": 9 * 2**20,
    }
    names = {"label": label, "method": method, "group": group, "world": world, "recipe": "int4-a16"}
    names["effort"] = "fast"
    return {**names, **numbers, "same_bytes": same_bytes, "velocity_errors": velocity}


def record(*rows, date="2026-01-02", **changes):
    plain = {
        "benchmark": "quality.run",
        "date": date,
        "commit": "abc1234",
        "changed": False,
        "command": "python -m benchmarks.quality.run",
    }
    plain |= {"torch": "2", "cpu_count": 2}
    return plain | {"rows": list(rows)} | changes


OURS = row("LoRaQ", [0.010, 0.011, 0.0105])


def verdict(*rows):
    lines = quality_page.page([record(*rows)]).splitlines()
    return next(line for line in lines if line.startswith("| digits, ")).split("|")


def test_the_page_is_what_the_result_files_give():
    assert (ROOT / "docs" / "quality.md").read_text() == quality_page.page(read())


def test_the_newest_record_of_each_table_counts_and_others_are_left_out():
    old = record(row("old", [1.0]), row("kept", [1.0], group="W4A8, own samples"))
    new = record(row("new", [1.0]), row("newer", [1.0]), date="2026-01-03")
    there = record(row("there", [1.0], world="patches"))
    foreign = record({"label": "of an older form", "world": "digits"}, date="2026-01-04")
    timings = record(row("timings", [1.0]), benchmark="speed.layer", date="2026-01-05")
    found = quality_page.newest([old, there, new, foreign, timings])
    labels = {
        (world, group): [row.label for row in kept.rows]
        for world, tables in found.items()
        for group, kept in tables.items()
    }
    assert labels == {
        ("digits", "W4A16, own samples"): ["new", "newer"],
        ("digits", "W4A8, own samples"): ["kept"],
        ("patches", "W4A16, own samples"): ["there"],
    }
    assert old["rows"][0]["label"] == "old"


@pytest.mark.parametrize(
    ("rival", "expected"),
    [
        ([0.020, 0.022, 0.021], "met"),
        ([0.0101, 0.0109, 0.0106], "**open**: within noise"),
        ([0.005, 0.0055, 0.00525], "**MISSED**"),
    ],
)
def test_a_bar_is_met_or_missed_only_beyond_the_confidence_interval(rival, expected):
    assert verdict(row("GPTQ", rival, method="gptq"), OURS)[-2].strip() == expected


def test_a_rival_meets_rows_that_store_no_more_and_have_its_main_format():
    plain = row("INT5", [0.008, 0.0082, 0.0081], method="rtn", bits=5.25, same_bytes=False) | {
        "recipe": "int5-a16"
    }
    larger = row("LoRaQ, 5.25 bits", [0.006, 0.0061, 0.0062], bits=5.24, same_bytes=False)
    assert verdict(plain, OURS)[4:6] == [" LoRaQ ", " 4.90 "]
    assert verdict(plain, OURS, larger)[4:6] == [" LoRaQ, 5.25 bits ", " 5.24 "]
    rival = row("SVDQuant", [0.02, 0.021, 0.022], method="svdquant") | {"recipe": "mxfp4-a16+bf16"}
    ours = row("LoRaQ, MXFP4", [0.012, 0.013, 0.014]) | {"recipe": "mxfp4-a16+w6a6"}
    assert verdict(rival, OURS, ours)[4] == " LoRaQ, MXFP4 "
    smaller = row("round to nearest", [0.01, 0.01, 0.01], method="rtn", bits=4.25)
    assert verdict(smaller, rival, OURS, ours)[2] == " SVDQuant "


def test_ratios_are_to_the_best_row_of_the_same_bytes():
    larger = row("more bytes", [0.005, 0.0055, 0.00525], bits=5.25, same_bytes=False)
    rows = [OURS, larger, row("worse", [0.02, 0.022, 0.021])]
    lines = quality_page.figures([ModelRow.from_record(line) for line in rows])
    cells = {
        line.split("|")[1].strip(): line.split("|")[7].strip() for line in lines if "int4" in line
    }
    assert cells == {"LoRaQ": "1", "more bytes": "0.50 ± 0.00", "worse": "2.00 ± 0.00"}


def test_the_picture_is_the_same_for_the_same_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    records = [record(OURS, row("SVDQuant", [0.02, 0.022, 0.021], method="svdquant"))]
    pictures = []
    for name in ("one.svg", "other.svg"):
        quality_page.draw(records, tmp_path / name)
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith("<?xml")


def rival(name, error, ours, table="1152x1152", a4=0.2):
    measured = {"table": table, "bits": 4.5, "cpu_seconds": 1.0, "counted": "stored"}
    loraq = ours and {"contender": "int4 r9", "weight_error": ours, "output_error": {"A4": 0.1}}
    theirs = {"contender": name, "weight_error": error, "output_error": {"A4": a4}}
    return {**measured, **theirs, "package": name, "loraq": loraq and {**measured, **loraq}}


def test_packages_are_compared_where_a_branch_fits_and_the_worst_of_them_is_named():
    rows = [
        rival("near", 0.11, 0.1),
        rival("far", 0.2, 0.1),
        rival("far", 0.1, None, table="digits"),
        {"failure": "x"},
    ]
    changes = {"benchmark": "against_rivals", "command": "against_rivals.py --save"}
    partial = (
        record(rival("part", 1.0, 1.0), date="2026-01-09")
        | changes
        | {"command": "against_rivals.py --quick --save"}
    )
    text = rivals_section.section([rename(record(*rows) | changes), rename(partial)])
    assert "| near | 4.500 | 0.1100 | 1.10 / – | 2.00 / – |" in text
    assert "| far | 4.500 | 0.2000 | 2.00 / ∅ | 2.00 / ∅ |" in text
    assert "| 1.100 (near, 1152x1152) | 2 | **MISSED** by 1 |" in text
    assert "| 2 | met |" in text
    assert rivals_section.section([]) == ""


def test_every_saved_record_is_known_and_can_be_read():
    records = read()
    # Two benchmarks have become tables of quality.run, and keep the form they were saved in.
    own = {"rotation", "self_calibration"}
    assert {record["benchmark"] for record in records} - own <= set(RENAMED.values())
    rows = [row for record in records for row in record["rows"] if "same_bytes" in row]
    assert rows
    for line in rows:
        known = ModelRow.from_record(line)
        assert ModelRow.from_record(known.to_record()) == known
    rivals = [
        line
        for record in records
        if record["benchmark"] == "rivals.run"
        for line in record["rows"]
        if "failure" not in line
    ]
    for line in rivals:
        known = rivals_section.RivalRow.from_record(line)
        assert rivals_section.RivalRow.from_record(known.to_record()) == known


def test_older_names_are_read_as_those_of_today():
    inner = {"table": "t", "contender": "ours", "bits": 4.5, "cpu_seconds": 1.0}
    rows = [{**inner, "contender": "theirs", "loraq": inner}, {**inner, "loraq": None}]
    found = rename({"benchmark": "against_rivals", "rows": rows})
    assert found["benchmark"] == "rivals.run"
    today = {"group": "t", "label": "ours", "bits_per_weight": 4.5, "seconds": 1.0}
    assert found["rows"] == [{**today, "label": "theirs", "loraq": today}, {**today, "loraq": None}]
    grown = rename({"benchmark": "quality", "rows": [{"peak_mb": 1.5, "bits": 4.5}]})
    assert grown["rows"] == [{"bits_per_weight": 4.5, "peak_bytes": 3 * 2**19}]
    assert rename(grown) == grown
