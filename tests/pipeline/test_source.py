"""What a source refuses before any layer is solved."""

import hashlib

import pytest
import torch
from torch import nn

from loraq.errors import CheckpointError
from loraq.pipeline.source import Checkpoint, Source
from loraq.recipe import Recipe
from loraq.safetensors.layout import write_shards


def write_model(folder, name: str, value: float) -> None:
    torch.manual_seed(0)
    state = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32)).state_dict()
    state[name].view(-1)[5] = value
    write_shards(state, folder, "model")


def open_source(folder) -> Source:
    return Source.open(Checkpoint(folder, {}), Recipe.named("mxfp4+w8a8-r4"))


each_value = pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])


@each_value
def test_a_number_that_is_not_finite_is_refused_in_what_is_quantized(tmp_path, value):
    write_model(tmp_path, "0.weight", value)
    message = rf"Tensor '0\.weight' cannot be used: the value at \(0, 5\) is {value}, .*not finite"
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path).hash_weights()


@each_value
@pytest.mark.parametrize("name", ["0.bias", "1.weight"])
def test_it_is_copied_and_told_in_what_stays(tmp_path, caplog, name, value):
    write_model(tmp_path, name, value)
    source = open_source(tmp_path)
    assert set(source.hash_weights()) == set(source.names)
    (message,) = caplog.messages
    assert (
        f"holds NaN or infinity, which is copied: '{name}' (the value at (5,) is {value}" in message
    )


def test_a_finite_source_has_a_hash_for_each_tensor(tmp_path, caplog):
    write_model(tmp_path, "0.weight", 3e38)
    source = open_source(tmp_path)
    hashes = source.hash_weights()
    assert list(hashes) == list(source.names)
    assert not caplog.messages
    assert all(
        digest == hashlib.sha256(source.reader.read(name).numpy().tobytes()).hexdigest()
        for name, digest in hashes.items()
    )
