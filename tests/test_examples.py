"""The examples run: on what ships with loraq, and on a pipeline that is given to them."""

import json
import os
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loraq.evaluation import digits
from loraq.methods import EFFORTS

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are only in a clone of the repository", allow_module_level=True)
pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from small import pixart  # noqa: E402

#: Warnings of diffusers' own scheduler about numpy, not ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword"
)
CALL = {"num_inference_steps": 2, **pixart.CALL}
SCRIPTS = {"in_memory.py", "from_files.py", "lora_and_export.py"}
NOTEBOOK = EXAMPLES / "tour.ipynb"


@pytest.fixture(autouse=True)
def _short_and_elsewhere(tmp_path, monkeypatch):
    """A few steps of the solver, and of the sampler, show that all fits together."""
    monkeypatch.setitem(EFFORTS, "fast", (6, 3))
    monkeypatch.setattr(digits, "sample", partial(digits.sample, steps=4))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    from tiny_pipelines import tiny_pixart_sigma

    return tiny_pixart_sigma(tmp_path_factory.mktemp("pipelines") / "float")


@pytest.fixture
def run(monkeypatch, capsys):
    def run_script(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def cells(kind: str) -> list[dict[str, Any]]:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def run_notebook(**parameters: object) -> dict[str, Any]:
    """Run the code of all cells in one namespace, with other parameters after their cell."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells("code"):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, {cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(parameters) <= set(names)
            names |= parameters
    return names


def difference_of(text: str) -> float:
    return float(text.rpartition("pictures: ")[2].split(" %")[0])


def test_these_are_all():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == SCRIPTS
    assert list(EXAMPLES.glob("*.ipynb")) == [NOTEBOOK]
    assert all(len((EXAMPLES / name).read_text().splitlines()) <= 60 for name in scripts)


def test_a_model_in_memory(run):
    text = run("in_memory.py")
    assert "bits for each weight of 85 layers" in text
    assert 0 < difference_of(text) < 5


def test_a_pipeline_in_memory(run, pipeline):
    text = run("in_memory.py", pipeline, "--call", json.dumps(CALL))
    assert text.startswith("transformer: ")
    assert 0 < difference_of(text) < 20


def test_files(run, tmp_path):
    assert "quantized.png" in run("from_files.py")
    assert (tmp_path / "quantized" / "loraq.json").is_file()
    with Image.open(tmp_path / "quantized.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (96, 960)
    assert pixels.std() > 50  # digits, not noise around one gray


def test_files_of_a_pipeline(run, pipeline, tmp_path):
    run("from_files.py", pipeline, "--out", tmp_path / "whole", "--call", json.dumps(CALL))
    assert (tmp_path / "whole" / "transformer" / "loraq.json").is_file()
    with Image.open(tmp_path / "whole.png") as picture:
        assert picture.size == (32, 32)


def test_a_lora_and_an_export(run, tmp_path):
    text = run("lora_and_export.py")
    assert "style on 1 layers" in text
    assert "styled-sdnq: {'exact': " in text
    assert (tmp_path / "styled-sdnq" / "README.md").is_file()
    # The same of a folder and a LoRA that are given.
    where = ("--out", tmp_path / "other", "--to", "dense")
    run("lora_and_export.py", tmp_path / "digits", tmp_path / "style.safetensors", *where)
    assert (tmp_path / "other-dense" / "config.json").is_file()


@pytest.mark.parametrize(
    "given", [pytest.param(False, marks=pytest.mark.slow), True], ids=["digits", "pipeline"]
)
def test_the_notebook(given, pipeline, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    names = run_notebook(**({"PIPELINE": str(pipeline), "CALL": CALL} if given else {}))
    names["plt"].close("all")
    assert list(names["reports"]) == ["round to nearest", "SVDQuant", "LoRaQ"]
    errors = [report.mean_relative_error for report in names["reports"].values()]
    assert errors == sorted(errors, reverse=True)
    assert all(difference > 0 for difference in names["differences"].values())


def test_the_notebook_stores_no_results():
    assert cells("markdown")
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells("code"))
    assert os.stat(NOTEBOOK).st_size < 20_000
