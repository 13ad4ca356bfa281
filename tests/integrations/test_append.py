"""`append_lora`, `remove_lora`: a LoRA on the branches, in memory and in folders, and off again."""

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from small.models import small_model
from small.pixart import small_pixart, small_sana, velocity
from test_diffusers import OTHERS, quantize
from torch import nn

import loraq
from loraq.checkpoint.inspect import read_checked
from loraq.checkpoint.manifest import Manifest
from loraq.cli import main
from loraq.errors import CheckpointError, LayerError, LoraqError
from loraq.integrations.lora import Lora
from loraq.layers import quantized_layers
from loraq.nn import QuantizedConv1x1, QuantizedLinear
from loraq.packed import PackedWeight
from tests.folders import files_of

pytest.importorskip("diffusers")

#: Two quantized layers, and one that is kept in floats.
TOUCHED = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2")
KEPT = "transformer_blocks.1.attn2.to_k"


def write_lora(model: nn.Module, names: tuple[str, ...], file: Path, rank: int = 4) -> Path:
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for name in names:
        n_out, n_in = model.get_submodule(name).weight.shape[:2]
        tensors[f"transformer.{name}.lora_A.weight"] = (
            torch.randn(rank, n_in, generator=generator) / n_in**0.5
        )
        tensors[f"transformer.{name}.lora_B.weight"] = (
            torch.randn(n_out, rank, generator=generator) / 4
        )
    save_file(tensors, file)
    return file


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_pixart()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("quantized")
    model.save_pretrained(place / "float")
    quantize(place / "float", place / "transformer")
    return place / "transformer"


@pytest.fixture(scope="module")
def lora(model, tmp_path_factory) -> Path:
    return write_lora(
        model, (*TOUCHED, KEPT), tmp_path_factory.mktemp("lora") / "style.safetensors"
    )


@pytest.fixture(scope="module")
def second(model, tmp_path_factory) -> Path:
    return write_lora(model, TOUCHED, tmp_path_factory.mktemp("lora") / "detail.safetensors", 11)


def fused(model: nn.Module, lora: Path, scale: float = 1.0) -> nn.Module:
    """The float model with W + ΔW, rounded nowhere."""
    model = copy.deepcopy(model)
    for name, adapter in Lora.read(lora).adapters.items():
        layer = model.get_submodule(name)
        delta = adapter.delta().view(layer.weight.shape)
        layer.weight = nn.Parameter(layer.weight.detach().float() + scale * delta)
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert all(found[name].dtype == state[name].dtype for name in state)


def test_it_does_what_the_lora_does_to_the_float_model(lora):
    model = small_pixart(torch.float32)
    quantized = copy.deepcopy(model)
    loraq.quantize_(quantized, "mxint8", keep="float", progress=False)
    before, exact = velocity(quantized), velocity(fused(model, lora, 0.7)) - velocity(model)
    with pytest.raises(LayerError, match=f"'{KEPT}' is kept in floats of torch.float32"):
        loraq.append_lora(quantized, lora, 0.7, progress=False)
    kept = quantized.get_submodule(KEPT)
    kept.weight = nn.Parameter(kept.weight.detach().bfloat16().float())
    loraq.append_lora(quantized, lora, 0.7, progress=False)
    assert (velocity(quantized) - before - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize(
    ("recipe", "bound"),
    [
        ("mxfp4-a16+bf16-r8", 0.01),
        ("mxfp4-a16+w8a8-r8", 0.02),
        ("mxfp4-a16+w6a8-r8", 0.08),
        ("mxfp4-a16+w4a8-r8", 0.3),
        ("int4-a16+int8-r8", 0.03),
        ("mxfp4-a16", 0.02),
        ("mxfp4+w8a8-r8-h32", 0.25),
    ],
)
def test_every_layer_adds_the_product_to_its_output(lora, recipe, bound):
    """Whatever its branch is stored in, and behind a rotation, where activations have 4 bits."""
    quantized = small_pixart()
    loraq.quantize_(quantized, replace(loraq.Recipe.named(recipe), effort="fast"), progress=False)
    old = copy.deepcopy(quantized)
    appended = loraq.append_lora(quantized, lora, progress=False)
    assert {factors.layer for factors in appended.factors} == {*TOUCHED, KEPT}
    for name, adapter in Lora.read(lora).adapters.items():
        before, after = old.get_submodule(name).float(), quantized.get_submodule(name).float()
        x = torch.randn(50, adapter.down.shape[1], generator=torch.Generator().manual_seed(2))
        exact = x @ adapter.delta().T
        with torch.no_grad():
            assert (after(x) - before(x) - exact).norm() < bound * exact.norm()
        if isinstance(before, QuantizedLinear):
            assert torch.equal(before.weight_packed, after.weight_packed)
            assert after.scheme.rotation == before.scheme.rotation


def test_memory_and_files_give_the_same_bytes(folder, lora, second, tmp_path):
    quantized = loraq.load(folder)
    reported = loraq.append_lora(quantized, lora, 0.5, progress=False)
    loraq.append_lora(quantized, second, name="more", progress=False)
    loraq.save(quantized, tmp_path / "memory")
    on_files = loraq.append_lora(folder, lora, 0.5, target=tmp_path / "one", progress=False)
    assert reported == on_files
    assert on_files.kept == (KEPT,)
    loraq.append_lora(
        tmp_path / "one", second, name="more", target=tmp_path / "two", progress=False
    )
    assert files_of(tmp_path / "memory") == files_of(tmp_path / "two")
    name = "diffusion_pytorch_model.safetensors"
    grown = (tmp_path / "one" / name).stat().st_size - (folder / name).stat().st_size
    assert abs(grown - on_files.nbytes) < 4096  # but for the header
    loaded = loraq.load(tmp_path / "two")
    assert torch.equal(velocity(loaded), velocity(quantized))
    loraq.remove_lora(quantized, "style", progress=False)
    loraq.save(quantized, tmp_path / "left")
    loraq.remove_lora(tmp_path / "two", "style", target=tmp_path / "left too", progress=False)
    assert files_of(tmp_path / "left") == files_of(tmp_path / "left too")


def test_with_the_last_one_gone_every_byte_is_as_before(folder, lora, second, tmp_path):
    quantized = loraq.load(folder)
    state, record = state_of(quantized), quantized.get_submodule(TOUCHED[0]).record
    for order in (("style", "detail"), ("detail", "style")):
        loraq.append_lora(quantized, lora, progress=False)
        loraq.append_lora(quantized, second, -2.0, progress=False)
        assert isinstance(quantized.get_submodule(KEPT), QuantizedLinear)
        for name in order:
            loraq.remove_lora(quantized, name, progress=False)
        assert type(quantized.get_submodule(KEPT)) is nn.Linear
        assert_state(quantized, state)
        assert quantized.get_submodule(TOUCHED[0]).record == record
    loraq.save(quantized, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(folder)
    loraq.append_lora(folder, lora, target=tmp_path / "with", progress=False)
    layers = loraq.remove_lora(tmp_path / "with", "style", target=tmp_path / "gone", progress=False)
    assert set(layers) == {*TOUCHED, KEPT}
    assert files_of(tmp_path / "gone") == files_of(folder)


def test_other_layers_and_all_old_codes_keep_their_bytes(folder, lora, tmp_path):
    loraq.append_lora(folder, lora, target=tmp_path / "out", progress=False)
    before, after = (
        load_file(place / "diffusion_pytorch_model.safetensors")
        for place in (folder, tmp_path / "out")
    )
    for name, tensor in before.items():
        if name == f"{KEPT}.weight":
            packed = after[f"{KEPT}.weight_packed"]
            assert torch.equal(packed.view(torch.bfloat16), tensor)
        elif name.endswith(("proj_up_packed", "proj_up_scale")):
            assert torch.equal(after[name][:, : tensor.shape[1]], tensor)
        elif name.endswith(("proj_down_packed", "proj_down_scale")):
            assert torch.equal(after[name][: tensor.shape[0]], tensor)
        else:
            assert torch.equal(after[name], tensor)


def test_the_manifest_and_inspect_say_what_was_appended(folder, lora, second, tmp_path):
    arguments = ["append-lora", folder, f"{lora}:0.5", second, tmp_path / "out", "--name", "look"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:3]] == [
        ["look", "3"],
        ["detail", "2"],
    ]
    manifest = read_checked(tmp_path / "out")
    stack = manifest.layers[TOUCHED[0]].stack
    assert [(part.name, part.scale, part.start, part.rank) for part in stack.loras] == [
        ("look", 0.5, 32, 4),
        ("detail", 1.0, 64, 11),
    ]
    assert stack.rank == 8
    assert manifest.layers[TOUCHED[0]].scheme.branch.rank == 80
    assert manifest.layers[KEPT].record["appended"]["kept"] == "BF16"
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "out")]).stdout
    assert "LoRA 'look' at scale 0.5 is appended to 3 layers" in shown
    assert "LoRA 'detail' at scale 1 is appended to 2 layers" in shown
    found = json.loads(
        CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--json"]).stdout
    )
    assert len(found["layers"][TOUCHED[0]]["appended"]["loras"]) == 2
    removed = ["remove-lora", tmp_path / "out", "look", tmp_path / "left"]
    result = CliRunner().invoke(main, [*map(str, removed), "--json"])
    assert set(json.loads(result.stdout)["layers"]) == {*TOUCHED, KEPT}
    loraq.append_lora(folder, second, target=tmp_path / "alone", progress=False)
    assert files_of(tmp_path / "left") == files_of(tmp_path / "alone")


def test_a_pipeline_keeps_its_other_components(folder, lora, tmp_path):
    for other, content in OTHERS.items():
        (tmp_path / "pipe" / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pipe" / other).write_bytes(content)
    shutil.copytree(folder, tmp_path / "pipe" / "transformer")
    loraq.append_lora(tmp_path / "pipe", lora, target=tmp_path / "out", progress=False)
    written = files_of(tmp_path / "out")
    assert {name: written[name] for name in OTHERS} == OTHERS
    assert set(Manifest.read(tmp_path / "out" / "transformer").components) == set(OTHERS)
    loraq.remove_lora(tmp_path / "out", "style", target=tmp_path / "back", progress=False)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (tmp_path / "pipe" / weights).read_bytes()


def test_convolutions_of_one_pixel_and_their_kept_ones(tmp_path):
    model = small_sana(torch.bfloat16)
    quantized = copy.deepcopy(model)
    recipe = replace(loraq.Recipe.named("mxfp4-a16+w8a8-r8"), method="lqer")
    loraq.quantize_(quantized, recipe, progress=False)
    convolutions = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    ]
    assert any(isinstance(quantized.get_submodule(name), QuantizedConv1x1) for name in convolutions)
    lora = write_lora(model, tuple(convolutions), tmp_path / "pixels.safetensors")
    state, old = state_of(quantized), copy.deepcopy(quantized)
    loraq.append_lora(quantized, lora, progress=False)
    for name, adapter in Lora.read(lora).adapters.items():
        layer = quantized.get_submodule(name)
        assert isinstance(layer, QuantizedConv1x1)
        delta = (layer.weight.float() - old.get_submodule(name).weight.float()).flatten(1)
        assert (delta - adapter.delta()).norm() < 0.03 * adapter.delta().norm()
    loraq.remove_lora(quantized, "pixels", progress=False)
    assert_state(quantized, state)


def test_every_layer_of_the_default_recipe_those_kept_in_eight_bits_too(model, tmp_path):
    quantized = copy.deepcopy(model)
    recipe = loraq.Recipe(loraq.Recipe.named("default").scheme, method="svdquant")
    loraq.quantize_(quantized, recipe, progress=False)
    layers = {name: layer.record.get("kept") for name, layer in quantized_layers(quantized).items()}
    assert any(layers.values())
    assert not all(layers.values())
    lora = write_lora(model, tuple(layers), tmp_path / "all.safetensors")
    state, old = state_of(quantized), copy.deepcopy(quantized)
    loraq.append_lora(quantized, lora, progress=False)
    for name, adapter in Lora.read(lora).adapters.items():
        now, before = (each.get_submodule(name) for each in (quantized, old))
        delta = now.reconstruct() - before.reconstruct()
        assert (delta - adapter.delta()).norm() < 0.03 * adapter.delta().norm(), name
    loraq.save(quantized, tmp_path / "out")
    assert_state(loraq.load(tmp_path / "out"), state_of(quantized))
    loraq.remove_lora(quantized, "all", progress=False)
    assert_state(quantized, state)


def test_a_joined_layer_of_another_trainer_reaches_all_three(tmp_path):
    model = small_model(pytest.importorskip("diffusers").FluxTransformer2DModel)
    quantized = copy.deepcopy(model)
    loraq.quantize_(quantized, "mxint8", progress=False)
    n_out, n_in = model.transformer_blocks[0].attn.to_q.weight.shape
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(3 * n_out, 4, generator=generator)
    down = torch.randn(4, n_in, generator=generator)
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
    tensors |= {f"{stem}.alpha": torch.tensor(2.0)}
    tensors |= {f"{text}.lora_up.weight": up[:8].clone(), f"{text}.lora_down.weight": down.clone()}
    save_file(tensors, tmp_path / "x.safetensors")
    attention = quantized.transformer_blocks[0].attn
    before = [attention.get_submodule(f"to_{part}").weight.float() for part in "qkv"]
    appended = loraq.append_lora(quantized, tmp_path / "x.safetensors", progress=False)
    assert appended.others == ("lora_te1",)
    after = [attention.get_submodule(f"to_{part}").weight.float() for part in "qkv"]
    exact = 0.5 * up @ down
    assert (torch.cat(after) - torch.cat(before) - exact).norm() < 0.02 * exact.norm()


def test_state_and_back_ends_follow_and_adapters_go_on_top(folder, lora):
    peft = pytest.importorskip("peft")
    import loraq.diffusers

    quantized = loraq.load(folder, backend="reference")
    alone = velocity(quantized)
    loraq.append_lora(quantized, lora, progress=False)
    layer = quantized.get_submodule(TOUCHED[0])
    assert layer.backend == "reference"
    exact = velocity(quantized)
    assert not torch.equal(exact, alone)
    for name in ("resident", "low_memory"):
        loraq.set_backend(quantized, name)
        assert (velocity(quantized) - exact).norm() < 0.03 * exact.norm()
    compiled = torch.compile(quantized.get_submodule(TOUCHED[0]), backend="eager", fullgraph=True)
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    assert torch.equal(compiled(x), layer(x))
    peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False), quantized
    )
    assert not torch.equal(velocity(quantized), exact)
    with pytest.raises(LayerError, match="carries adapters"):
        loraq.remove_lora(quantized, "style", progress=False)
    plain = loraq.load(folder)
    loraq.append_lora(plain, lora, progress=False)
    weights = {name: plain.get_submodule(name).weight.clone() for name in (*TOUCHED, KEPT)}
    loraq.dequantize_(plain)
    assert all(torch.equal(plain.get_submodule(n).weight, w) for n, w in weights.items())
    assert type(plain.get_submodule(KEPT)) is nn.Linear


def test_the_precision_of_activations_stays_and_a_kept_layer_is_never_rounded(folder, lora):
    quantized = loraq.load(folder)
    loraq.set_activations(quantized, "a8", simulate=True)
    loraq.append_lora(quantized, lora, progress=False)
    layer, kept = (quantized.get_submodule(name) for name in (TOUCHED[0], KEPT))
    assert (layer.activations, layer.simulate) == ("a8", True)
    loraq.set_activations(quantized, "a8", simulate=True)
    x = torch.randn(9, kept.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        exact = torch.nn.functional.linear(x.float(), kept.reconstruct(), kept.bias.float())
        assert (kept(x).float() - exact).norm() < 0.005 * exact.norm()


def test_from_pretrained_and_save_pretrained_know_it(folder, lora, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    import loraq.diffusers

    loraq.append_lora(folder, lora, target=tmp_path / "out", progress=False)
    loaded = diffusers.PixArtTransformer2DModel.from_pretrained(
        tmp_path / "out", torch_dtype=torch.bfloat16
    )
    assert_state(loaded, state_of(loraq.load(tmp_path / "out")))
    with torch.no_grad():
        assert velocity(loaded).isfinite().all()
    loaded.save_pretrained(tmp_path / "again")
    loraq.remove_lora(tmp_path / "again", "style", target=tmp_path / "back", progress=False)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


def test_absorbing_after_appending_is_refused(folder, lora, second):
    quantized = loraq.load(folder)
    loraq.append_lora(quantized, second, progress=False)
    with pytest.raises(LayerError, match="Remove them first"):
        loraq.absorb_lora(quantized, lora, folder.parent / "float", progress=False)


def _bad(name: str, shape: tuple[int, int], value: float = 1.0) -> dict[str, torch.Tensor]:
    n_out, n_in = shape
    return {
        f"transformer.{name}.lora_A.weight": torch.full((2, n_in), value),
        f"transformer.{name}.lora_B.weight": torch.ones(n_out, 2),
    }


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (_bad("nowhere.to_q", (32, 32)), "1 layers that PixArt.* nowhere.to_q"),
        (_bad(TOUCHED[0], (32, 31)), r"Layer '.*to_q' has the shape \(32, 32\)"),
        (_bad(TOUCHED[0], (32, 32), math.nan), "NaN or infinity"),
        (_bad("pos_embed.proj", (32, 1)), "touches 'pos_embed.proj', a Conv2d"),
        (
            _bad(TOUCHED[0], (32, 32)) | {f"{TOUCHED[0]}.dora_scale": torch.ones(32)},
            "not of a plain LoRA",
        ),
        (_bad(TOUCHED[0], (32, 32)) | _bad(TOUCHED[1], (32, 9)), "has the shape"),
    ],
)
def test_what_does_not_fit_changes_nothing(folder, tmp_path, tensors, match):
    save_file(tensors, tmp_path / "x.safetensors")
    quantized = loraq.load(folder)
    state, modules = state_of(quantized), [id(module) for module in quantized.modules()]
    with pytest.raises(LoraqError, match=match):
        loraq.append_lora(quantized, tmp_path / "x.safetensors", progress=False)
    assert_state(quantized, state)
    assert [id(module) for module in quantized.modules()] == modules
    with pytest.raises(LoraqError, match=match):
        loraq.append_lora(
            folder, tmp_path / "x.safetensors", target=tmp_path / "out", progress=False
        )
    assert not (tmp_path / "out").exists()


def test_what_is_asked_wrongly(model, folder, lora, tmp_path):
    quantized = loraq.load(folder)
    loraq.append_lora(quantized, lora, progress=False)
    state = state_of(quantized)
    for call, match in (
        (lambda: loraq.append_lora(quantized, lora, progress=False), "a LoRA 'style' on the model"),
        (lambda: loraq.append_lora(quantized, lora, math.nan, name="b"), "scale of .* is nan"),
        (lambda: loraq.append_lora(quantized, lora, "1", name="b"), "scale of .* is '1'"),
        (lambda: loraq.append_lora(quantized, lora, 1e38, name="b"), "beyond fp32"),
        (lambda: loraq.append_lora(quantized, lora, name=" "), "cannot be called ' '"),
        (lambda: loraq.append_lora(quantized, lora, name="a\nb"), "cannot be called"),
        (lambda: loraq.append_lora(quantized, lora, name="b", target=tmp_path), "in place"),
        (lambda: loraq.append_lora(folder, lora), "Give the new folder as `target`"),
        (lambda: loraq.append_lora(copy.deepcopy(model), lora), "no quantized layer"),
        (
            lambda: loraq.append_lora(folder.parent / "float", lora, target=tmp_path / "o"),
            "not a lo",
        ),
        (lambda: loraq.append_lora(folder, lora, target=folder), "Source and target are both"),
        (lambda: loraq.append_lora(quantized, tmp_path, name="b"), "is not a LoRA"),
        (lambda: loraq.append_lora(object(), lora), "Cannot change a object"),
        (lambda: loraq.remove_lora(quantized, "none"), "No LoRA 'none' .* There are: style"),
        (lambda: loraq.remove_lora(loraq.load(folder), "style"), "There is none at all"),
    ):
        with pytest.raises(LoraqError, match=match):
            call()
        assert_state(quantized, state)


@pytest.mark.parametrize("failure", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_a_failure_in_any_layer_leaves_all_as_it_was(folder, lora, tmp_path, monkeypatch, failure):
    quantized = loraq.load(folder)
    state, put, calls = state_of(quantized), loraq.integrations.append.append, []

    def fail(*given: object) -> tuple[PackedWeight, object, float]:
        calls.append(1)
        if len(calls) == 3:
            raise failure
        return put(*given)

    monkeypatch.setattr("loraq.integrations.append.append", fail)
    for model, target in ((quantized, None), (folder, tmp_path / "out")):
        calls.clear()
        with pytest.raises((LayerError, KeyboardInterrupt)):
            loraq.append_lora(model, lora, target=target, progress=False)
    assert_state(quantized, state)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_contradicts_its_tensors_is_refused(folder, lora, tmp_path):
    loraq.append_lora(folder, lora, target=tmp_path / "out", progress=False)
    file = tmp_path / "out" / "loraq.json"
    content = json.loads(file.read_text())
    content["layers"][TOUCHED[0]]["appended"]["loras"][0]["rank"] = 40
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"is damaged: layer .* 'appended' names the LoRAs"):
        loraq.load(tmp_path / "out")
