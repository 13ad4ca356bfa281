"""`dense`: whole models by diffusers."""

import pytest

import loraq
from tests.exports.models import MODELS, distance, exact_output, output, save_quantized
from tests.exports.proofs.cards import run_card


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_is_the_exact_weight_only_forward(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    model = save_quantized(name, "mxfp4-a4+w8a8-r16-h32", tmp_path / "quantized")
    loraq.export(
        *(tmp_path / "quantized", tmp_path / "out"),
        **{"to": "dense", "dtype": "float32", "progress": False},
    )
    loaded = run_card(tmp_path / "out")["model"]
    found = output(loaded, name)
    assert distance(found, exact_output(model, name)) < 1e-6
    assert distance(exact_output(model, name, branch=False), found) > 1e-2
