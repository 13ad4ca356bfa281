"""All of `make gpu` on a CPU, in small: minutes, so `make gpu-rehearsal` runs it by its name."""

import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.run import STEPS
from benchmarks.results import read
from benchmarks.speed.page import page

ROOT = Path(__file__).parents[1]


def test_a_rehearsal_runs_every_step_and_its_results_make_a_page(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--rehearse", "--results"]
    done = subprocess.run(
        [*command, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(STEPS)} of {len(STEPS)} steps succeeded" in done.stdout
    records = read(tmp_path)
    found = {record["benchmark"] for record in records}
    assert found == {"speed.solver", "speed.layer", "speed.block", "gpu.graphs", "gpu.run"}
    text = page([{**record, "device": "cuda", "gpu": "Some GPU"} for record in records])
    assert f"The last run: {len(STEPS)} of {len(STEPS)} steps succeeded." in text
    for backend in ("low_memory", "resident", "int8_row", "triton"):
        assert f"layer, 64 tokens, `{backend}`" in text
    assert "block, 16 tokens, `low_memory`" in text
    assert "| step, 16 tokens |" in text
