"""Every transformer class of the installed diffusers: quantized, run, saved, loaded.

The classes are discovered and none is left out, so a diffusers with a new class fails here until
`small` can build it.
"""

import copy
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import loraq
from loraq.cli import main
from loraq.layers import quantized_layers
from loraq.nn import QuantizedConv1x1
from loraq.pipeline.module import plan_model

pytest.importorskip("diffusers")

from small.models import OWN, run, small_model

from benchmarks.architectures import PARTS
from loraq.integrations.diffusers import transformer_classes
from loraq.scheme import Scheme

CLASSES = transformer_classes()
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
each_class = pytest.mark.parametrize("name", CLASSES)

#: Classes that are worth the slower method; the others take the same way through the code with a
#: quick one.
WITH_LORAQ = (
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "WanTransformer3DModel",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


@cache
def _float_model(name: str) -> nn.Module:
    return small_model(CLASSES[name])


def float_model(name: str) -> nn.Module:
    return copy.deepcopy(_float_model(name))


def quantize(model: nn.Module, **changes) -> None:
    changes = {"scheme": "mxfp4+w8a8-r4", "method": "lqer"} | changes
    loraq.quantize_(model, loraq.Recipe.from_dict(changes), progress=False)


def all_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_diffusers_has_the_classes_that_the_table_names():
    assert len(CLASSES) >= 70
    assert set(OWN) <= set(CLASSES)


@each_class
def test_a_class_is_quantized_and_comes_back_bit_for_bit(name, tmp_path):
    model = float_model(name)
    exact = run(model)
    quantize(model, **({"method": "loraq", "effort": "fast"} if name in WITH_LORAQ else {}))
    outputs = run(model)
    assert all(output.isfinite().all() for output in outputs)
    assert [output.shape for output in outputs] == [output.shape for output in exact]
    assert not all_equal(outputs, exact)
    loraq.save(model, tmp_path / "saved")
    loaded = loraq.load(tmp_path / "saved")
    assert type(loaded) is CLASSES[name]
    assert {n: type(layer) for n, layer in quantized_layers(loaded).items()} == {
        n: type(layer) for n, layer in quantized_layers(model).items()
    }
    assert all_equal(run(loaded), outputs)


#: Classes that leave more than a tenth of a full-size model in 16 bits, and why.
LESS = {
    "PixArtTransformer2DModel": "SVDQuant's selection leaves the text side of the cross-attention",
    "SanaTransformer2DModel": "SVDQuant's selection leaves the text side of the cross-attention",
    "SanaVideoTransformer3DModel": "its temporal convolutions see three frames",
    "SanaWMTransformer3DModel": "its temporal convolutions see three frames",
}


@pytest.mark.skipif(
    not PAGE.is_file(), reason="the documents are only in a clone of the repository"
)
def test_the_rules_quantize_nine_tenths_of_every_full_size_model():
    # The page is made from plans of full-size models; that it is fresh is a test of its own.
    page, _, _ = PAGE.read_text(encoding="utf-8").partition("## Text encoders")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\| ([\d.]+)% \|", page, re.MULTILINE)
    assert {name for name, _ in rows} == set(CLASSES) - set(PARTS)
    assert {name for name, share in rows if float(share) < 90} == set(LESS)


@pytest.mark.parametrize(
    ("name", "modulation"),
    [
        ("FluxTransformer2DModel", "transformer_blocks.0.norm1.linear"),
        ("SD3Transformer2DModel", "transformer_blocks.0.norm1_context.linear"),
        ("QwenImageTransformer2DModel", "transformer_blocks.0.txt_mod.1"),
        ("Flux2Transformer2DModel", "double_stream_modulation_img.linear"),
        ("ZImageTransformer2DModel", "layers.0.adaLN_modulation.0"),
        ("HiDreamImageTransformer2DModel", "double_stream_blocks.0.block.adaLN_modulation.1"),
        ("MiniMaxH3Transformer3DModel", "transformer_blocks.0.adaln_proj.linear"),
        ("WanTransformer3DModel", "condition_embedder.time_proj"),
    ],
)
def test_a_modulation_is_weight_only_and_runs_on_as_many_rows_as_there_are_images(name, modulation):
    model = float_model(name)
    layers = {layer.name: layer for layer in plan_model(model, "mxfp4+w8a8-r4").layers}
    assert (
        layers[modulation].scheme.activation
        == layers[modulation].scheme.branch.activation
        == "bf16"
    )
    assert "modulation" in layers[modulation].reason
    rows = []
    model.get_submodule(modulation).register_forward_hook(
        lambda _, x, y: rows.append(y[..., 0].numel())
    )
    run(model)
    assert rows
    assert max(rows) <= 3


def test_the_convolutions_of_sana_are_quantized():
    model = float_model("SanaTransformer2DModel")
    quantize(model)
    convolutions = {
        name
        for name, layer in quantized_layers(model).items()
        if isinstance(layer, QuantizedConv1x1)
    }
    assert convolutions == {
        f"transformer_blocks.0.ff.{part}" for part in ("conv_inverted", "conv_point")
    }
    assert isinstance(model.transformer_blocks[0].ff.conv_depth, nn.Conv2d)


def test_a_sana_of_odd_widths_is_quantized(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLASSES["SanaTransformer2DModel"](
            in_channels=3,
            out_channels=3,
            num_attention_heads=3,
            attention_head_dim=7,
            num_layers=1,
            num_cross_attention_heads=3,
            cross_attention_head_dim=7,
            cross_attention_dim=21,
            caption_channels=17,
            mlp_ratio=2.5,
            sample_size=4,
        ).eval()
    quantize(model)
    outputs = run(model)
    loraq.save(model, tmp_path / "saved")
    assert all(output.isfinite().all() for output in outputs)
    assert all_equal(run(loraq.load(tmp_path / "saved")), outputs)


FUSIBLE = {
    "AuraFlowTransformer2DModel": "joint_transformer_blocks.0.attn.to_added_qkv",
    "FluxTransformer2DModel": "single_transformer_blocks.0.attn.to_qkv",
    "HunyuanDiT2DModel": "blocks.0.attn1.to_qkv",
    "PixArtTransformer2DModel": "transformer_blocks.0.attn1.to_qkv",
    "SD3Transformer2DModel": "transformer_blocks.0.attn.to_qkv",
    "WanTransformer3DModel": "blocks.0.attn2.to_kv",
}


@pytest.mark.parametrize(("name", "fused"), FUSIBLE.items(), ids=FUSIBLE)
def test_a_model_with_fused_projections_is_quantized_and_loaded(name, fused, tmp_path):
    model = float_model(name)
    model.fuse_qkv_projections()
    fresh = copy.deepcopy(model)
    quantize(model)
    called = []
    model.get_submodule(fused).register_forward_hook(lambda *_: called.append(fused))
    outputs = run(model)
    assert fused in quantized_layers(model)
    assert called
    loraq.save(model, tmp_path / "saved")
    loraq.load_into(fresh, tmp_path / "saved")
    assert all_equal(run(fresh), outputs)


def test_the_text_side_of_pixart_stays_fused_or_not():
    model = float_model("PixArtTransformer2DModel")
    model.fuse_qkv_projections()
    quantize(model)
    kept = {f"transformer_blocks.0.attn2.to_{part}" for part in ("k", "v", "kv")}
    schemes = {model.get_submodule(name).scheme for name in kept}
    assert schemes == {Scheme("int8_b128")}  # kept, whatever the recipe says of the others


@each_class
def test_only_experts_are_taken_for_stacks(name):
    plan = plan_model(_float_model(name), "mxfp4+w8a8-r4")
    found = {layer.name.rpartition(".")[2] for layer in plan.quantized if layer.is_stack}
    has_experts = name == "NucleusMoEImageTransformer2DModel"
    assert found == ({"gate_up_proj", "down_proj"} if has_experts else set())


# --- on the command line --------------------------------------------------------------------------


def loraq_command(*arguments: object) -> dict:
    finished = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert finished.exit_code == 0, finished.stderr
    return json.loads(finished.stdout)


def test_a_folder_of_sana_is_planned_quantized_inspected_and_compared(tmp_path):
    float_model("SanaTransformer2DModel").save_pretrained(tmp_path / "sana")
    recipe = ("--recipe", "mxfp4+w8a8-r4", "--method", "lqer")
    planned = loraq_command("plan", tmp_path / "sana", *recipe)
    loraq_command("quantize", tmp_path / "sana", tmp_path / "out", *recipe)
    inspected = loraq_command("inspect", tmp_path / "out")
    compared = loraq_command("compare", tmp_path / "sana", tmp_path / "out")
    name = "transformer_blocks.0.ff.conv_inverted"
    assert inspected["layers"][name]["shape"] == [160, 32]
    assert {layer["name"] for layer in planned["layers"] if layer["scheme"]} == set(
        inspected["layers"]
    )
    errors = {layer["name"]: layer["relative_error"] for layer in compared["layers"]}
    assert errors.keys() == inspected["layers"].keys()
    assert errors[name] == pytest.approx(inspected["layers"][name]["relative_error"], rel=1e-4)
    assert [other["name"] for other in planned["others"]] == [
        "transformer_blocks.0.ff.conv_depth.weight"
    ]


def test_the_plan_says_in_words_what_is_weight_only_kept_and_not_linear(tmp_path):
    float_model("SanaVideoTransformer3DModel").save_pretrained(tmp_path / "sana")
    finished = CliRunner().invoke(
        main, ["plan", str(tmp_path / "sana"), "--recipe", "mxfp4+w8a8-r4"]
    )
    lines = {
        line.split()[0]: " ".join(line.split()[1:]) for line in finished.stdout.splitlines() if line
    }
    assert re.fullmatch(
        r"192×32 mxfp4 bf16 mxint8/bf16 4 .* modulation", lines["time_embed.linear"]
    )
    assert re.fullmatch(
        r"160×32 mxfp4 mxfp4 h32 mxint8/mxint8 4 .* [\d.]+",
        lines["transformer_blocks.0.ff.conv_inverted"],
    )
    assert re.fullmatch(r"32×32 kept .* KiB output projection", lines["proj_out"])
    temporal = lines["transformer_blocks.0.ff.conv_temp.weight"]
    assert re.fullmatch(r"32×32×3×1 kept .* KiB not a linear layer, but Conv2d", temporal)
