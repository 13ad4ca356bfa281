"""The page of quality says what the newest result files say, and judges beyond noise only."""

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT / "docs").is_dir():
    pytest.skip("the documents are only in a clone of the repository", allow_module_level=True)
quality_page = pytest.importorskip("benchmarks.quality.page")
from benchmarks.quality import ledger, same_branch  # noqa: E402
from benchmarks.quality.field import Entrant  # noqa: E402
from benchmarks.quality.ranking import (  # noqa: E402
    beside,
    count_qualified,
    final_rows,
    finalists,
    qualifiers,
    unmeasured,
    verdict,
)
from benchmarks.quality.row import ModelRow  # noqa: E402
from benchmarks.quality.tables import (  # noqa: E402
    COMPARISONS,
    FINER,
    NARROWED,
    QUALIFYING,
    SEEDS,
    WEIGHED,
)
from benchmarks.results import RENAMED, read, rename  # noqa: E402
from benchmarks.rivals import page as rivals_section  # noqa: E402

TITLE = "W4A8, own samples"
DECLARED = COMPARISONS[TITLE].declared


def line(label="LoRaQ", recipe=DECLARED, seed=0, error=0.010, **changes):
    numbers = {
        "bits_per_weight": 4.9,
        "weight_error": 0.1,
        "output_error": 0.05,
        "seconds": 3.0,
        "peak_bytes": 9 * 2**20,
        "velocity_error": error,
    }
    method = {"LoRaQ": "loraq", "GPTQ": "gptq"}.get(label.partition(",")[0], "svdquant")
    names = {"world": "digits", "group": TITLE, "label": label, "recipe": recipe, "seed": seed}
    names |= {"method": method, "effort": "fast", "budget": "", "fingerprint": "f"}
    names |= {"date": f"2026-01-02T00:00:0{seed % 10}", "commit": "abc1234"}
    return {**names, **numbers, **changes}


def ledger_of(folder, *lines):
    for one in lines:
        ledger.add(one, folder)
    return ledger.read(folder)


def with_errors(label, errors, recipe="mxfp4-a8+w8a8-h0", **changes):
    return [line(label, recipe, seed, error, **changes) for seed, error in enumerate(errors)]


OURS = with_errors("LoRaQ", [0.010, 0.011, 0.0105], DECLARED)


def judged(lines):
    page = quality_page.page([], lines).splitlines()
    return next(text for text in page if text.startswith(f"| digits, {TITLE} |")).split("|")


def test_the_page_is_what_the_result_files_give():
    assert (ROOT / "docs" / "quality.md").read_text() == quality_page.page(read(), ledger.read())


def said(lines):
    """Return what is said of the table, without how many finalists nobody met."""
    return re.sub(r"; \d+ of the finalists not measured", "", judged(lines)[-2]).strip()


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([0.020, 0.022, 0.021], "won, bar 1.05 met; 3 seeds"),
        ([0.01030, 0.01133, 0.01081], "won, bar 1.05 **missed**; 3 seeds"),
        ([0.0101, 0.0109, 0.0106], "**tied**, bar 1.05 **missed**; 3 seeds"),
        ([0.005, 0.0055, 0.00525], "**lost**, bar 1.05 **missed**; 3 seeds"),
        ([0.020], "not judged: one seed"),
    ],
)
def test_a_table_is_won_or_lost_only_beyond_the_confidence_interval(tmp_path, errors, expected):
    rival = with_errors("SVDQuant ×20 + GPTQ", errors)
    assert said(ledger_of(tmp_path, *OURS, *rival)) == expected


def test_the_declared_row_meets_the_strongest_rival_that_stores_no_more(tmp_path):
    better = with_errors("LoRaQ", [0.001, 0.001, 0.001], "int4-aint8+int8-h0")
    larger = with_errors("GPTQ", [0.002, 0.002, 0.002], "x", bits_per_weight=5.25)
    weak = with_errors("SVDQuant ×1 + GPTQ", [0.03, 0.03, 0.03])
    strong = with_errors("QERA", [0.02, 0.022, 0.021])
    cells = judged(ledger_of(tmp_path, *OURS, *better, *larger, *weak, *strong))
    assert cells[2].strip().startswith("QERA")
    assert cells[4].strip() == f"`{DECLARED}`"
    assert cells[7].strip() == "2.00 ± 0.00"


def test_ratios_are_run_by_run_on_the_seeds_that_both_have(tmp_path):
    rival = [line("QERA", "r", 1, 0.022), line("QERA", "r", 2, 0.021), line("QERA", "r", 4, 9.0)]
    assert judged(ledger_of(tmp_path, *OURS, *rival))[7].strip() == "2.00 ± 0.00"


def test_seeds_that_a_rival_has_not_met_yet_count_for_nobody(tmp_path):
    weak = with_errors("SVDQuant ×1 + GPTQ", [0.03, 0.03, 0.03])
    strong = with_errors("QERA", [0.02, 0.022])
    found = ledger_of(tmp_path, *OURS, *weak, *strong)
    assert judged(found)[2].strip().startswith("QERA")
    assert said(found) == "won, bar 1.05 met; 2 seeds"


def test_what_is_not_measured_is_said_and_nothing_is_judged(tmp_path):
    assert said(ledger_of(tmp_path)) == "not measured yet"
    assert said(ledger_of(tmp_path, line("QERA", "r"))) == "not measured yet"
    unfair = {"benchmark": "quality.run", "date": "2026", "rows": [{"same_bytes": True}]}
    unfair["rows"][0] |= {**line(), "velocity_errors": [1.0], "peak_bytes": 1}
    assert quality_page.studies([unfair]) == {}


def test_rows_that_store_other_branches_say_so(tmp_path):
    ours = line(optimized=48, n_layers=64)
    assert "| 48 of 64 |" in quality_page.page([], ledger_of(tmp_path, ours))


def test_a_study_in_the_ledger_is_shown_in_place_of_an_older_one(tmp_path):
    group = "Ablations, W4A16, from weights alone"
    row = {**line("older"), "group": group, "same_bytes": True, "velocity_errors": [0.5]}
    older = {"benchmark": "quality.run", "date": "2026-01-01", "rows": [row]}
    older |= {"command": "c", "commit": "c", "torch": "2", "cpu_count": 2, "changed": False}
    assert "| older |" in quality_page.page([older], ledger_of(tmp_path / "none"))
    qualified = ledger_of(tmp_path / "qualified", line("newer", seed=QUALIFYING[0], group=group))
    assert "| older |" in quality_page.page([older], qualified)
    page = quality_page.page([older], ledger_of(tmp_path / "some", line("newer", group=group)))
    assert "| newer |" in page
    assert "| older |" not in page


def summary_of(lines, records=()):
    page = quality_page.page(records, lines)
    return page.split("## In short\n\n")[1].split("\n\n")[0].splitlines()


def test_the_summary_counts_what_the_tables_say(tmp_path):
    title = "W4A4, own samples"
    ours = with_errors("LoRaQ", [0.02] * 3, COMPARISONS[title].declared, group=title)
    lost = with_errors("QERA", [0.019, 0.0191, 0.019], group=title)
    before = with_errors("LoRaQ", [0.03] * 3, COMPARISONS[title].withdrawn[0], group=title)
    rival = with_errors("SVDQuant ×20 + GPTQ", [0.020, 0.022, 0.021])
    published = with_errors("SVDQuant + GPTQ as published", [0.030, 0.033, 0.0315])
    alone = "W4A8, from weights alone"
    slower, recipe = COMPARISONS[alone].label, COMPARISONS[alone].declared
    weights = with_errors(slower, [0.020, 0.022, 0.021], recipe, group=alone)
    third = with_errors("QERA", [0.020, 0.023, 0.020], group=alone)
    lines = summary_of(
        ledger_of(tmp_path, *OURS, *rival, *published, *ours, *lost, *before, *weights, *third)
    )
    assert lines[0] == (
        "* **digits**: of 3 tables 1 won, 1 tied, 1 lost (from weights alone 0 won, 1 tied, 0 "
        "lost; own samples 1 won, 0 tied, 1 lost). The strongest rival has 0.95 to 2.00 times the "
        "error of the declared row; the bar on that is met in 1 and missed in 2."
    )
    assert "8-bit 1 won, 1 tied, 0 lost; 4-bit 0 won, 0 tied, 1 lost" in lines[1]
    assert "1 verdicts on rows that were declared before these, 0 won, 0 tied, 1 lost" in lines[2]
    assert "is QERA in 2, SVDQuant ×20 + GPTQ in 1; in 0 of 3 tables" in lines[3]
    assert "SVDQuant + GPTQ as published 3.00 times (median 3.00)" in lines[4]
    assert "0.50 times the error that they have from weights alone" in lines[5]
    assert "digits has 3 of 5 seeds, 0 of" in lines[6]


def test_one_seed_is_no_verdict_in_the_summary_either(tmp_path):
    lines = ledger_of(tmp_path, line(), line("QERA", "r", error=0.02))
    assert "of 1 tables 0 won, 0 tied, 0 lost, 1 not judged" in summary_of(lines)[0]
    assert "met in 0 and missed in 0" in summary_of(lines)[0]


def test_the_summary_says_what_finer_weights_would_gain(tmp_path):
    group, alone = "Finer weights, W4A4, own samples", "Finer weights, W4A4, from weights alone"
    rows = (
        line("LoRaQ, fast", error=0.02, group=group),
        line("LoRaQ, fast" + FINER, error=0.019, group=group),
        line("SVDQuant ×1 + GPTQ", error=0.03, group=group),
        line("LoRaQ, fast", error=0.02, group=alone),
        line("LoRaQ, fast" + FINER, error=0.016, group=alone),
    )
    lines = summary_of(ledger_of(tmp_path, *rows))
    assert "branch, from weights alone 0.80 times, own samples 0.95 times the error" in lines[0]


def test_the_summary_says_what_statistics_by_sensitivity_bring(tmp_path):
    group = "W4A8, own samples"
    ours, rivals = COMPARISONS[group].declared, ("SVDQuant ×20 + GPTQ, smoothing 0.3", "GPTQ")
    lines = [
        *with_errors("LoRaQ", [0.020, 0.022, 0.021], ours, group=group),
        *with_errors(rivals[0], [0.030, 0.032, 0.031], group=group),
        *with_errors("LoRaQ", [0.010, 0.011, 0.0105], ours, group=group + WEIGHED),
        *with_errors(rivals[0], [0.015, 0.016, 0.0155], group=group + WEIGHED),
        # Of another seed alone, and so not compared with what it has without.
        *with_errors(rivals[1], [0.020], group=group + WEIGHED),
    ]
    lines += [line(rivals[1], seed=4, error=0.04, group=group)]
    verdicts, said = (
        text for text in summary_of(ledger_of(tmp_path, *lines)) if "by sensitivity" in text
    )
    assert "rows 0.50 times the error that they have without, and rivals' 0.50 times" in said
    # By the one seed that all rivals have.
    assert "weighed by sensitivity 0 won, 0 tied, 0 lost, 1 not judged" in verdicts


def test_a_summary_of_nothing_says_so(tmp_path):
    assert summary_of(ledger_of(tmp_path)) == ["* Not measured yet."]


def test_packages_are_counted_in_the_summary(tmp_path):
    rows = [rival("near", 0.11, 0.1), rival("far", 0.2, 0.1)]
    changes = {"benchmark": "against_rivals", "command": "against_rivals.py --save"}
    lines = summary_of(ledger_of(tmp_path), [rename(record(*rows) | changes)])
    assert "1 of 2 comparisons of weight error keep the bar of 1.176" in lines[0]


def test_the_newest_line_of_a_row_and_seed_counts(tmp_path):
    new = line(error=0.5, date="2027-01-01")
    found = ledger_of(tmp_path, new, line(error=0.1))
    (row,) = ledger.rows(found, "digits", TITLE, [0, 1])
    assert (row.velocity_errors, row.seeds) == ((0.5,), (0,))


def test_the_strongest_rivals_of_the_qualification_go_on_and_no_row_of_ours(tmp_path):
    rows = COMPARISONS[TITLE].entrants
    lines = [
        line(row.label, row.recipe, QUALIFYING[0], 1 + i / 1000, method=row.method)
        for i, row in enumerate(rows)
    ]
    strong = [i for i, row in enumerate(rows) if row.method != "loraq"][20:23]
    for i in strong:
        lines[i]["velocity_error"] = 0.01
    heavy = next(i for i, row in enumerate(rows) if row.method == "qera" and i not in strong)
    lines[heavy] |= {"velocity_error": 0.001, "bits_per_weight": 5.1}
    found = ledger_of(tmp_path, *lines)
    going = finalists(found, "digits", TITLE)
    assert finalists(found, "patches", TITLE) == going  # nobody qualified there
    assert set(strong) <= going
    assert heavy not in going
    named = {DECLARED, *COMPARISONS[TITLE].withdrawn, *dict(COMPARISONS[TITLE].beside)}
    assert {rows[i].recipe for i in going if rows[i].method == "loraq"} == named
    assert all(i in going for i, row in enumerate(rows) if row.as_published)


def test_the_strongest_rivals_without_it_qualify_where_statistics_are_weighed(tmp_path):
    rows = COMPARISONS[TITLE].entrants
    assert qualifiers(ledger_of(tmp_path), "digits", TITLE) == set(range(len(rows)))
    lines = [
        line(row.label, row.recipe, QUALIFYING[0], 1 + i / 1000, method=row.method)
        for i, row in enumerate(rows)
    ]
    heavy, *strong = [i for i, row in enumerate(rows) if row.method != "loraq"][-NARROWED - 1 :]
    for i in strong:
        lines[i]["velocity_error"] = 0.01
    lines[heavy] |= {"velocity_error": 0.001, "bits_per_weight": 5.1}
    going = qualifiers(ledger_of(tmp_path, *lines), "digits", TITLE + WEIGHED)
    judged = {DECLARED, *dict(COMPARISONS[TITLE].beside)}
    assert {i for i in going if rows[i].method != "loraq"} == set(strong)
    assert {rows[i].recipe for i in going if rows[i].method == "loraq"} == judged


def test_rows_that_need_not_have_qualified_are_counted_apart(tmp_path):
    rival = COMPARISONS[TITLE].entrants[0]
    group = TITLE + WEIGHED  # nobody is strong without it, so that no rival is to qualify
    lines = [
        line(seed=QUALIFYING[0], group=group),
        line(rival.label, rival.recipe, QUALIFYING[0], 2.0, method=rival.method, group=group),
    ]
    found = ledger_of(tmp_path, *lines)
    judged = 1 + len(COMPARISONS[TITLE].beside)
    assert count_qualified(found, "digits", group) == (1, judged)
    page = quality_page.page([], found)
    assert f"Qualification: 1 of {judged} rows, and 1 that need not have, seeds" in page


def test_what_was_measured_on_a_seed_of_the_page_goes_on_to_the_others(tmp_path):
    rows = COMPARISONS[TITLE].entrants
    weak = next(i for i, row in enumerate(rows) if row.method == "qera" and not row.as_published)
    once = line(rows[weak].label, rows[weak].recipe, SEEDS[0], 9.0, method="qera")
    assert weak not in finalists(ledger_of(tmp_path), "digits", TITLE)
    assert weak in finalists(ledger_of(tmp_path, once), "digits", TITLE)


def test_a_finalist_that_nobody_met_is_told(tmp_path):
    rival = COMPARISONS[TITLE].entrants[0]
    met = [line(rival.label, rival.recipe, seed, 1.5, method=rival.method) for seed in (0, 1)]
    qualified = line("QERA", "mxfp4-a8+w8a8-h0", QUALIFYING[0], 0.1, method="qera")
    ours = with_errors("LoRaQ", [1.0, 1.0], DECLARED)
    found = ledger_of(tmp_path, *ours, *met, qualified)
    assert unmeasured(found, "digits", TITLE) > 0
    assert "of the finalists not measured" in judged(found)[-2]


def test_rows_beside_the_declared_one_have_a_verdict_of_their_own(tmp_path):
    title = "W4A4, own samples"
    ((recipe, what),) = COMPARISONS[title].beside
    wide = [
        {**line("SVDQuant", "nvfp4-a4+w4a8-h0", seed, 0.9, method="svdquant"), "group": title}
        | {"bits_per_weight": 5.1}
        for seed in (0, 1)
    ]
    ours = [
        {**line("LoRaQ", name, seed, 1.0), "group": title} | {"bits_per_weight": bits}
        for name, bits in ((COMPARISONS[title].declared, 4.9), (recipe, 5.1))
        for seed in (0, 1)
    ]
    rows = final_rows(ledger_of(tmp_path, *wide, *ours), "digits", title)
    assert verdict(rows, title) is None  # nobody stores so little
    ((said, row),) = beside(rows, title)
    assert (said, row.recipe) == (what, recipe)
    assert verdict(rows, title, row).said.startswith("**lost**")


def test_the_verdict_on_a_row_that_was_declared_before_is_folded_under_the_table(tmp_path):
    recipe = COMPARISONS[TITLE].withdrawn[0]
    before = with_errors("LoRaQ", [0.03, 0.033, 0.0315], recipe)
    rival = with_errors("QERA", [0.015, 0.0165, 0.01575])
    page = quality_page.page([], ledger_of(tmp_path, *OURS, *rival, *before))
    shown, folded = page.split("<summary>1 verdicts on rows that were declared before")
    assert f"`{recipe}`" not in shown
    (line,) = (text for text in folded.split("</details>")[0].splitlines() if recipe in text)
    assert "| 0.50 ± 0.00 | **lost**" in line


def test_a_fingerprint_is_of_what_a_method_makes_and_what_is_done_besides():
    def seen(**changes):
        return ledger.fingerprint(replace(row, **changes), "r16=5", "fast")

    row = Entrant("a", "mxfp4-a4+w8a8-h0", "gptq", statistics="own samples")
    assert seen() == seen(label="b")
    different = [seen(), seen(options={"rounds": 5}), seen(smoothing="grid"), seen(method="loraq")]
    assert len(set(different)) == 4


def test_a_fingerprint_does_not_depend_on_the_number_of_threads():
    row, before = Entrant("a", "int4-a8+int8-h0", statistics="own samples"), torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ledger.fixed_matrix.cache_clear()
            found.add(ledger.fingerprint(row, "r16=5", "fast"))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_the_picture_is_the_same_for_the_same_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    lines = ledger_of(tmp_path, *OURS, *with_errors("QERA", [0.02, 0.022, 0.021]))
    pictures = []
    for name in ("one.svg", "other.svg"):
        quality_page.draw(lines, tmp_path / name)
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith("<?xml")


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
    # Only "near" anew, later: in place of its older row.
    later = record(rival("near", 0.12, 0.1), date="2026-01-10") | changes
    later |= {"command": "against_rivals.py --only near --save"}
    text = rivals_section.section([rename(r) for r in (record(*rows) | changes, partial)])
    anew = rivals_section.section([rename(r) for r in (record(*rows) | changes, partial, later)])
    assert "| near | 4.500 | 0.1200 | 1.20 / – | 2.00 / – |" in anew
    assert "| far | 4.500 | 0.2000 | 2.00 / ∅ | 2.00 / ∅ |" in anew
    assert "part" not in anew.partition("<summary>")[2]
    assert "| near | 4.500 | 0.1100 | 1.10 / – | 2.00 / – |" in text
    assert "| far | 4.500 | 0.2000 | 2.00 / ∅ | 2.00 / ∅ |" in text
    assert "| 1.100 (near, 1152x1152) | 2 | **MISSED** by 1 |" in text
    assert "| 2 | met |" in text
    assert rivals_section.section([]) == ""


def test_the_same_branch_on_matrices_is_the_mean_over_shapes_against_its_bar():
    shapes = ([1152, 1152], [1152, 4608])
    rows = [
        {
            "table": "synthetic",
            "main": "int4",
            "shape": shape,
            "method": f"{method} r{rank} {branch}{times}",
        }
        | {"cpu_seconds": [seconds * rank]}
        for shape in shapes
        for rank, branch in ((64, "w8a8"), (85, "w6a6"))
        for method, times, seconds in (("LoRaQ", "", 3.0), ("SVDQuant", " x100", 4.0))
    ]
    rows += [
        {"table": "same branch", "main": "int4", "branch": "w8a8", "ratios": [1.3, 1.2]},
        {"table": "same branch", "main": "int4", "branch": "w6a6", "ratios": [1.2, 1.1]},
    ]
    older = record({"table": "synthetic"}) | {"benchmark": "quality.methods"}
    text = same_branch.section([record(*rows) | {"benchmark": "quality.methods"}, older])
    assert "| main weight | branch | 1152×1152 | 1152×4608 | mean | bar | time |" in text
    assert "| `int4` | w8a8 | 1.30 | 1.20 | 1.25 | met | 0.75 |" in text
    assert "| `int4` | w6a6 | 1.20 | 1.10 | 1.15 | **missed** | 0.75 |" in text
    assert same_branch.section([older]) == ""


def test_every_saved_record_is_known_and_can_be_read():
    records = read()
    # Two benchmarks have become tables of quality.run, and keep the form they were saved in.
    own = {"rotation", "self_calibration"}
    names = {record["benchmark"] for record in records} - own
    assert all(find_spec(f"benchmarks.{name}") for name in names)
    assert not names & set(RENAMED)
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
