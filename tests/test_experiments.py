"""The studies of the paper's models run from end to end on
pipelines of their classes that are built here.
"""

import importlib
import json
import re

import pytest

from loraq.recipe import Recipe

pytest.importorskip("diffusers")
pytest.importorskip("tiny_pipelines")

ROWS = ["rtn:mxfp4", "loraq:mxfp4+w8a8"]
SETTINGS = [  # AlexNet is not to be had here
    "--local-tiny",
    "--effort",
    "fast",
    "--images",
    "1",
    "--steps",
    "2",
    "--device",
    "cpu",
    "--no-lpips",
]


of_diffusers = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword"
)


@of_diffusers
@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart_sigma", "sana"])
def test_a_study_quantizes_loads_and_draws(name, tmp_path, capsys):
    from paper_study import main

    study = importlib.import_module(name).STUDY
    rtn, ours = main(study, [*SETTINGS, "--out", str(tmp_path), "--only", *ROWS])
    source = tmp_path / "tiny" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert rtn.nbytes < ours.nbytes < source.stat().st_size
    assert ours.weight_error < rtn.weight_error
    for row in (rtn, ours):
        assert 15 < row.psnr_db < 100  # another image than the float model's, but the same picture
        assert row.lpips is None
    # The float model's image is drawn once.
    assert len(list((tmp_path / "images").rglob("*.png"))) == 3
    printed = capsys.readouterr().out
    assert "says nothing about quality" in printed
    assert re.search(r"^SVDQuant +NVFP4 +1[89]\.\d", printed, re.MULTILINE)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["recipe"] for row in results["rows"]] == ["mxfp4", "mxfp4+w8a8"]
    written = (tmp_path / "models" / "loraq-mxfp4+w8a8" / "loraq.json").stat().st_mtime_ns
    again = main(study, [*SETTINGS, "--out", str(tmp_path), "--only", ROWS[1]])
    assert (tmp_path / "models" / "loraq-mxfp4+w8a8" / "loraq.json").stat().st_mtime_ns == written
    assert again[0].psnr_db == ours.psnr_db


def test_every_row_of_ours_has_a_rival_with_its_branch():
    from paper_study import CONTENDERS, HELPED, _contender

    rows = {(row.recipe, row.method, bool(row.options)) for row in CONTENDERS}
    ours = {recipe for recipe, method, _ in rows if method == "loraq"}
    assert all((recipe, "svdquant", True) in rows for recipe in ours)
    assert len(rows) == len(CONTENDERS) == len({row.label for row in CONTENDERS})
    helped = _contender(f"{HELPED}:mxfp4+w8a8-h0")
    assert helped in CONTENDERS
    assert helped.options == {"rounds": 100, "rotate": True}


def test_the_declared_rows_from_weights_alone_take_part():
    tables = pytest.importorskip("benchmarks.quality.tables")
    from paper_study import CONTENDERS

    declared = {c.declared for c in tables.COMPARISONS.values() if not (c.statistics or c.budget)}
    ours = {row.recipe for row in CONTENDERS if row.method == "loraq"}
    schemes, held = ({Recipe.named(name).scheme for name in names} for names in (declared, ours))
    assert schemes <= held
    assert len(held) == len(ours)  # none is there twice


def test_a_study_draws_in_the_published_dtype():
    from paper_study import _options

    dtypes = {
        name: _options(importlib.import_module(name).STUDY, []).dtype
        for name in ("pixart_sigma", "sana")
    }
    assert dtypes == {"pixart_sigma": "float16", "sana": "bfloat16"}


def test_prompts_are_those_of_the_published_protocol(tmp_path):
    from loraq.evaluation.prompts import read_named_prompts
    from paper_study import _prompts

    table = {f"k{i * 7 % 20:02d}": {"prompt": f"prompt {i}"} for i in range(20)}
    (tmp_path / "meta_data.json").write_text(json.dumps(table))
    chosen = _prompts(tmp_path / "meta_data.json", 5)
    assert chosen == read_named_prompts(tmp_path / "meta_data.json", 5)
    assert len({prompt.seed for prompt in chosen}) == 5
    assert len(_prompts(None, 11)) == 11
