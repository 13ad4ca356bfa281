"""`torchao`: whole models by diffusers' loader, torchao's tensors and PEFT."""

import pytest

import loraq
from tests.exports.models import distance, exact_output, output, save_quantized
from tests.exports.proofs.cards import run_card

MIXED = {"scheme": "nvfp4-a16+bf16-r16", "rules": [{"match": "*single*", "branch": {"rank": 8}}]}
#: diffusers has no way to put a LoRA beside a PixArt's layers, and PEFT has.
OTHER_RANKS = {
    "scheme": "nvfp4-a16+bf16-r16",
    "rules": [{"match": "*.1.attn1.to_q|*.attn2.to_out.0", "branch": {"rank": 8}}],
}


@pytest.mark.parametrize(
    ("name", "recipe"), [("flux", MIXED), ("sana", "nvfp4-a16+bf16-r16"), ("pixart", OTHER_RANKS)]
)
def test_a_whole_model_is_the_exact_weight_only_forward(tmp_path, monkeypatch, name, recipe):
    monkeypatch.chdir(tmp_path)
    model = save_quantized(name, recipe, tmp_path / "quantized")
    report = loraq.export(
        *(tmp_path / "quantized", tmp_path / "out"),
        **{"to": "torchao", "shard_bytes": 200_000, "progress": False},
        **({"allow_dense": True, "dtype": "float32"} if name == "sana" else {}),
    )
    n_dense = 2 if name == "sana" else 0  # its 1×1 convolutions
    assert report.counts == {"exact": len(report.layers) - n_dense, "rounded": 0, "dense": n_dense}
    assert len(list((tmp_path / "out").glob("diffusion*.safetensors"))) > 2
    loaded = run_card(tmp_path / "out")["model"]
    first = next(layer.name for layer in report.layers if layer.fate == "exact")
    assert type(loaded.get_submodule(first).weight).__name__ == "NVFP4Tensor"
    wanted = exact_output(model, name)
    assert distance(output(loaded, name), wanted) < 1e-6
    assert distance(exact_output(model, name, branch=False), wanted) > 1e-2
