"""Reading a LoRA: every way that its names and its scale are written, and everything that is no plain LoRA."""

import json

import pytest
import torch
from safetensors.torch import save_file

from loraq.errors import CheckpointError
from loraq.integrations.lora import Lora

A, B = torch.ones(2, 6), torch.full((4, 2), 3.0)


def write(path, tensors, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata)
    return path


def plain(prefix: str = "transformer.", layer: str = "blocks.0.to_q") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{layer}.lora_A.weight": A.clone(),
        f"{prefix}{layer}.lora_B.weight": B.clone(),
    }


@pytest.mark.parametrize(
    "prefix", ["", "transformer.", "base_model.model.", "diffusion_model.", "unet."]
)
@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A", "lora_B"),
        ("lora_A.default", "lora_B.default"),
        ("lora.down", "lora.up"),
        ("lora_down", "lora_up"),
    ],
)
def test_names_of_diffusers_peft_and_older_tools(tmp_path, prefix, down, up):
    layer = f"{prefix}blocks.0.to_out.0"
    file = write(
        tmp_path / "x.safetensors", {f"{layer}.{down}.weight": A, f"{layer}.{up}.weight": B}
    )
    lora = Lora.read(file)
    assert list(lora.adapters) == ["blocks.0.to_out.0"]
    assert torch.equal(lora.adapters["blocks.0.to_out.0"].delta(), B @ A)


def test_the_scale_is_alpha_over_rank_wherever_it_is_written(tmp_path):
    key = "blocks.0.to_q"
    beside = write(tmp_path / "a" / "adapter_model.safetensors", plain("base_model.model."))
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    header = write(
        tmp_path / "b" / "pytorch_lora_weights.safetensors",
        plain(),
        {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 8})},
    )
    tensor = write(
        tmp_path / "c.safetensors", {**plain(), f"transformer.{key}.alpha": torch.tensor(8.0)}
    )
    for path in (beside, beside.parent, header, header.parent, tensor):
        assert Lora.read(path).adapters[key].scale == 4


def test_patterns_and_rank_stabilized_scales(tmp_path):
    file = write(
        tmp_path / "adapter_model.safetensors", {**plain("", "a.to_q"), **plain("", "a.to_k")}
    )
    options = {"lora_alpha": 2, "alpha_pattern": {"to_k": 6, "^nothing.to_q": 50}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    assert {name: adapter.scale for name, adapter in Lora.read(file).adapters.items()} == {
        "a.to_q": 1,
        "a.to_k": 3,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(options | {"use_rslora": True}))
    assert Lora.read(file).adapters["a.to_k"].scale == pytest.approx(6 / 2**0.5)


def test_other_components_are_named_and_left_out(tmp_path):
    lora = Lora.read(write(tmp_path / "x.safetensors", {**plain(), **plain("text_encoder_2.")}))
    assert lora.others == ("text_encoder_2",)
    assert list(lora.adapters) == ["blocks.0.to_q"]


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (
            {**plain(), "transformer.blocks.0.to_q.lora_magnitude_vector": A},
            "lora_magnitude_vector",
        ),
        ({"transformer.blocks.0.to_q.lokr_w1": A}, "no plain LoRA"),
        ({"lora_unet_blocks_0_to_q.diff": A}, "no plain LoRA"),
        ({"transformer.blocks.0.to_q.lora_A.weight": A}, "has only down"),
        ({**plain(), "transformer.blocks.0.to_q.lora_B.weight": torch.ones(4, 3)}, r"\(4, 3\)"),
        (plain("text_encoder."), "has no LoRA for a transformer"),
    ],
)
def test_what_is_no_plain_lora_is_named(tmp_path, tensors, match):
    with pytest.raises(CheckpointError, match=match):
        Lora.read(write(tmp_path / "x.safetensors", tensors))


def test_dora_by_its_configuration(tmp_path):
    write(tmp_path / "adapter_model.safetensors", plain())
    (tmp_path / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(CheckpointError, match="DoRA"):
        Lora.read(tmp_path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"0 \.safetensors files"):
        Lora.read(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="truncated or no safetensors"):
        Lora.read(tmp_path)
    write(tmp_path / "y.safetensors", plain())
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files"):
        Lora.read(tmp_path)
    damaged = write(tmp_path / "b" / "y.safetensors", plain(), {"lora_adapter_metadata": "{"})
    with pytest.raises(CheckpointError, match="header"):
        Lora.read(damaged)
