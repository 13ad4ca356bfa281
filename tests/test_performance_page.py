"""The page of timings says what the result files say; bars are judged by the worst value."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "docs").is_dir():
    pytest.skip("the documents are only in a clone of the repository", allow_module_level=True)
performance = pytest.importorskip("benchmarks.speed.page")
from benchmarks.results import read, rename  # noqa: E402
from benchmarks.speed import machines  # noqa: E402

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


def bar_rows(page: str) -> dict[str, list[str]]:
    """Cells of the table of bars, by promise and place."""
    section = page.split("## The bars")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
    return {f"{cells[0]} ({cells[1]})": cells[1:] for cells in lines[1:]}


def verdicts(page: str) -> list[str]:
    """What is said of three bars of a CPU."""
    mine = ("`int8_row` with branch ≥ 1.5", "the branch adds ≤", "`resident`, 16-bit")
    return [cells[-1] for promise, cells in bar_rows(page).items() if promise.startswith(mine)]


def stream(layers=285, of=285, minutes=9.0, peak_mb=200, model="pixart-sigma", **changes):
    row = {"model": model, "recipe": "int4-a16+w6a6", "effort": "default", "workers": 2}
    row |= {"layers": layers, "layers_of_the_model": of, "seconds": 60 * minutes}
    row |= {"hours_for_all_layers": 2.5, "peak_anonymous_bytes": peak_mb * 10**6}
    return row | {"largest_tensor_fp32_bytes": 50 * 10**6} | changes


def engines(openvino=115.0, low_memory=100.0, what="step"):
    plain = {"what": what, "tokens": 1024, "ms": 12.0, "times_bf16": 0.7, "load": 0.5}
    mib = {"torch openvino": openvino, "torch low_memory": low_memory, "torch bf16": 300.0}
    return [{**plain, "contender": name, "mib": value} for name, value in mib.items()]


def test_the_page_is_what_the_result_files_give():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert text == performance.page(read()), "docs/performance.md is stale: run `make docs`"


def test_without_files_every_table_says_so():
    page = performance.page([])
    assert page.count("No result file yet") == 5
    assert {cells[-1] for cells in bar_rows(page).values()} == {performance.NO_FILE}
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


@pytest.mark.parametrize(
    ("ratio", "changes", "verdict"),
    [
        (0.75, {}, "met"),
        (0.749, {}, "**MISSED**"),
        (0.5, {"cpu_capability": "AVX512 + AMX"}, None),
        (0.5, {"cpu_capability": "AVX512 + AMX", "onednn_limit": "AVX512"}, "**MISSED**"),
    ],
)
def test_the_bar_of_low_memory_is_about_cpus_without_matrix_units(ratio, changes, verdict):
    others = {"low_memory a16": 0.1}  # of other sizes and numbers of tokens, which it is not about
    rows = [
        *layer(**{"low_memory a16": ratio}),
        *layer(4096, **others),
        *layer(n_in=576, **others),
    ]
    found = bar_rows(performance.page([record(rows=rows, **changes)]))
    said = [cells[-1] for promise, cells in found.items() if promise.startswith("`low_memory`")]
    assert said == ([verdict] if verdict else [])


@pytest.mark.parametrize(("openvino", "verdict"), [(115.0, "met"), (116.0, "**MISSED**")])
def test_the_bar_of_openvino_s_memory_is_about_the_peak_of_low_memory(openvino, verdict):
    rows = [*engines(100.0, what="block"), *engines(openvino)]
    page = performance.page([record("speed.engines", rows)])
    (cells,) = [c for name, c in bar_rows(page).items() if "packed bytes" in name]
    assert cells[-1] == verdict
    assert cells[1] == f"{openvino / 100:.2f} × (step, {openvino:.0f} of 100 MiB)"


def test_whole_models_stand_in_a_table_and_an_extrapolated_time_says_so():
    rows = [
        stream(mean_relative_error=0.0512),
        stream(40, minutes=1.0, effort="fast", model="flux.1", peak_mb=2458),
    ]
    page = performance.page([record("speed.stream", rows)])
    run = "2026-01-02, abc1234"
    assert (
        f"| PixArt-Σ XL | `int4-a16+w6a6` | default | 285 of 285 | 2 | 9.0 min | 200 | 2.0 | "
        f"0.0512 | {run} |"
    ) in page
    assert (
        f"| FLUX.1 | `int4-a16+w6a6` | fast | 40 of 285 | 2 | 2.5 h, extrapolated | 2458 | 24.6 | "
        f"– | {run} |"
    ) in page


@pytest.mark.parametrize(
    ("minutes", "layers", "recipe", "verdict", "is_like"),
    [
        (10.0, 224, "int4-a16+w6a6", "met", True),
        (10.1, 224, "int4-a16+w6a6", "**MISSED**", True),
        (9.0, 285, "int4-a16+w6a6", "met", False),
        (15.2, 285, "int4-a8+int8", "**MISSED**", False),
    ],
)
def test_the_bar_of_minutes_says_whether_the_run_is_like_the_one_it_was_set_for(
    minutes, layers, recipe, verdict, is_like
):
    rows = [stream(layers, layers, minutes, recipe=recipe)]
    page = performance.page([record("speed.stream", rows)])
    (cells,) = [c for name, c in bar_rows(page).items() if "≤ 10 minutes" in name]
    assert cells[1] == f"{minutes:.1f} min ({layers} layers, `{recipe}`)"
    assert cells[-1] == verdict
    assert ("Not like for like" in page) != is_like


def test_the_bar_of_minutes_takes_the_recipe_that_it_was_set_for_before_a_newer_run():
    like = stream(224, 224, 9.0)
    newer = stream(285, 285, 20.0, recipe="int4-a8+int8")
    part = stream(8, 285, 1.0)
    page = performance.page(
        [record("speed.stream", [like]), record("speed.stream", [newer]), record(rows=layer())]
    )
    assert "9.0 min (224 layers" in page
    assert "20.0 min |" in page
    found = bar_rows(performance.page([record("speed.stream", [part])]))
    assert [c[-1] for name, c in found.items() if "10 minutes" in name] == [performance.NO_FILE]


@pytest.mark.parametrize(("peak_mb", "verdict"), [(400, "met"), (401, "**MISSED**")])
def test_the_bar_of_memory_is_four_copies_a_worker(peak_mb, verdict):
    rows = [stream(), stream(40, model="flux.1", effort="fast", peak_mb=peak_mb)]
    page = performance.page([record("speed.stream", rows)])
    (cells,) = [c for name, c in bar_rows(page).items() if "fp32 copies" in name]
    assert (cells[1][:3], cells[-1]) == ("4.0", verdict)
    over = "FLUX.1 at effort fast 0.40 GB where 0.40 are allowed"
    assert (over in page) == (verdict != "met")


def test_what_the_page_of_back_ends_says_of_openvino_holds_in_the_newest_files():
    text = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    assert "In a model it takes more than `resident`, and is slower" in text
    found = machines.newest(read(), "speed.engines", "what")
    assert found
    for record in (one for by_what in found.values() for one in by_what.values()):
        rows = {row["contender"].removeprefix("torch "): row for row in record["rows"]}
        assert rows["openvino"]["mib"] > rows["resident"]["mib"]
        assert rows["openvino"]["times_bf16"] < rows["resident"]["times_bf16"]
        assert rows["openvino bf16"]["times_bf16"] > 1


def test_rows_of_stream_that_named_no_recipe_have_the_default_of_then():
    row = stream()
    del row["recipe"]
    (found,) = rename(record("stream_models", [row], commit="ce4749b"))["rows"]
    assert found["recipe"] == "mxfp4-a8+w8a8"
    (found,) = rename(record("speed.stream", [stream()], commit="ce4749b"))["rows"]
    assert found["recipe"] == "int4-a16+w6a6"
    assert all(
        "recipe" in row
        for one in read()
        if one["benchmark"] == "speed.stream"
        for row in one["rows"]
    )


def test_the_summary_is_short_and_counted_from_the_files():
    page = performance.page(
        [
            record(rows=[*layer(openvino=1.1), *layer(4096, openvino=1.3)]),
            record("speed.stream", [stream(minutes=15.0)]),
            record("speed.engines", engines()),
        ]
    )
    lines = page.split("## In short\n\n")[1].split("\n\n")[0].splitlines()
    bars = list(bar_rows(page).values())
    met = sum(cells[-1] == "met" for cells in bars)
    missed = sum(cells[-1] == "**MISSED**" for cells in bars)
    assert lines[0] == (
        f"* **Bars**: {met} met, {missed} missed, {len(bars) - met - missed} without a result "
        "file; the table is below."
    )
    assert missed == 1
    assert any("`resident` 0.90, `int8_row` 1.60, `openvino` 1.20." in line for line in lines)
    assert any("PixArt-Σ XL at effort default 15.0 min" in line for line in lines)
    assert lines[-1] == "* **GPUs**: not measured, and nothing is claimed for them."


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
    assert "CPU, AVX2, 1 thread: not judged" in page


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
    assert "PixArt-Σ, Some GPU</summary>" in page
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
    assert "* **The solver**, seconds a layer: 1152×4608 9.9 (extrapolated)." in page


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
