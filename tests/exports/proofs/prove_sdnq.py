"""`sdnq`: whole models by diffusers' loader and sdnq's own arithmetic."""

import pytest
import sdnq  # noqa: F401 (without it diffusers refuses, and this must not be skipped)
import torch
from safetensors.torch import save_file

import loraq
from tests.exports.models import distance, exact_output, output, save_quantized
from tests.exports.proofs.cards import run_card

MIXED = {"scheme": "int4-a16+bf16-r16", "rules": [{"match": "*single*", "branch": {"rank": 8}}]}
CASES = [
    ("flux", MIXED),
    ("flux", "mxfp4-a16+w8a8-r16"),
    ("flux", "nvfp4-a16+bf16-r16"),
    ("flux", "mxint4-a16+w6a6-r32"),
    ("flux", "int4_b32-a16"),
    ("sana", "int4-a16+bf16-r16"),
    ("pixart", "int4-a16+w6a6-r32"),
    ("pixart", "mxfp4-a16+w8a8-r32"),
]


@pytest.mark.parametrize(("name", "recipe"), CASES, ids=str)
def test_a_whole_model_is_the_exact_weight_only_forward(tmp_path, monkeypatch, name, recipe):
    monkeypatch.chdir(tmp_path)
    model = save_quantized(name, recipe, tmp_path / "quantized")
    report = loraq.export(tmp_path / "quantized", tmp_path / "out", to="sdnq", progress=False)
    assert report.counts["dense"] == report.counts["rounded"] == 0
    loaded = run_card(tmp_path / "out")["model"]
    layer = loaded.get_submodule(report.layers[0].name)
    assert "SDNQ" in type(layer).__name__
    found, wanted = output(loaded, name), exact_output(model, name)
    assert distance(found, wanted) < 1e-6
    if "+" in str(recipe):
        assert distance(exact_output(model, name, branch=False), found) > 1e-2


def test_a_lora_on_top_leaves_the_branch_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save_quantized("flux", MIXED, tmp_path / "quantized")
    loraq.export(tmp_path / "quantized", tmp_path / "out", to="sdnq", progress=False)
    loaded = run_card(tmp_path / "out")["model"]
    name = "transformer.transformer_blocks.0.attn.to_q.lora"
    zeros = {f"{name}_A.weight": torch.zeros(4, 128), f"{name}_B.weight": torch.zeros(128, 4)}
    save_file(zeros, tmp_path / "style.safetensors", {"format": "pt"})
    loaded.load_lora_adapter(str(tmp_path / "style.safetensors"), prefix="transformer")
    assert distance(output(loaded, "flux"), exact_output(model, "flux")) < 1e-6
