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


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_found_in_quantized_and_in_kept_tensors(
    tmp_path, name, value
):
    write_model(tmp_path, name, value)
    source = Source.open(Checkpoint(tmp_path, {}), Recipe.named("mxfp4+w8a8-r4"))
    place = r"\(0, 5\)" if name == "0.weight" else r"\(5,\)"
    message = rf"Tensor '{name}' cannot be used: the value at {place} is {value}, .*not finite"
    with pytest.raises(CheckpointError, match=message):
        source.hash_weights()


def test_a_finite_source_has_a_hash_for_each_tensor(tmp_path):
    write_model(tmp_path, "0.weight", 3e38)
    source = Source.open(Checkpoint(tmp_path, {}), Recipe.named("mxfp4+w8a8-r4"))
    hashes = source.hash_weights()
    assert list(hashes) == list(source.names)
    assert all(
        digest == hashlib.sha256(source.reader.read(name).numpy().tobytes()).hexdigest()
        for name, digest in hashes.items()
    )
