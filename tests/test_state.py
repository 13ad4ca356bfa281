"""State dicts of quantized models hold packed bytes, and answer those who ask for a weight."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
from torch import nn

import loraq
from loraq.dense import DenseWeight
from loraq.errors import LayerError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(32, 64), nn.LayerNorm(64)
        self.second = nn.Linear(64, 32, bias=False)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"inner": Block(), "head": nn.Linear(32, 32)})


@pytest.fixture
def quantized() -> nn.Module:
    made = model()
    loraq.quantize_(made, "int8", progress=False)
    return made


def test_it_has_the_weights_that_it_does_not_list(quantized):
    state = quantized.state_dict()
    assert "inner.first.weight" not in list(state)
    assert set(state) == {name for name, _ in quantized.named_parameters()}
    assert state["inner.first.weight"].shape == (64, 32)
    assert torch.equal(state["inner.second.weight"], quantized["inner"].second.reconstruct())
    assert isinstance(state.get("head.weight"), DenseWeight)
    assert torch.equal(quantized["inner"].state_dict()["first.weight"], state["inner.first.weight"])
    for name in ("inner.norm.other", "inner.weight", "weight", "nowhere.weight", "inner.first.x"):
        assert state.get(name, 7) == 7
        with pytest.raises(KeyError):
            state[name]


def test_the_layers_of_a_loaded_model_answer_too(quantized, tmp_path):
    loraq.save(quantized, tmp_path / "out")
    loaded = model()
    loraq.load_into(loaded, tmp_path / "out")
    assert torch.equal(loaded.state_dict()["head.weight"], quantized["head"].reconstruct())


def test_a_copy_of_a_model_answers_for_itself(quantized):
    clone = copy.deepcopy(quantized)
    quantized["head"].bias.data.zero_()
    clone["head"].weight_packed.data.zero_()
    assert not clone.state_dict()["head.weight"].any()
    assert quantized.state_dict()["head.weight"].any()


def test_stored_and_copied_ones_are_ordinary(quantized):
    state = quantized.state_dict()
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    for plain in (loaded, copy.deepcopy(state), state.copy()):
        assert type(plain) is OrderedDict
        assert plain._metadata.keys() == state._metadata.keys()
        assert list(plain) == list(state)
        quantized.load_state_dict(plain)
    quantized.load_state_dict(state)
    quantized.load_state_dict(state, assign=True)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_float_module_never_keeps_its_own_weights_without_a_word(quantized, strict, assign):
    fresh = Block()
    with pytest.raises(LayerError, match=r"'first' in quantized form.*dequantize_"):
        fresh.load_state_dict(quantized["inner"].state_dict(), strict=strict, assign=assign)


def test_a_dequantized_one_hands_its_weights_on(quantized):
    first = quantized["inner"].first.reconstruct()
    loraq.dequantize_(quantized)
    fresh = Block()
    fresh.load_state_dict(quantized["inner"].state_dict())
    assert torch.equal(fresh.first.weight, first)
