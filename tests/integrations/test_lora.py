"""Reading a LoRA: every way that names and scales are written, and what is not a plain LoRA."""

import copy
import json
import os
import re
import struct

import pytest
import torch
from safetensors.torch import save_file
from small.models import small_model

from loraq.errors import CheckpointError
from loraq.integrations.lora import Lora, read_lora
from loraq.integrations.lora_names import find_mixin
from loraq.safetensors.reader import ShardReader
from tests.patience import at_once

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
        ({"transformer.blocks.0.to_q.lokr_w1": A}, "not of a plain LoRA"),
        ({"lora_unet_blocks_0_to_q.diff": A}, "not of a plain LoRA"),
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
    with pytest.raises(CheckpointError, match="truncated or not a safetensors"):
        Lora.read(tmp_path)
    write(tmp_path / "y.safetensors", plain())
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files"):
        Lora.read(tmp_path)
    damaged = write(tmp_path / "b" / "y.safetensors", plain(), {"lora_adapter_metadata": "{"})
    with pytest.raises(CheckpointError, match="header"):
        Lora.read(damaged)


def with_header(content: bytes, header: bytes, length: int | None = None) -> bytes:
    """The file with another header, of which another length may be announced."""
    (old,) = struct.unpack("<Q", content[:8])
    announced = len(header) if length is None else length
    return struct.pack("<Q", announced) + header + content[8 + old :]


def edit_header(content: bytes, change) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    change(next(entry for name, entry in entries.items() if "lora_A" in name))
    return with_header(content, json.dumps(entries).encode())


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda old: b"", "0 bytes and a header of 0 is announced"),
        (lambda old: old[:4], "4 bytes and a header of 0 is announced"),
        (lambda old: old[:100], "is announced"),
        (lambda old: old[:-1], "bytes of tensors are announced, and it has"),
        (lambda old: old + b"x", "bytes of tensors are announced, and it has"),
        (lambda old: with_header(old, b"{}", 2**63), "header of 9223372036854775808 is announced"),
        (lambda old: with_header(old, b"[1]"), "is a list, not an object"),
        (lambda old: with_header(old, b"[" * 100_000), "nested in more than 32 levels"),
        (lambda old: with_header(old, b'{"a": 1, "a": 2}'), "has the key 'a' twice"),
        (lambda old: edit_header(old, lambda a: a.update(dtype="F99")), "the dtype 'F99'"),
        (lambda old: edit_header(old, lambda a: a.update(shape=[2**62, 2**62])), "its range holds"),
        (lambda old: edit_header(old, lambda a: a.update(shape=[-2, 6])), "whole numbers from 0"),
        (
            lambda old: edit_header(old, lambda a: a.update(data_offsets=[8, 56])),
            "starts at byte 8",
        ),
        (lambda old: edit_header(old, lambda a: a.pop("data_offsets")), "lacks 'data_offsets'"),
    ],
)
def test_a_hostile_lora_meets_the_parser_of_hostile_models(tmp_path, damage, match):
    file = write(tmp_path / "x.safetensors", plain())
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=f"truncated or not a safetensors.*({match})") as lora:
        Lora.read(file)
    with pytest.raises(CheckpointError) as model:
        ShardReader(file)
    assert str(lora.value) == str(model.value)


KEY = "transformer.blocks.0.to_q"


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"alpha": torch.ones(2)}, "an alpha of shape (2,)"),
        ({"alpha": torch.tensor(1 + 1j)}, "alpha' is torch.complex64. Floats are required"),
        ({"alpha": torch.tensor(True)}, "alpha' is torch.bool. Floats are required"),
        ({"lora_A.weight": torch.ones(2, 6).int()}, "lora_A.weight' is torch.int32"),
        ({"lora_A.weight": torch.ones(2, 6).bool()}, "lora_A.weight' is torch.bool"),
        ({"lora_B.weight": torch.ones(4, 2) * 1j}, "lora_B.weight' is torch.complex64"),
        ({"lora_A.weight": torch.ones(2, 6, 1)}, "has factors (4, 2) and (2, 6, 1)"),
        ({"lora_A.weight": torch.ones(())}, "has factors (4, 2) and ()"),
        ({"lora_B.weight": torch.ones(4, 2, 3, 3)}, "has factors (4, 2, 3, 3) and (2, 6)"),
        ({"lora_A.weight": torch.ones(2, 0)}, "has factors (4, 2) and (2, 0)"),
        ({"lora_A.weight": torch.full((2, 6), 1e38)}, "overflow fp32"),
        ({"lora_A.weight": torch.full((2, 6), 1e300, dtype=torch.float64)}, "NaN or infinity"),
        ({"alpha": torch.tensor(1e39, dtype=torch.float64)}, "overflow fp32"),
        ({"alpha": torch.tensor(float("nan"))}, "the alpha nan"),
        ({"lora_A.weight": torch.ones(6)}, "has factors (4, 2) and (6,)"),
        ({"lora_B.weight": torch.ones(4)}, "has factors (4,) and (2, 6)"),
        ({"lora_A.weight": torch.ones(0, 6), "lora_B.weight": torch.ones(4, 0)}, "(0, 6)"),
    ],
)
def test_numbers_that_are_absurd(tmp_path, changed, match):
    tensors = plain() | {f"{KEY}.{part}": tensor for part, tensor in changed.items()}
    with pytest.raises(CheckpointError, match=re.escape(match)):
        Lora.read(write(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize(
    "options",
    [
        [1],
        {"lora_alpha": "8"},
        {"lora_alpha": True},
        {"r": "2"},
        {"r": True},
        {"r": 2.0},
        {"use_dora": "no"},
        {"use_rslora": 1},
        {"rank_pattern": {"to_q": "2"}},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": {"to_q": True}},
        {"alpha_pattern": {"(.*.*)*to_k": 1}},
        {"alpha_pattern": {".*to_q": 1}},
        {"alpha_pattern": {"to_q": None}},
    ],
)
def test_options_that_are_absurd(tmp_path, options):
    metadata = {"lora_adapter_metadata": json.dumps(options)}
    with pytest.raises(
        CheckpointError, match=r"The configuration of '.*x\.safetensors' is damaged"
    ):
        Lora.read(write(tmp_path / "x.safetensors", plain(), metadata))


@pytest.mark.parametrize("absurd", ["inf", "nan", '"a": 1, "a": 2', "1" * 5000])
def test_a_configuration_that_is_no_plain_json(tmp_path, absurd):
    text = f"{{{absurd}}}" if ":" in absurd else f'{{"lora_alpha": {absurd}}}'
    with pytest.raises(CheckpointError, match=r"The header of '.*' is damaged"):
        Lora.read(write(tmp_path / "x.safetensors", plain(), {"lora_adapter_metadata": text}))


def test_a_rank_that_contradicts_the_configuration_is_refused(tmp_path):
    def read(options: dict) -> Lora:
        metadata = {"lora_adapter_metadata": json.dumps(options)}
        return Lora.read(write(tmp_path / "x.safetensors", plain(), metadata))

    assert read({"r": 2}).adapters["blocks.0.to_q"].scale == 1
    assert read({"r": 8, "rank_pattern": {"to_q": 2}}).adapters["blocks.0.to_q"].scale == 1
    with pytest.raises(CheckpointError, match=r"factors of rank 2, and its configuration says 8"):
        read({"r": 8})
    with pytest.raises(CheckpointError, match=r"factors of rank 2, and its configuration says 4"):
        read({"r": 2, "rank_pattern": {r"^blocks\.0\.to_q$": 4}})


def test_the_first_pattern_that_names_a_layer_or_its_end_counts(tmp_path):
    def alpha(**patterns: float) -> float:
        metadata = {"lora_adapter_metadata": json.dumps({"alpha_pattern": patterns})}
        file = write(tmp_path / "x.safetensors", plain(), metadata)
        return 2 * Lora.read(file).adapters["blocks.0.to_q"].scale

    assert alpha(**{"o_q": 5, "^to_q": 6, "^0.to_q$": 7}) == 2
    assert alpha(**{"to_q": 5, "blocks.0.to_q": 6}) == 5
    assert alpha(**{"blocks.0.to_q": 6, "to_q": 5}) == 6
    assert alpha(**{r"^blocks\.0\.to_q$": 7, "to_q": 5}) == 7
    assert alpha(**{"0.to_q": 8}) == 8


def test_thousands_of_patterns_take_no_time(tmp_path):
    patterns = {f"blocks.{i}.to_q": i for i in range(20_000)}
    layers = [plain(layer=f"blocks.{i}.to_q") for i in range(1000)]
    tensors = {name: tensor for layer in layers for name, tensor in layer.items()}
    metadata = {"lora_adapter_metadata": json.dumps({"alpha_pattern": patterns})}
    file = write(tmp_path / "x.safetensors", tensors, metadata)
    with at_once():
        assert Lora.read(file).adapters["blocks.999.to_q"].scale == 999 / 2


def test_factors_of_two_adapters_are_not_one(tmp_path):
    tensors = {"a.to_q.lora_A.one.weight": A, "a.to_q.lora_B.two.weight": B}
    with pytest.raises(CheckpointError, match=r"not of a plain LoRA: a\.to_q\.lora_B\.two\.weight"):
        Lora.read(write(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize("second", ["", "diffusion_model.", "base_model.model.transformer."])
def test_a_layer_under_two_spellings_is_refused(tmp_path, second):
    tensors = {**plain("transformer."), **plain(second)}
    with pytest.raises(CheckpointError, match=r"not of a plain LoRA: .*to_q\.lora_A\.weight"):
        Lora.read(write(tmp_path / "x.safetensors", tensors))


def test_an_alpha_of_no_layer_is_refused_before_a_converter_drops_it(tmp_path, flux):
    tensors, _ = joined(flux, "lora_unet_double_blocks_0_img_attn_qkv")
    tensors["lora_unet_double_blocks_0_img_mlp_0.alpha"] = torch.tensor(1.0)
    with pytest.raises(CheckpointError, match=r"not of a plain LoRA: lora_unet.*img_mlp_0\.alpha"):
        Lora.read(write(tmp_path / "x.safetensors", tensors), flux)


def test_a_second_adapter_of_the_same_layer_is_refused(tmp_path):
    tensors = {
        f"a.to_q.lora_{part}.{name}.weight": tensor
        for name in ("one", "two")
        for part, tensor in (("A", A), ("B", B))
    }
    with pytest.raises(CheckpointError, match=r"not of a plain LoRA: a\.to_q\.lora_A\.two\.weight"):
        Lora.read(write(tmp_path / "x.safetensors", {k: t.clone() for k, t in tensors.items()}))


# --- names that diffusers converts ----------------------------------------------------------------


@pytest.fixture(scope="module")
def flux():
    diffusers = pytest.importorskip("diffusers")
    return small_model(diffusers.FluxTransformer2DModel)


TO = "transformer_blocks.0.attn.to_"


def joined(model, name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A LoRA of q, k and v joined, rank 4 and alpha 2, and what it adds."""
    generator = torch.Generator().manual_seed(0)
    n_out, n_in = model.get_submodule(TO + "q").weight.shape
    down = torch.randn(4, n_in, generator=generator)
    up = torch.randn(3 * n_out, 4, generator=generator)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}, up @ down / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    ["lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks_0_img_attn_qkv"],
)
def test_joined_layers_of_kohya_and_comfyui_are_split(tmp_path, flux, name, dtype):
    tensors, delta = joined(flux, name)
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    lora = Lora.read(write(tmp_path / "x.safetensors", tensors), flux)
    assert list(lora.adapters) == [TO + part for part in "qkv"]
    found = torch.cat([adapter.delta() for adapter in lora.adapters.values()])
    torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-5 if dtype.itemsize == 4 else 0.1)


def test_an_alpha_may_be_a_tensor_of_one_number(tmp_path, flux):
    tensors, delta = joined(flux, name := "lora_unet_double_blocks_0_img_attn_qkv")
    tensors[f"{name}.alpha"] = torch.tensor([2.0])
    adapters = Lora.read(write(tmp_path / "x.safetensors", tensors), flux).adapters
    found = torch.cat([adapter.delta() for adapter in adapters.values()])
    torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-5)


def test_flat_names_of_onetrainer_and_text_encoders_of_kohya(tmp_path, flux):
    n_out, n_in = flux.get_submodule(TO + "q").weight.shape
    down, up = torch.ones(2, n_in), torch.ones(n_out, 2)
    tensors = {
        f"{layer}.{part}": tensor.clone()
        for layer in ("lora_transformer_transformer_blocks_0_attn_to_q", "lora_te1_text_q_proj")
        for part, tensor in (
            ("lora_down.weight", down),
            ("lora_up.weight", up),
            ("alpha", torch.tensor(2.0)),
        )
    }
    lora = Lora.read(write(tmp_path / "x.safetensors", tensors), flux)
    assert lora.others == ("lora_te1",)
    assert torch.equal(lora.adapters[TO + "q"].delta(), up @ down)


@pytest.mark.parametrize(
    ("model", "pipeline"),
    [
        ("ChromaTransformer2DModel", "ChromaPipeline"),
        ("ChronoEditTransformer3DModel", "ChronoEditPipeline"),
        ("Flux2Transformer2DModel", "Flux2Pipeline"),
        ("FluxTransformer2DModel", "FluxPipeline"),
        ("MochiTransformer3DModel", "MochiPipeline"),
        ("QwenImageTransformer2DModel", "QwenImagePipeline"),
        ("SD3Transformer2DModel", "StableDiffusion3Pipeline"),
        ("SkyReelsV2Transformer3DModel", "SkyReelsV2Pipeline"),
        ("UNet2DConditionModel", "StableDiffusionXLPipeline"),
        ("UNetMotionModel", "AnimateDiffSDXLPipeline"),
        ("WanVACETransformer3DModel", "WanVACEPipeline"),
    ],
)
def test_a_model_has_the_converter_of_its_pipeline(model, pipeline):
    diffusers = pytest.importorskip("diffusers")
    mixin = find_mixin(vars(diffusers.loaders.lora_pipeline), model)
    assert mixin in getattr(diffusers, pipeline).__mro__


def test_a_model_that_diffusers_has_no_converter_for():
    diffusers = pytest.importorskip("diffusers")
    names = vars(diffusers.loaders.lora_pipeline)
    assert find_mixin(names, "PixArtTransformer2DModel") is None
    assert find_mixin(names, "Linear") is None


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")  # in Chroma's own code
def test_joined_layers_of_a_model_whose_converter_has_another_name(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    chroma = small_model(diffusers.ChromaTransformer2DModel)
    tensors, delta = joined(chroma, "lora_unet_double_blocks_0_img_attn_qkv")
    lora = Lora.read(write(tmp_path / "x.safetensors", tensors), chroma)
    assert list(lora.adapters) == [TO + part for part in "qkv"]
    found = torch.cat([adapter.delta() for adapter in lora.adapters.values()])
    torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-5)


def test_what_diffusers_loads_is_what_is_read(tmp_path, flux):
    tensors, _ = joined(flux, "lora_unet_double_blocks_0_img_attn_qkv")
    file = write(tmp_path / "x.safetensors", tensors)
    pipelines = pytest.importorskip("diffusers.loaders.lora_pipeline")
    loaded = copy.deepcopy(flux)
    weights = pipelines.FluxLoraLoaderMixin.lora_state_dict(str(file))
    loaded.load_lora_adapter(weights, prefix="transformer")
    loaded.fuse_lora()
    for name, adapter in Lora.read(file, flux).adapters.items():
        before = flux.get_submodule(name).weight
        after = loaded.get_submodule(name).get_base_layer().weight
        torch.testing.assert_close(after - before, adapter.delta(), rtol=1e-4, atol=1e-4)


def test_flat_names_of_a_unet_with_an_alpha_beside(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        layers_per_block=1,
    )
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.ones(4, 64), torch.ones(64, 4)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    flat = {f"lora_unet_{layer.replace('.', '_')}.{part}": t for part, t in tensors.items()}
    lora = Lora.read(write(tmp_path / "x.safetensors", flat), unet)
    assert list(lora.adapters) == [layer]
    assert torch.equal(lora.adapters[layer].delta(), up @ down / 2)


def test_names_that_no_converter_understands(tmp_path, flux):
    file = write(tmp_path / "x.safetensors", joined(flux, "lora_unet_no_such_layer")[0])
    with pytest.raises(CheckpointError, match="converter of LoRAs for FluxTransformer2DModel does"):
        Lora.read(file, flux)
    file = write(tmp_path / "x.safetensors", {**plain("lora_unet_"), "a.dora_scale": A})
    with pytest.raises(CheckpointError, match=r"not of a plain LoRA: a\.dora_scale"):
        Lora.read(file, flux)


def test_what_a_converter_drops_is_refused_by_name(tmp_path, flux, monkeypatch):
    pipelines = pytest.importorskip("diffusers.loaders.lora_pipeline")

    def convert(tensors, **_):
        down, up, *_ = tensors.values()
        return {
            f"transformer.{TO}q.lora_A.weight": 2 * down,
            f"transformer.{TO}q.lora_B.weight": up,
        }

    monkeypatch.setattr(pipelines.FluxLoraLoaderMixin, "lora_state_dict", convert)
    tensors = {f"lora_unet_q.{name}": t for name, t in (("a", A), ("b", B), ("c", B + 1))}
    with pytest.raises(CheckpointError, match=r"not of a plain LoRA: lora_unet_q\.c\. Only"):
        Lora.read(write(tmp_path / "x.safetensors", tensors), flux)


def test_a_file_of_more_tensors_than_any_lora_has_is_refused_at_once(tmp_path):
    save_file({f"a.{i}.alpha": torch.ones(1) for i in range(10_001)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="has 10001 tensors; a LoRA of at most 10000"):
        Lora.read(tmp_path / "a.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_in_the_place_of_a_lora_is_refused_at_once(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "style.safetensors")
    for path in (tmp_path / "folder", tmp_path / "folder" / "style.safetensors"):
        with pytest.raises(CheckpointError, match=r"is not a (file|folder|LoRA)|and not a file"):
            Lora.read(path)
        with pytest.raises(CheckpointError, match=r"is not a (file|folder|LoRA)|and not a file"):
            read_lora(path, torch.nn.Linear(1, 1))


def test_an_option_that_is_said_twice_and_differently_is_refused(tmp_path):
    factors = {"a.lora_A.weight": torch.ones(4, 8), "a.lora_B.weight": torch.ones(8, 4)}
    for said, other in ((8, 16), (8, 8)):
        options = {"transformer.lora_alpha": said, "lora_alpha": other}
        metadata = {"lora_adapter_metadata": json.dumps(options)}
        save_file(factors, tmp_path / "a.safetensors", metadata=metadata)
        if said == other:
            assert Lora.read(tmp_path / "a.safetensors").adapters["a"].scale == 2
            continue
        with pytest.raises(CheckpointError, match="'lora_alpha' is both 8 and 16"):
            Lora.read(tmp_path / "a.safetensors")
