"""Folders of transformers: an embedding is never taken for a linear layer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraq.checkpoint import load_into
from loraq.errors import CheckpointError
from loraq.integrations.checkpoints import plan_checkpoint, quantize_checkpoint
from loraq.layers import linear_layers, quantized_layers

transformers = pytest.importorskip("transformers")


def t5(folder: Path) -> torch.nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4
    )
    model = transformers.T5EncoderModel(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("with_config", [True, False])
def test_the_tables_of_a_text_encoder_stay(tmp_path, with_config):
    model = t5(tmp_path / "te")
    if not with_config:
        (tmp_path / "te" / "config.json").unlink()
    plan = plan_checkpoint(tmp_path / "te", "int4-a16")
    assert sorted(layer.name for layer in plan.layers) == sorted(linear_layers(model))
    report = quantize_checkpoint(tmp_path / "te", tmp_path / "q", "int4-a16", progress=False)
    assert len(report.layers) == len(linear_layers(model)) == 12
    fresh = transformers.T5EncoderModel(model.config)
    load_into(fresh, tmp_path / "q")
    assert fresh.shared.weight is fresh.encoder.embed_tokens.weight
    assert torch.equal(fresh.shared.weight, model.shared.weight)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(fresh.get_parameter(bias), model.get_parameter(bias))
    assert quantized_layers(fresh).keys() == linear_layers(model).keys()


def test_positions_and_tokens_of_a_model_without_a_name(tmp_path):
    names = ["wte", "wpe", "h.0.attn.proj", "text.token_embedding", "shared", "shared_proj"]
    save_file({f"{n}.weight": torch.ones(32, 32) for n in names}, tmp_path / "m.safetensors")
    plan = plan_checkpoint(tmp_path / "m.safetensors", "int4-a16")
    assert [layer.name for layer in plan.layers] == ["h.0.attn.proj", "shared_proj"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architectures": ["Nothing"]}, "names the class 'Nothing', which transformers"),
        ({"architectures": ["T5Config"]}, "names the class 'T5Config'"),
        ({"model_type": "nothing"}, "T5EncoderModel refuses"),
        ({"num_layers": 10**9}, "T5EncoderModel refuses .* it has the number 1000000000"),
        (
            {"num_layers": 10**6},
            r"T5EncoderModel refuses .* than \d+ parameters, and the weights have fewer",
        ),
    ],
)
def test_a_configuration_that_builds_nothing(tmp_path, change, match):
    t5(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=match):
        plan_checkpoint(tmp_path, "int4-a16")
