"""The harness that runs other packages beside ours, on a rival that the test makes up."""

import py_compile
import re
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("benchmarks")

from benchmarks.rivals.environment import RivalError, environment
from benchmarks.rivals.packages.contract import SQUARE
from benchmarks.rivals.run import RUNNERS, Ours, Weight, our_rows, rival_rows
from benchmarks.worlds.matrices import dit_like
from loraq.formats import get_format
from loraq.methods import RTN
from loraq.scheme import Scheme

NAMES = sorted(path.stem for path in RUNNERS.glob("*.txt"))

FAKE = """
import torch
from contract import Quantized, Variant, rank_of, run

def halves(weight, rank):
    return Quantized(weight / 2, 100, weight / 4)

def rotated(weight, rank):
    return Quantized(weight, weight.numel() * 5 // 8, splits=False)

def broken(weight, rank):
    raise ValueError(f"no rank {rank}\\nand more")

run(
    Variant("halves", halves),
    Variant("rotated", rotated, family="mxfp4", counted="as packed"),
    Variant("broken", broken),
    Variant("slow", halves, slow=True),
)
"""


def write_rival(folder, code):
    shutil.copy(RUNNERS / "contract.py", folder)
    (folder / "fake.txt").write_text("fake==1.0\n")
    (folder / "run_fake.py").write_text(code)


def weights():
    return [
        Weight("a", "small", dit_like(64, 128)),
        Weight("b", "small", dit_like(128, 64, seed=1)),
    ]


def run_fake(folder, limit=120.0):
    return rival_rows("fake", sys.executable, weights(), Ours(), limit=limit, runners=folder)


def test_every_rival_has_a_runner_and_one_pinned_package():
    assert {f"run_{name}" for name in NAMES} == {path.stem for path in RUNNERS.glob("run_*.py")}
    assert len(NAMES) >= 2
    for name in NAMES:
        py_compile.compile(str(RUNNERS / f"run_{name}.py"), doraise=True)
        assert re.fullmatch(r"[\w.-]+==[\w.]+\n", (RUNNERS / f"{name}.txt").read_text()), name


def test_a_rival_is_judged_by_what_it_wrote_and_its_failures_are_told(tmp_path):
    write_rival(tmp_path, FAKE)
    rows, failures = run_fake(tmp_path)
    assert failures == ["fake broken, small: ValueError: no rank 2"]
    halves, rotated = rows
    assert (halves.label, halves.group, halves.package) == ("fake halves", "small", "fake==1.0")
    assert halves.bits_per_weight == 8 * 200 / (2 * 64 * 128)
    assert halves.weight_error == pytest.approx(0.25)
    assert halves.output_errors["A16"] == pytest.approx(0.25)
    assert 0.25 < halves.output_errors["A8"] < halves.output_errors["A4"]
    assert halves.loraq is None  # no branch fits in so few bytes
    assert (rotated.weight_error, rotated.output_errors) == (0, {"A16": 0, "A8": None, "A4": None})
    assert rotated.counted == "as packed"
    assert rotated.loraq.label.startswith("mxfp4 r")
    assert (
        0.9 * rotated.bits_per_weight
        < rotated.loraq.bits_per_weight
        <= rotated.bits_per_weight
        == 5
    )


def test_the_branch_of_a_rival_sees_inputs_that_are_not_rounded(tmp_path):
    code = """
from contract import Quantized, Variant, run
run(
    Variant("main", lambda weight, rank: Quantized(weight, 1)),
    Variant("branch", lambda weight, rank: Quantized(0 * weight, 1, weight)),
)
"""
    write_rival(tmp_path, code)
    (main, branch), _ = run_fake(tmp_path)
    weight = weights()[0]
    rounded = get_format("int4").for_rows().round(weight.x)
    expected = (
        ((rounded - weight.x) @ weight.value.T).norm() / (weight.x @ weight.value.T).norm()
    ).item()
    assert main.output_errors["A4"] > 0.05
    assert branch.output_errors["A4"] == pytest.approx(0, abs=1e-6)
    write_rival(tmp_path, code)
    ((alone, _), _) = rival_rows(
        "fake", sys.executable, [weight], Ours(), limit=120, runners=tmp_path
    )
    assert alone.output_errors["A4"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_package\n", "No module named 'no_such_package'"),
        ("import time\ntime.sleep(60)\n", "stopped after 1 s"),
    ],
)
def test_a_runner_that_does_not_finish_is_told(tmp_path, code, reason):
    write_rival(tmp_path, code)
    rows, (failure,) = run_fake(tmp_path, limit=1 if "sleep" in code else 60)
    assert rows == []
    assert failure.startswith("fake: ")
    assert failure.endswith(reason)


def test_a_slow_variant_gets_the_square_weight_only(tmp_path):
    write_rival(tmp_path, FAKE)
    square = Weight(SQUARE, SQUARE, dit_like(32, 32))
    rows, _ = rival_rows(
        "fake", sys.executable, [square, *weights()], Ours(), limit=120, runners=tmp_path
    )
    assert [row.group for row in rows if row.label == "fake slow"] == [SQUARE]


def test_our_rows_are_what_our_methods_give():
    weight = weights()[0]
    rows = {row.label: row for row in our_rows("small", [weight], Ours(), best=False)}
    solution = RTN().solve(weight.value, Scheme("int4"))
    assert rows["our RTN int4"].weight_error == solution.relative_error
    assert rows["our RTN int4"].bits_per_weight == solution.bits_per_weight
    allowed = rows["our SVDQuant int4 w16, one-shot"].bits_per_weight
    for branch in ("w16", "w8", "w6", "w4"):
        assert rows[f"our LoRaQ int4 {branch}"].bits_per_weight <= allowed


def test_an_environment_sees_the_torch_of_the_caller_and_is_made_once(tmp_path):
    requirements = tmp_path / "none.txt"
    requirements.write_text("")
    python = environment(requirements, tmp_path)
    asked = "import sys, torch; print(sys.prefix); print(torch.__version__)"
    said = subprocess.run(
        [python, "-c", asked], capture_output=True, text=True, check=True
    ).stdout.split()
    assert said == [str(tmp_path / "none"), torch.__version__]
    (tmp_path / "none" / "kept").touch()
    assert environment(requirements, tmp_path) == python
    assert (tmp_path / "none" / "kept").exists()
    requirements.write_text(f"{tmp_path}/missing-1.0-py3-none-any.whl\n")
    with pytest.raises(RivalError, match=r"exit code 1: ERROR: .*missing-1\.0"):
        environment(requirements, tmp_path)
