"""The studies of the paper's models run from end to end on
pipelines of their classes that are built here.
"""

import importlib
import json

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("tiny_pipelines")

ROWS = ["rtn:mxfp4", "loraq:mxfp4+w8a8"]
SETTINGS = ["--local-tiny", "--effort", "fast", "--images", "1", "--steps", "2", "--device", "cpu"]

of_diffusers = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword"
)


@of_diffusers
@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart_sigma", "sana"])
def test_a_study_quantizes_loads_and_draws(name, tmp_path, capsys):
    from paper_study import main

    study = importlib.import_module(name).STUDY
    exact, rtn, ours = main(study, [*SETTINGS, "--out", str(tmp_path), "--only", *ROWS])
    assert exact.psnr_db == float("inf")
    assert exact.ssim == pytest.approx(1)
    assert rtn.nbytes < exact.nbytes
    assert ours.weight_error < rtn.weight_error
    for row in (rtn, ours):
        assert 15 < row.psnr_db < 100  # another image than the float model's, but the same picture
        assert len(list((tmp_path / "images" / f"{row.method}-{row.recipe}").glob("*.png"))) == 1
    printed = capsys.readouterr().out
    assert "says nothing about quality" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["recipe"] for row in results["rows"]] == ["bfloat16", "mxfp4", "mxfp4+w8a8"]
    written = (tmp_path / "models" / "loraq-mxfp4+w8a8" / "loraq.json").stat().st_mtime_ns
    again = main(study, [*SETTINGS, "--out", str(tmp_path), "--only", ROWS[1]])
    assert (tmp_path / "models" / "loraq-mxfp4+w8a8" / "loraq.json").stat().st_mtime_ns == written
    assert again[1].psnr_db == ours.psnr_db


def test_prompts_come_from_lines_or_from_a_seeded_share_of_a_table(tmp_path):
    from paper_study import _prompts

    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    assert _prompts(tmp_path / "p.txt", 2) == ["one", "two"]
    table = {f"k{i:02d}": {"prompt": f"prompt {i}"} for i in range(20)}
    (tmp_path / "meta_data.json").write_text(json.dumps(table))
    chosen = _prompts(tmp_path / "meta_data.json", 5)
    assert len(set(chosen)) == 5
    assert chosen == sorted(chosen, key=lambda prompt: int(prompt.split()[1]))
    assert chosen != [f"prompt {i}" for i in range(5)]
    assert len(_prompts(None, 11)) == 11
