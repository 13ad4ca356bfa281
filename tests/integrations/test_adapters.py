"""LoRA adapters of PEFT and diffusers on quantized models do what they do on float models."""

import copy
from pathlib import Path

import pytest
import torch
from small.pixart import small_pixart, small_sana, velocity
from test_diffusers import quantize
from torch import nn

import loraq
from loraq.errors import CheckpointError, LayerError
from loraq.nn import QuantizedLinear
from loraq.recipe import Recipe

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
import loraq.diffusers  # noqa: E402
from loraq.integrations.adapters import AdaptedLinear, register_adapters  # noqa: E402

#: Quantized layers, and text-side projections that are kept in floats.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def output(model: nn.Module) -> torch.Tensor:
    dtype = model.dtype
    with torch.no_grad():
        return model(
            torch.linspace(-1, 1, 512).view(2, 4, 8, 8).to(dtype),
            encoder_hidden_states=torch.linspace(-1, 1, 96).view(2, 3, 16).to(dtype),
            timestep=torch.tensor([10.0, 500.0]),
            return_dict=False,
        )[0].float()


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """A LoRA with alpha / rank = 2, written by diffusers."""
    model = small_sana()
    torch.manual_seed(1)
    model.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    )
    folder = tmp_path_factory.mktemp("lora")
    model.save_lora_adapter(folder)
    return folder


def load_lora(model: nn.Module, folder: Path) -> None:
    model.load_lora_adapter(folder, prefix=None, use_safetensors=True)


def change(model: nn.Module, lora: Path) -> torch.Tensor:
    """What a LoRA does to the output of a model."""
    before = output(model)
    load_lora(model, lora)
    return output(model) - before


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 0.03), (torch.bfloat16, 0.1)], ids=str
)
def test_a_lora_changes_the_output_as_on_the_float_model(lora, dtype, bound):
    exact = change(small_sana(dtype), lora)
    quantized = small_sana(dtype)
    loraq.quantize_(quantized, "mxint8", progress=False)
    ours = change(quantized, lora)
    assert exact.norm() > 0.1
    assert (ours - exact).norm() < bound * exact.norm()


def test_at_four_bits_it_is_still_the_same_change(lora):
    exact = change(small_sana(), lora)
    quantized = small_sana()
    loraq.quantize_(quantized, Recipe.named("mxfp4+w8a8-r16"), progress=False)
    ours = change(quantized, lora)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), exact.flatten(), dim=0) > 0.9


def test_the_packed_weights_stay_and_come_back(lora, tmp_path):
    quantized = small_sana()
    loraq.quantize_(quantized, "mxint8", progress=False)
    before, state = output(quantized), copy.deepcopy(quantized.state_dict())
    load_lora(quantized, lora)
    layer = quantized.transformer_blocks[0].attn1.to_q
    assert isinstance(layer, AdaptedLinear)
    assert isinstance(layer.base_layer, QuantizedLinear)
    with pytest.raises(CheckpointError, match=r"carries adapters \(default_0\)"):
        quantized.save_pretrained(tmp_path / "out")
    with pytest.raises(LayerError, match="carries adapters"):
        loraq.absorb_lora(quantized, lora, _float_folder(tmp_path))
    quantized.unload_lora()
    assert isinstance(quantized.transformer_blocks[0].attn1.to_q, QuantizedLinear)
    assert torch.equal(output(quantized), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in quantized.state_dict().items())
    quantized.save_pretrained(tmp_path / "out")


def _float_folder(place: Path) -> Path:
    small_sana().save_pretrained(place / "float")
    return place / "float"


def test_absorbing_gives_what_loading_gives(lora, tmp_path):
    source = _float_folder(tmp_path)
    loaded, absorbed = (diffusers.SanaTransformer2DModel.from_pretrained(source) for _ in range(2))
    for model in (loaded, absorbed):
        loraq.quantize_(model, "mxint8", progress=False)
    before = output(absorbed)
    loraq.absorb_lora(absorbed, lora, source, progress=False)
    ours = change(loaded, lora)
    assert (output(absorbed) - before - ours).norm() < 0.05 * ours.norm()


def test_adapters_can_be_scaled_and_switched_off(lora):
    quantized = small_sana()
    loraq.quantize_(quantized, "mxint8", progress=False)
    before = output(quantized)
    load_lora(quantized, lora)
    quantized.disable_lora()
    assert torch.equal(output(quantized), before)
    quantized.enable_lora()
    full = output(quantized) - before
    quantized.set_adapters(["default_0"], weights=[1e-3])
    part = output(quantized) - before
    assert 0 < part.norm() < 0.01 * full.norm()


def test_adapters_can_be_trained(lora):
    quantized = small_sana()
    loraq.quantize_(quantized, "mxint8", progress=False)
    quantized.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    trainable = [name for name, p in quantized.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".lora_" in name for name in trainable)
    layer = quantized.transformer_blocks[0].attn1.to_q
    layer(torch.ones(1, 32)).sum().backward()
    assert layer.lora_B["default"].weight.grad.norm() > 0


def test_a_class_without_lora_methods_is_served_by_peft(tmp_path):
    small_pixart(torch.float32).save_pretrained(tmp_path / "float")
    quantize(tmp_path / "float", tmp_path / "out")
    quantized = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "out")
    before = velocity(quantized)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, quantized)
    assert (velocity(quantized) - before).norm() > 0.01


def test_what_wants_the_dense_weight_is_refused(lora):
    quantized = small_sana()
    loraq.quantize_(quantized, "mxint8", progress=False)
    with pytest.raises(LayerError, match="DoRA"):
        quantized.add_adapter(peft.LoraConfig(r=2, use_dora=True, target_modules=["to_q"]))
    other = small_sana()
    loraq.quantize_(other, "mxint8", progress=False)
    load_lora(other, lora)
    with pytest.raises(LayerError, match="absorb_lora"):
        other.transformer_blocks[0].attn1.to_q.merge()


def test_other_kinds_of_quantized_layers_are_refused():
    class Other(QuantizedLinear):
        """Computes something else with the same weights."""

    layer = Other(32, 8, Recipe.named("mxfp4").scheme)
    with pytest.raises(LayerError, match="not on Other"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), nn.Sequential(layer))


def test_a_peft_that_is_too_old_is_named():
    layer = QuantizedLinear(32, 8, Recipe.named("mxfp4").scheme)
    with pytest.raises(LayerError, match=rf"PEFT {peft.__version__} is too old"):
        AdaptedLinear(layer, "default", r=4, lora_alpha=4)  # as versions before 0.21 call it


def test_registering_again_changes_nothing():
    before = peft.tuners.lora.LoraModel._create_new_module
    register_adapters()
    assert peft.tuners.lora.LoraModel._create_new_module is before
