"""Layers that the rules keep: stored in eight bits, counted, saved, loaded, adapted, absorbed."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("diffusers")  # `small.pixart` builds its model

import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from small.pixart import small_pixart
from torch import nn

import loraq
from loraq.checkpoint.inspect import count_stored
from loraq.checkpoint.manifest import Manifest
from loraq.cli import main
from loraq.errors import RecipeError
from loraq.integrations.checkpoints import plan_checkpoint, quantize_checkpoint
from loraq.layers import quantized_layers
from loraq.linalg import relative_error
from loraq.nn import QuantizedLinear
from loraq.pipeline.plan import Plan
from loraq.recipe import Recipe
from loraq.rules import Rule

RECIPE = replace(Recipe.named("mxfp4+w8a8-r8"), method="lqer")
TEXT_SIDE = "transformer_blocks.1.attn2.to_k"
IN_8_BITS = {
    *(f"transformer_blocks.{i}.attn2.to_{part}" for i in range(2) for part in "kv"),
    "adaln_single.emb.timestep_embedder.linear_1",
    "adaln_single.emb.timestep_embedder.linear_2",
    "adaln_single.linear",
    "caption_projection.linear_1",
    "caption_projection.linear_2",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    small_pixart(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "model"
    quantize_checkpoint(source, folder, RECIPE, progress=False)
    return folder


def size_of_tensors(folder):
    """Bytes of all weight files, their headers not counted."""
    total = 0
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        total += len(raw) - 8 - int.from_bytes(raw[:8], "little")
    return total


def test_kept_layers_are_stored_in_eight_bits_and_the_output_projection_is_not(folder):
    layers = Manifest.read(folder).layers
    kept = {name: layer for name, layer in layers.items() if layer.is_kept}
    assert kept.keys() == IN_8_BITS
    for layer in kept.values():
        assert (layer.scheme.weight, layer.scheme.activation) == ("int8_b128", "bf16")
        assert layer.scheme.branch is None
        assert layer.record["relative_error"] < 0.01
    model = loraq.load(folder)
    assert type(model.proj_out) is nn.Linear
    assert isinstance(model.get_submodule(TEXT_SIDE), QuantizedLinear)


@pytest.mark.parametrize("method", ["lqer", "gptq", "loraq"])
def test_they_are_rounded_to_nearest_whatever_the_method(method):
    recipe = replace(Recipe.named("int4-a16" if method == "gptq" else "mxfp4+w8a8"), method=method)
    plan = Plan.of({"txt_in": (64, 64), "to_q": (64, 64)}, recipe, "SomeTransformer")
    assert [job.method.name for job in plan.quantized] == ["rtn", method]


def test_the_size_of_the_whole_model_is_the_same_wherever_it_is_shown(source, folder, tmp_path):
    planned = plan_checkpoint(source, RECIPE)
    report = quantize_checkpoint(source, tmp_path / "again", RECIPE, progress=False)
    model = small_pixart(torch.float32).from_pretrained(source)
    in_memory = loraq.quantize_(model, RECIPE, progress=False).plan
    found = count_stored(folder, Manifest.read(folder))
    expected = sum(p.numel() for p in small_pixart(torch.float32).state_dict().values())
    for plan in (planned, report.plan, in_memory):
        assert (plan.parameters, plan.model_nbytes) == found
        assert plan.effective_bits == 8 * found[1] / found[0]
    assert found == (expected, size_of_tensors(folder))


def test_the_commands_show_the_same_size(source, folder, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(RECIPE.to_dict()))
    options = ("--recipe", str(recipe), "--json")
    shown = []
    for arguments in (
        ("plan", str(source), *options),
        ("quantize", str(source), str(tmp_path / "out"), *options),
        ("inspect", str(folder), "--json"),
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        shown.append({key: found[key] for key in ("parameters", "model_nbytes", "effective_bits")})
    assert shown[0] == shown[1] == shown[2]
    said = CliRunner().invoke(main, ["inspect", str(folder)]).stdout
    assert f"{shown[0]['effective_bits']:.3f} effective bits per parameter" in said
    assert "int8_b128 (kept)" in said


def test_the_options_change_rank_and_kept_layers(source):
    run = CliRunner().invoke
    arguments = ["plan", str(source), "--recipe", "mxfp4+w8a8", "--json"]
    found = json.loads(run(main, [*arguments, "--rank", "4", "--keep", "float"]).stdout)
    schemes = [layer["scheme"] for layer in found["layers"] if layer["scheme"]]
    assert {scheme["branch"]["rank"] for scheme in schemes} == {4}
    assert len(schemes) == len(found["layers"]) - len(IN_8_BITS) - 1
    wrong = run(main, [*arguments, "--rank", "4", "--budget", "5"])
    assert wrong.exit_code == 1
    assert "the rank is 4 already" in wrong.output
    assert "Known: float, int8" in run(main, [*arguments, "--keep", "int9"]).output


def test_what_the_user_names_stays_as_it_is(source):
    named = RECIPE.adjusted(modules_to_not_convert=["caption_projection"])
    skipped = replace(RECIPE, rules=(Rule("caption_projection.*", skip=True),))
    for recipe in (named, skipped):
        kept = {layer.name for layer in plan_checkpoint(source, recipe).kept}
        assert kept == {"caption_projection.linear_1", "caption_projection.linear_2", "proj_out"}


def test_a_rule_of_the_recipe_may_keep_a_layer():
    plan = Plan.of({"a": (64, 64)}, replace(RECIPE, rules=(Rule("a", keep=True),)))
    assert [job.scheme.weight for job in plan.kept_in_8_bits] == ["int8_b128"]
    with pytest.raises(RecipeError, match="both `keep = true` and `skip`"):
        Rule("a", keep=True, skip=True)


def test_a_layer_so_narrow_that_scales_eat_what_eight_bits_save_stays_as_it_is():
    plan = Plan.of({"txt_in": (64, 2), "txt_in2": (64, 3)}, RECIPE, "SomeTransformer")
    (narrow,) = plan.kept
    assert (narrow.name, narrow.reason) == (
        "txt_in",
        "text projection; eight bits would store no less",
    )
    assert [job.name for job in plan.kept_in_8_bits] == ["txt_in2"]


def test_the_means_count_the_layers_of_the_recipe_only(source):
    model = small_pixart(torch.float32).from_pretrained(source)
    report = loraq.quantize_(model, RECIPE, progress=False)
    model = small_pixart(torch.float32).from_pretrained(source)
    without = loraq.quantize_(model, replace(RECIPE, keep="float"), progress=False)
    assert len(report.layers) == len(without.layers) + len(IN_8_BITS)
    assert report.mean_relative_error == without.mean_relative_error
    assert report.plan.bits_per_weight == without.plan.bits_per_weight
    assert report.plan.effective_bits < without.plan.effective_bits


@pytest.mark.parametrize("bias", [True, False])
def test_a_part_with_quantized_layers_says_which_floats_it_takes(bias):
    """Models ask `next(module.parameters()).dtype`; of a layer without a bias, nobody can."""
    model = nn.Sequential(nn.Linear(32, 32, bias=bias), nn.Linear(32, 32)).bfloat16()
    loraq.quantize_(model, "int8-a16", progress=False)
    assert next(model.parameters()).dtype == (torch.bfloat16 if bias else torch.uint8)
    assert model[0].weight.dtype == torch.bfloat16
    names = [name for name in model.state_dict() if name.startswith("1.")]
    assert names == ["1.weight_packed", "1.weight_scale", "1.bias"]


def test_a_lora_on_a_kept_layer_is_absorbed_in_eight_bits(source, folder, tmp_path):
    torch.manual_seed(0)
    up, down = torch.randn(32, 4) / 4, torch.randn(4, 32) / 32**0.5
    prefix = f"transformer.{TEXT_SIDE}"
    save_file(
        {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up},
        tmp_path / "lora.safetensors",
    )
    model = loraq.load(folder)
    absorbed = loraq.absorb_lora(model, tmp_path / "lora.safetensors", source, progress=False)
    (report,) = absorbed.layers
    assert (report.name, report.kept, absorbed.kept) == (TEXT_SIDE, True, ())
    weight = small_pixart(torch.float32).from_pretrained(source).get_submodule(TEXT_SIDE).weight
    exact = weight.detach() + up @ down
    assert relative_error(exact, quantized_layers(model)[TEXT_SIDE].reconstruct()) < 0.01
    assert model.get_submodule(TEXT_SIDE).record["kept"]


def test_an_adapter_on_a_kept_layer_trains(folder):
    peft = pytest.importorskip("peft")
    model = loraq.load(folder)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[TEXT_SIDE]), model)
    layer = model.get_submodule(TEXT_SIDE)
    y = layer(torch.randn(3, 32, dtype=layer.weight.dtype))
    y.square().sum().backward()
    assert layer.lora_B["default"].weight.grad is not None
