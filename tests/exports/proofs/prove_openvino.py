"""`openvino`: whole models by OpenVINO, on a CPU."""

import numpy as np
import openvino
import pytest
import torch

import loraq
from tests.exports.models import MODELS, distance, exact_output, save_quantized
from tests.exports.proofs.cards import run_card
from tests.folders import files_of

#: Every kind of codes as a main weight, and as a branch.
CASES = [
    ("flux", "int4-a8+int8-r16"),
    ("flux", "int4-a8+int8-r15"),
    ("flux", "int4-a8+w8a16-r33"),
    ("flux", "mxfp4-a16+w8a8-r32"),
    ("flux", "nvfp4-a16+w6a6-r32"),
    ("flux", "int5-a16+w4a8-r32"),
    ("flux", "fp8_e4m3-a16+mxfp8_e5m2-r32"),
    ("pixart", "int4_b32-a16+w8a8-r16"),
    ("sana", "int4-a16+bf16-r16"),
    ("sana", "mxfp6_e3m2-a16+w8a8-r16"),
]


def export(source, target):
    return loraq.export(source, target, to="openvino", progress=False)


@pytest.mark.parametrize(("name", "recipe"), CASES, ids=str)
def test_a_whole_model_is_the_exact_weight_only_forward(tmp_path, monkeypatch, name, recipe):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    model = save_quantized(name, recipe, tmp_path / "quantized")
    report = export(tmp_path / "quantized", tmp_path / "a" / "out")
    assert report.counts["rounded"] == report.counts["dense"] == 0
    if (name, recipe) == CASES[0]:
        export(tmp_path / "quantized", tmp_path / "b" / "out")
        assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    tensors = {k: v for k, v in MODELS[name].inputs().items() if isinstance(v, torch.Tensor)}
    inputs = {key: tensor.numpy().astype(np.float32) for key, tensor in tensors.items()}
    wanted, without = exact_output(model, name), exact_output(model, name, branch=False)
    card = run_card(tmp_path / "a" / "out")
    fast = torch.tensor(card["model"](inputs)[0])
    assert fast.isfinite().all()
    assert distance(fast, wanted) > 1e-6  # it rounds, as the card says, and is not what is proved
    exact = openvino.Core().compile_model(tmp_path / "a/out/model.xml", "CPU", card["exact"])
    found = torch.tensor(exact(inputs)[0])
    assert distance(found, wanted) < 1e-6
    assert distance(without, found) > 1e-2
