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
from loraq.rules import Rule

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
import loraq.diffusers  # noqa: E402
from loraq.integrations.adapters import (  # noqa: E402
    AdaptedConv1x1,
    AdaptedLinear,
    register_adapters,
)

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


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_adapters_start_as_on_the_float_model(init):
    made = []
    for model in (small_sana(), small_sana()):
        if made:
            loraq.quantize_(model, "mxint8", progress=False)
        torch.manual_seed(3)
        model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init))
        made.append({name: p for name, p in model.named_parameters() if ".lora_" in name})
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_initialisation_that_changes_the_weight_is_refused(init, dtype):
    quantized = small_sana(dtype)
    loraq.quantize_(quantized, "mxint8", progress=False)
    before = output(quantized)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init)
    with pytest.raises(LayerError, match=r"read-only.*PiSSA, OLoRA"):
        quantized.add_adapter(config)
    assert torch.equal(output(quantized), before)


def test_all_linear_means_the_quantized_ones_too():
    found = []
    for model in (small_sana(), small_sana()):
        if found:
            loraq.quantize_(model, "mxint8", progress=False)
        model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))
        found.append({name for name, _ in model.named_parameters() if ".lora_" in name})
    assert found[0] == found[1]
    assert any("attn1.to_q" in name for name in found[1])


@pytest.mark.parametrize("kind", ["LoKrConfig", "LoHaConfig", "IA3Config"])
def test_other_tuners_work_and_do_not_merge(kind):
    more = {"feedforward_modules": []} if kind == "IA3Config" else {"r": 4, "init_weights": False}
    outputs = []
    for model in (small_sana(), small_sana()):
        if outputs:
            loraq.quantize_(model, "mxint8", progress=False)
        torch.manual_seed(3)
        tuned = peft.get_peft_model(model, getattr(peft, kind)(target_modules=["to_q"], **more))
        outputs.append(output(tuned.base_model.model))
    assert (outputs[1] - outputs[0]).norm() < 0.03 * outputs[0].norm()
    with pytest.raises(LayerError, match="read-only"):
        tuned.merge_adapter()
    assert torch.equal(output(tuned.base_model.model), outputs[1])


def test_convolutions_take_adapters():
    targets = ["conv_inverted", "conv_point"]
    exact, quantized = small_sana(), small_sana()
    loraq.quantize_(quantized, "mxint8-a16", progress=False)
    changes = []
    for model in (exact, quantized):
        before = output(model)
        torch.manual_seed(3)
        model.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        changes.append(output(model) - before)
    assert isinstance(quantized.transformer_blocks[0].ff.conv_inverted, AdaptedConv1x1)
    assert changes[0].norm() > 0.1
    assert (changes[1] - changes[0]).norm() < 0.05 * changes[0].norm()
    with pytest.raises(LayerError, match="absorb_lora"):
        quantized.transformer_blocks[0].ff.conv_inverted.merge()
    quantized.delete_adapters("default")


@pytest.mark.parametrize("saved", ["to_v", "ff"])
def test_modules_to_save_are_trained_as_floats(saved, tmp_path):
    quantized = small_sana()
    loraq.quantize_(quantized, "mxint8-a16", progress=False)
    before = output(quantized)
    config = peft.LoraConfig(r=2, target_modules=["to_q"], modules_to_save=[saved])
    tuned = peft.get_peft_model(quantized, config)
    block = quantized.transformer_blocks[0]
    wrapper = block.attn1.to_v if saved == "to_v" else block.ff
    floats = [p for p in wrapper.modules_to_save.parameters() if p.dim() >= 2]
    assert floats
    assert all(p.is_floating_point() and p.requires_grad for p in floats)
    assert (output(quantized) - before).norm() < 1e-3 * before.norm()
    with torch.no_grad():
        floats[-1].mul_(3)
    trained = output(quantized)
    tuned.save_pretrained(tmp_path / "adapter")
    again = small_sana()
    loraq.quantize_(again, "mxint8-a16", progress=False)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").base_model.model
    assert (trained - before).norm() > 1e-3 * before.norm()
    assert torch.allclose(output(loaded), trained, atol=1e-6)


def flux() -> nn.Module:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def flux_output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(
            torch.linspace(-1, 1, 64 * 2).view(1, 4, 32)[..., : model.config.in_channels],
            encoder_hidden_states=torch.linspace(-1, 1, 192).view(1, 6, 32),
            pooled_projections=torch.linspace(-1, 1, 32)[None],
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(6, 3),
            return_dict=False,
        )[0]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("wide", [16, 32], ids=["", "control"])
@pytest.mark.parametrize("embedder", [False, True], ids=["", "all quantized"])
def test_the_loader_of_flux_finds_the_shapes_of_quantized_layers(wide, embedder):
    """A control LoRA has an x_embedder that is twice as wide, so that layer is replaced."""
    torch.manual_seed(2)
    names = {"x_embedder": (wide, 32), "single_transformer_blocks.0.proj_mlp": (32, 128)}
    names |= {f"transformer_blocks.0.attn.{name}": (32, 32) for name in ("to_q", "to_k", "to_v")}
    lora = {}
    for name, (n_in, n_out) in names.items():
        lora[f"transformer.{name}.lora_A.weight"] = 0.1 * torch.randn(4, n_in)
        lora[f"transformer.{name}.lora_B.weight"] = 0.1 * torch.randn(n_out, 4)
    outputs, quantized = [], flux()
    rules = (Rule("x_embedder", skip=False),) if embedder else ()
    loraq.quantize_(quantized, Recipe(Recipe.named("int8-a16").scheme, rules=rules), progress=False)
    assert isinstance(quantized.x_embedder, QuantizedLinear) is embedder
    before = flux_output(quantized)
    for model in (flux(), quantized):
        pipe = diffusers.FluxControlPipeline(
            diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model
        )
        pipe.load_lora_weights(dict(lora))
        pipe.load_lora_weights(dict(lora), adapter_name="second")
        outputs.append(flux_output(model))
    assert (outputs[1] - outputs[0]).norm() < 0.03 * outputs[0].norm()
    if wide == 16 or not embedder:  # a float layer is put back, which a quantized one is not
        pipe.unload_lora_weights(**({"reset_to_overwritten_params": True} if wide > 16 else {}))
        assert torch.equal(flux_output(quantized), before)


@pytest.mark.parametrize("recipe", ["int8-a16", "int8"])
def test_fused_projections_give_what_the_parts_gave(recipe):
    quantized = flux()
    loraq.quantize_(quantized, recipe, progress=False)
    before = flux_output(quantized)
    quantized.fuse_qkv_projections()
    assert (flux_output(quantized) - before).norm() < 0.02 * before.norm()


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
