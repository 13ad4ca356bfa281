"""The page of timings says what the result files say; bars are judged by the worst value."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "docs").is_dir():
    pytest.skip("the documents are only in a clone of the repository", allow_module_level=True)
performance = pytest.importorskip("benchmarks.speed.page")
from benchmarks.results import read  # noqa: E402

MET = {"int8_row": 1.6, "resident a16": 0.9, "int8 product": 3.0, "branch": 0.1}


def record(benchmark="speed.layer", rows=(), **changes):
    plain = {
        "benchmark": benchmark,
        "device": "cpu",
        "date": "2026-01-02T00:00:00+00:00",
        "commit": "abc1234",
    }
    plain |= {
        "changed": False,
        "command": f"{benchmark}.py --save",
        "torch": "2.13",
        "machine": "x86_64",
    }
    plain |= {
        "cpu_count": 2,
        "cpu_capability": "AVX2",
        "onednn_limit": None,
        "threads": 2,
        "rows": list(rows),
    }
    return plain | changes


def layer(tokens=1024, n_in=1152, model="pixart", **ratios):
    values = MET | ratios
    branch = values.pop("branch")
    rows = [
        {"contender": name, "times_bf16": ratio, "ms": 1 / ratio}
        for name, ratio in {"bf16": 1.0, **values}.items()
    ]
    next(row for row in rows if row["contender"] == "int8_row")["branch_cost"] = branch
    return [
        {**row, "model": model, "layer": "ff", "n_in": str(n_in), "n_out": "1152", "tokens": tokens}
        for row in rows
    ]


def verdicts(page: str) -> list[str]:
    return [
        line.split("|")[-2].strip() for line in page.splitlines() if "≥ 1.5" in line or "≤" in line
    ]


def test_the_page_is_what_the_result_files_give():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert text == performance.page(read()), "docs/performance.md is stale: run `make docs`"


def test_without_files_every_table_says_so():
    page = performance.page([])
    assert page.count("No result file yet") == 4
    assert "Not measured yet: nothing is claimed for a GPU" in page
    assert "MISSED" not in page
    assert verdicts(page) == []


def test_bars_are_met_or_missed_by_the_worst_value():
    assert verdicts(performance.page([record(rows=layer())])) == ["met"] * 3
    missed = {"int8_row": 1.49, "branch": 0.151, "resident a16": 0.79}
    for at, (name, value) in enumerate(missed.items()):
        expected = ["met"] * 3
        expected[at] = "**MISSED**"
        page = performance.page([record(rows=[*layer(), *layer(4096, **{name: value})])])
        assert verdicts(page) == expected
        assert "4096 tokens)" in next(line for line in page.splitlines() if "MISSED" in line)


@pytest.mark.parametrize(
    ("ratios", "verdict"), [((0.5, 0.9, 2.0), "met"), ((0.5, 0.8, 2.0), "**MISSED**")]
)
def test_the_bar_of_openvino_is_about_the_median(ratios, verdict):
    rows = [row for i, ratio in enumerate(ratios) for row in layer(1024 + i, openvino=ratio)]
    page = performance.page([record(rows=rows)])
    line = next(line for line in page.splitlines() if line.startswith("| `openvino`"))
    assert line.split("|")[-2].strip() == verdict
    assert f"| {ratios[1]:.2f} × | 3 |" in line


def test_engines_stand_beside_bf16_with_the_load_of_the_machine():
    row = {"what": "block", "tokens": 1024, "contender": "openvino f32", "ms": 12.0}
    row |= {"times_bf16": 1.234, "mib": 45.6, "load": 7.89}
    floats = row | {"contender": "torch bf16", "load": None}
    page = performance.page([record("speed.engines", [row, floats])])
    assert "| openvino f32 | 12 | 1.23 | 46 | 7.9 |" in page
    assert "| torch bf16 | 12 | 1.23 | 46 | – |" in page


def test_the_speed_bar_is_about_large_layers_only():
    rows = [*layer(), *layer(tokens=256, int8_row=0.5), *layer(n_in=576, int8_row=0.5)]
    assert verdicts(performance.page([record(rows=rows)])) == ["met"] * 3


def test_a_slow_product_is_named_only_beside_a_miss():
    slow = {"int8 product": 1.2}
    why = (
        "bare INT8 product is itself below 1.5 × bf16 in 1 of these 1 measurements (1.20 to 1.20 ×)"
    )
    assert why in performance.page([record(rows=layer(int8_row=1.0, **slow))])
    assert "bare INT8 product" not in performance.page([record(rows=layer(**slow))])
    assert "bare INT8 product" not in performance.page([record(rows=layer(int8_row=1.0))])


def test_a_contender_that_was_not_measured_is_no_met_bar():
    rows = [row for row in layer() if row["contender"] != "resident a16"]
    assert verdicts(performance.page([record(rows=rows)])) == ["met", "met", performance.NO_FILE]


def test_bars_wait_for_their_number_of_threads():
    page = performance.page([record(rows=layer(), threads=1)])
    assert verdicts(page) == []
    assert "this run had 1" in page


def test_the_newest_record_of_each_machine_and_model_counts(tmp_path):
    old = record(
        rows=[*layer(int8_row=7.77), *layer(model="flux", int8_row=5.55)],
        date="2026-01-01T00:00:00+00:00",
    )
    new = record(rows=layer(int8_row=3.33), changed=True)
    limited = record(rows=layer(int8_row=4.44), onednn_limit="AVX512_CORE_BF16")
    page = performance.page([old, limited, new])
    assert "7.77" not in page
    assert all(value in page for value in ("3.33", "4.44", "5.55"))
    assert "torch kept to AVX512_CORE_BF16" in page
    assert page.count("not committed") == 1


def test_records_are_read_from_lines_by_date(tmp_path):
    import json

    (tmp_path / "cpu").mkdir()
    dates = ("2026-01-03", "2026-01-01", "2026-01-02")
    lines = [json.dumps(record(date=date)) for date in dates]
    (tmp_path / "cpu" / "a.json").write_text("\n".join(lines[:2]) + "\n")
    (tmp_path / "cpu" / "b.json").write_text(lines[2] + "\n")
    assert [found["date"] for found in read(tmp_path)] == sorted(dates)


def test_a_gpu_has_a_section_and_no_bars_of_a_cpu():
    page = performance.page([record(rows=layer(), device="cuda", gpu="Some GPU")])
    assert "### Some GPU" in page
    assert verdicts(page) == []
    assert "Not measured yet" not in page


def test_contenders_of_one_commit_stand_in_one_table_whatever_process_measured_them():
    rows = layer()
    ours = [row for row in rows if row["contender"] in ("bf16", "int8_row")]
    others = [row for row in rows if row["contender"] in ("bf16", "resident a16")]
    page = performance.page([record(rows=ours, command="one"), record(rows=others, command="two")])
    assert "| 1024 tokens | bf16 ms | int8_row | resident a16 | branch of int8_row |" in page
    assert "`one`, `two`" in page
    later = record(rows=others, commit="fff0000", command="two")
    assert "int8_row |" not in performance.page([record(rows=ours, command="one"), later])


def test_graphs_of_a_gpu_show_times_and_failures():
    good = {"what": "layer", "tokens": 8, "contender": "resident", "failure": None}
    good |= {"error": 0.0001, "ms_eager": 0.5, "ms_replay": 0.1, "captured": True}
    bad = {"what": "layer", "tokens": 8, "contender": "triton", "failure": "ValueError: no"}
    steps = [{"step": "tests", "failure": "exit code 1"}, {"step": "doctor", "failure": ""}]
    on_gpu = {"device": "cuda", "gpu": "Some GPU"}
    page = performance.page(
        [record("gpu.graphs", [good, bad], **on_gpu), record("gpu.run", steps, **on_gpu)]
    )
    assert "| layer, 8 tokens, `resident` | 0.500 | 0.100 | 1.0e-04 |  |" in page
    assert "| layer, 8 tokens, `triton` | – | – | – | ValueError: no |" in page
    assert "The last run: 1 of 2 steps succeeded." in page
    assert "Failed: tests (exit code 1)." in page


def test_blocks_and_the_solver_show_their_rows():
    block = {
        "what": "block",
        "tokens": 1024,
        "contender": "int8_row",
        "ms": 12.3,
        "times_bf16": 1.23,
        "mib": 45.6,
    }
    solved = {
        "shape": [1152, 4608],
        "scheme": "mxfp4-a8+w6a8",
        "package_commit": "fff0000",
        "seconds_of_ends": 1.0,
    }
    after = solved | {
        "label": "after",
        "seconds": 9.9,
        "extrapolated": True,
        "default_steps": [140, 56],
    }
    after["seconds_per_step"] = [0.01, 0.02]
    before = after | {
        "label": "before",
        "seconds": 20.1,
        "default_steps": [100, 40],
        "seconds_per_step": [0.03, 0.06],
    }
    records = [record("speed.block", [block]), record("speed.solver", [after])]
    page = performance.page(records)
    assert "| int8_row | 12 | 1.23 | 46 |" in page
    assert "Before: no result file yet." in page
    assert "| 1152×4608, `mxfp4-a8+w6a8` | – | 9.9 * | – | 140 + 56 | – | 10 / 20 | – |" in page
    page = performance.page([*records, record("speed.solver", [before])])
    assert "| 20.1 * | 9.9 * | 100 + 40 | 140 + 56 | 30 / 60 | 10 / 20 | 3.00 × |" in page
    fast = after | {"effort": "fast", "seconds": 1.5, "default_steps": [25, 10]}
    page = performance.page([record("speed.solver", [after | {"effort": "default"}, fast])])
    assert "| 1152×4608, `mxfp4-a8+w6a8` | – | 9.9 * | – | 140 + 56 |" in page
    assert "| 1152×4608, `mxfp4-a8+w6a8`, fast | – | 1.5 * | – | 25 + 10 |" in page


@pytest.mark.parametrize(
    "command", [line for lines in performance.COMMANDS.values() for line in lines]
)
def test_every_command_takes_the_options_it_shows(command):
    if "python -m" not in command:
        return
    module, *words = command.split("python -m ")[1].split()
    script = ROOT / f"{module.replace('.', '/')}.py"
    text = script.read_text() + (ROOT / "benchmarks" / "record.py").read_text()
    for option in (word for word in words if word.startswith("--")):
        name = option.removeprefix("--")
        assert f'"{option}"' in text or f"{name}=" in text
