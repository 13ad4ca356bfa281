"""A quantized model becomes a float one again, and counts its parameters as one."""

import copy

import pytest
import torch
from torch import nn

import loraq
from loraq.errors import LayerError
from loraq.layers import quantized_layers


def model() -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    return nn.Sequential(
        nn.Conv2d(32, 64, 1), nn.Flatten(2), nn.Linear(64, 64, bias=False), linear, linear
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float_layers_take_the_places_of_quantized_ones(dtype):
    made = model().to(dtype).eval()
    bias, kinds = made[3].bias, [type(layer) for layer in made]
    loraq.quantize_(made, "int8-a16", progress=False)
    x = torch.randn(2, 32, 8, 8, dtype=dtype)
    with torch.no_grad():
        before = made(x)
    weight = made[2].reconstruct()
    assert loraq.dequantize_(made) is made
    assert [type(layer) for layer in made] == kinds
    assert made[3] is made[4]
    assert made[3].bias is bias
    assert not made[2].training
    assert torch.equal(made[2].weight, weight.to(dtype))
    assert made[0].weight.shape == (64, 32, 1, 1)
    assert all(parameter.dtype == dtype for parameter in made.parameters())
    with torch.no_grad():
        assert (made(x) - before).norm() < 0.01 * before.norm()
    made(x).sum().backward()
    assert made[2].weight.grad is not None


def test_what_cannot_be_dequantized_is_named():
    made = model()
    with pytest.raises(LayerError, match="no quantized layer"):
        loraq.dequantize_(made)
    loraq.quantize_(made, "int8", progress=False)
    with pytest.raises(LayerError, match=r"itself.*`dequantize\(\)`"):
        loraq.dequantize_(made[2])
    made[2] = nn.ModuleDict({"base_layer": made[2]})
    with pytest.raises(LayerError, match=r"carry adapters, '2\.base_layer'"):
        loraq.dequantize_(made)
    assert len(quantized_layers(made)) == 3


diffusers = pytest.importorskip("diffusers")


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.SanaTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
    )


def test_a_model_of_diffusers_is_a_float_model_again(tmp_path):
    made = transformer()
    float_state, numbers = copy.deepcopy(made.state_dict()), made.num_parameters()
    loraq.quantize_(made, "int8", progress=False)
    assert made.num_parameters() == numbers
    assert copy.deepcopy(made).num_parameters() == numbers
    assert made.num_parameters(only_trainable=True) < numbers
    assert made.dequantize() is made
    assert made.num_parameters() == numbers
    assert list(made.state_dict()) == list(float_state)
    made.save_pretrained(tmp_path / "float")
    back = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "float")
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, made.state_dict()[name])
        assert torch.allclose(tensor, float_state[name], atol=0.05)


def test_a_loaded_model_forgets_that_it_was_quantized(tmp_path):
    import loraq.diffusers

    made = transformer()
    loraq.quantize_(made, "int8", progress=False)
    made.save_pretrained(tmp_path / "out")
    loaded = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "out")
    assert loaded.num_parameters() == made.num_parameters()
    assert loaded.dequantize() is loaded
    loaded.save_pretrained(tmp_path / "float")
    back = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "float")
    assert "quantization_config" not in back.config
    back.half()
    loraq.quantize_(loaded, "int8", progress=False)


def test_a_model_that_another_module_holds_is_a_float_model_again(tmp_path):
    held = transformer()
    holder = nn.ModuleDict({"net": held})
    loraq.quantize_(holder, "int8-a16", progress=False)
    assert held.is_quantized
    loraq.dequantize_(holder)
    assert not held.is_quantized
    assert not {"hf_quantizer", "get_memory_footprint", "save_pretrained"} & vars(held).keys()
    held.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in (tmp_path / "float" / "config.json").read_text()
