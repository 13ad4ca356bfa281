"""Real processes and real kills: the command goes on where it was, and the bytes are those of a
run left alone.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loraq
from tests import gate as gated
from tests.clusters import finished, solved
from tests.folders import files_of

pytestmark = pytest.mark.slow

N_LAYERS = 10
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(loraq.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The same of a pipeline with two transformers, whose layers have the same names."""
    diffusers = pytest.importorskip("diffusers")
    from small.pixart import small_pixart

    place = tmp_path_factory.mktemp("kills of two")
    for name, width in (("transformer", 48), ("transformer_2", 56)):
        model = small_pixart(num_layers=1, attention_head_dim=width, caption_channels=2 * width)
        model.save_pretrained(place / "source" / name)
    diffusers.DPMSolverMultistepScheduler().save_pretrained(place / "source" / "scheduler")
    index: dict[str, object] = {
        name: ["diffusers", "PixArtTransformer2DModel"] for name in ("transformer", "transformer_2")
    }
    index |= {"scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}
    (place / "source" / "model_index.json").write_text(json.dumps(index))
    recipe = loraq.Recipe.from_dict({**loraq.Recipe.named("default").to_dict(), "effort": "fast"})
    report = loraq.quantize_checkpoint(place / "source", place / "expected", recipe, progress=False)
    (place / "names.json").write_text(json.dumps([layer.name for layer in report.layers]))
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A source whose layers take a noticeable time each, and
    what an uninterrupted run makes of it.
    """
    place = tmp_path_factory.mktemp("kills")
    rng = torch.Generator().manual_seed(0)
    weights = {
        f"blocks.{i}.proj.weight": torch.randn(224, 224 + i, generator=rng) for i in range(N_LAYERS)
    }
    save_file({**weights, "norm.scale": torch.ones(224)}, place / "source.safetensors")
    recipe = loraq.Recipe.from_dict({**loraq.Recipe.named("default").to_dict(), "effort": "fast"})
    loraq.quantize_checkpoint(
        place / "source.safetensors", place / "expected", recipe, progress=False
    )
    return place


def start(
    place: Path, target: Path, workers: int = 1, gate: Path | None = None
) -> subprocess.Popen:
    source = place / "source.safetensors"
    if not source.exists():
        source = place / "source"
    program = ["-m", "loraq"] if gate is None else [gated.__file__, gate]
    command = [sys.executable, *program, "quantize", source, target, "--effort", "fast"]
    return subprocess.Popen(
        [*command, "--workers", str(workers)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, as a shell makes it: Ctrl-C goes to all of it
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # whoever runs the tests may ignore it
    )


def until_a_layer_is_done(process: subprocess.Popen) -> str:
    """Read stderr until a layer is reported or the process ends; notes may come before."""
    read = ""
    while not solved(read) and (line := process.stderr.readline()):
        read += line
    return read


def gate_of(place: Path, tmp_path: Path) -> Path:
    """Return where the passes of a test are: not beside its target, which has to be alone."""
    return place / f"passes of {tmp_path.name}"


@pytest.mark.parametrize(("workers", "moments"), [(1, (0, 1, 2, 3)), (2, (1, 2))])
def test_kill_9_at_random_moments(place, tmp_path, workers, moments):
    target, chance, done = tmp_path / "out", random.Random(workers), set()
    gate = gate_of(place, tmp_path)
    for moment in moments:
        gated.add_passes(gate, 2)
        with start(place, target, workers, gate) as process:
            # Once before any layer, wherever that may be.
            first = until_a_layer_is_done(process) if moment else ""
            time.sleep(chance.uniform(0, 0.15) if moment else chance.uniform(0.5, 2))
            os.killpg(process.pid, signal.SIGKILL) if chance.random() < 0.5 else process.kill()
            shown = solved(first + process.stderr.read())
        assert process.returncode == -signal.SIGKILL
        assert not target.exists()
        assert not done & set(shown), "a finished layer was done again"
        assert done | set(shown) <= finished(target)
        done = finished(target)
    assert 1 < len(done) < N_LAYERS
    with start(place, target, workers) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"{len(done)} of them were finished before the last run was interrupted" in output
    assert sorted(solved(errors)) == sorted({f"blocks.{i}.proj" for i in range(N_LAYERS)} - done)
    assert files_of(target) == files_of(place / "expected")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_while_two_transformers_are_quantized(two, tmp_path, workers):
    names = json.loads((two / "names.json").read_text())
    target, chance, done = tmp_path / "out", random.Random(workers), set()
    gate = gate_of(two, tmp_path)
    for _ in range(2):
        gated.add_passes(gate, len(names) // 2 - 1)
        with start(two, target, workers, gate) as process:
            first = until_a_layer_is_done(process)
            time.sleep(chance.uniform(0, 0.2))
            os.killpg(process.pid, signal.SIGKILL)
            shown = solved(first + process.stderr.read())
        assert not target.exists()
        assert not done & set(shown), "a finished layer was done again"
        assert done | set(shown) <= finished(target) < set(names)
        done = finished(target)
    with start(two, target, workers) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"{len(done)} of them were finished before the last run was interrupted" in output
    assert sorted(solved(errors)) == sorted(set(names) - done)
    assert {name.partition("/")[0] for name in names} == {"transformer", "transformer_2"}
    assert files_of(target) == files_of(two / "expected")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_workers_are_an_error_with_the_name_of_its_layer(place, tmp_path):
    gate = gate_of(place, tmp_path)
    gated.add_passes(gate, 3)
    with start(place, tmp_path / "out", 2, gate) as process:
        until_a_layer_is_done(process)
        for pid in workers_of(process.pid):
            os.kill(pid, signal.SIGKILL)
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 1
    assert re.search(
        r"Error: Layer 'blocks\.\d\.proj' failed: its worker was killed by signal 9.*"
        r"\d of 10 layers are kept",
        errors.replace("\n", " "),
    ), errors
    assert "Traceback" not in errors
    done = finished(tmp_path / "out")
    with start(place, tmp_path / "out", 2) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"{len(done)} of them were finished before the last run was interrupted" in output
    assert files_of(tmp_path / "out") == files_of(place / "expected")


def workers_of(parent: int) -> list[int]:
    """Return the processes that do layers for another: not Python's own that watches over them."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [
        int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_a_run_at_work_and_says_what_is_kept(place, tmp_path, workers):
    gate = gate_of(place, tmp_path)
    gated.add_passes(gate, N_LAYERS - 1)  # without Ctrl-C it would wait for the last one for ever
    with start(place, tmp_path / "out", workers, gate) as process:
        until_a_layer_is_done(process)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    n = len(finished(tmp_path / "out"))
    last = errors.splitlines()[-1]
    assert last == f"Interrupted. {n} of {N_LAYERS} layers are kept; run the same command to go on."
    assert not (tmp_path / "out").exists()
