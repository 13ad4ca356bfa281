"""Configurations that ask for too much: refused at once, before memory or minutes are spent."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small.pixart import small_pixart
from torch import nn

from loraq.errors import CheckpointError
from loraq.integrations.construction import MOST_PARAMETERS, bounded_construction
from loraq.integrations.diffusers import empty_model
from tests.patience import at_once


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads(small_pixart().to_json_string())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_layers": 10**7}, f"asks for more than {MOST_PARAMETERS} parameters"),
        ({"num_layers": 10**9}, "has the number 1000000000, and at most 16777216"),
        ({"attention_head_dim": 10**12}, "has the number 1000000000000"),
        ({"num_attention_heads": -(10**12)}, "has the number -1000000000000"),
        ({"sample_size": 10**5}, "asks for tables of more than 1 GiB"),
        ({"norm_eps": [1e-6] * 10**5}, "values, and at most 10000 are read"),
        ({"num_layers": "3"}, "TypeError"),
        ({"num_layers": None}, "TypeError"),
        ({"num_layers": {"a": [1]}}, "TypeError"),
        ({"_class_name": ["PixArtTransformer2DModel"]}, "does not have"),
        ({"_class_name": "loaders"}, "does not have"),
        ({"_class_name": "\x1b[2J"}, r"names the class '\\x1b\[2J'"),
    ],
    ids=str,
)
def test_a_configuration_that_asks_for_too_much(tmp_path, config, changes, match):
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with at_once(), pytest.raises(CheckpointError, match=match) as raised:
        empty_model(tmp_path)
    assert len(str(raised.value)) < 1000


def test_a_model_has_no_more_parameters_than_its_weights_can_be(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 10**7}))
    save_file({"a": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with at_once(), pytest.raises(CheckpointError, match="asks for more than 1004 parameters"):
        empty_model(tmp_path)


def test_memory_that_is_only_reserved_does_not_count():
    with bounded_construction(10):
        assert torch.empty(3 << 28).numel() == 3 << 28  # 3 GiB
        nn.Linear(2, 2)
    with bounded_construction(10), pytest.raises(CheckpointError, match="tables"):
        torch.zeros(3 << 28)
    with bounded_construction(10), pytest.raises(CheckpointError, match="tables"):
        torch.ones(20_000, 1) * torch.ones(20_000)
    torch.zeros(1)
    nn.ModuleList(nn.Linear(2, 2) for _ in range(10))  # afterwards nothing is counted
