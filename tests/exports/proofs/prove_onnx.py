"""`onnx`: whole models by ONNX Runtime and OpenVINO, as the card loads them."""

import numpy as np
import pytest
import torch

import loraq
from tests.exports.models import MODELS, distance, exact_output, save_quantized
from tests.exports.proofs.cards import run_card

CASES = [
    ("flux", "int4-a16+bf16-r16"),
    ("flux", "int4-a16+w8a8-r32"),
    ("flux", "mxint4-a16+w6a6-r32"),
    ("pixart", "int4_b32-a16+w8a8-r32"),
    ("sana", "int4-a16+bf16-r16"),
]


@pytest.mark.parametrize(("name", "recipe"), CASES, ids=str)
def test_a_whole_model_is_the_exact_weight_only_forward(tmp_path, monkeypatch, name, recipe):
    monkeypatch.chdir(tmp_path)
    model = save_quantized(name, recipe, tmp_path / "quantized")
    report = loraq.export(
        *(tmp_path / "quantized", tmp_path / "out"),
        **{"to": "onnx", "allow_dense": name == "sana", "progress": False},
    )
    assert report.counts["rounded"] == 0
    tensors = {k: v for k, v in MODELS[name].inputs().items() if isinstance(v, torch.Tensor)}
    inputs = {key: tensor.numpy().astype(np.float32) for key, tensor in tensors.items()}
    wanted, without = exact_output(model, name), exact_output(model, name, branch=False)
    card = run_card(tmp_path / "out")
    for found in (card["session"].run(None, inputs)[0], card["model"](inputs)[0]):
        assert distance(torch.tensor(found), wanted) < 1e-6
        assert distance(without, torch.tensor(found)) > 1e-2
