"""What a recipe for a target makes is held by it; and what a refusal names does work."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small.pixart import small_pixart
from torch import nn

import loraq
from benchmarks.architectures import published
from loraq.errors import ExportError, LoraqError, RecipeError, SchemeError
from loraq.exports.table import TARGETS
from loraq.layers import quantized_layers
from loraq.recipe import Recipe
from loraq.targets import target_recipes
from tests.exports.models import MODELS

pytest.importorskip("diffusers")

RECIPES = [name for name, made in target_recipes().items() if made.limits.name in TARGETS]
#: Packages without which nothing can be written.
NEEDS = {"openvino": "openvino"}
#: What a target says of a class that it does not take.
STRANGE = {
    "gguf": {"pixart"},
    "comfy": {"pixart", "sana"},
}
#: Targets that hold the two 1×1 convolutions of the Sana, half of its weights.
WITH_CONVOLUTIONS = {"sdnq", "openvino"}


def build(name: str) -> nn.Module:
    if name != "pixart":
        return MODELS[name].build()
    sizes = {"num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128}
    return small_pixart(torch.float32, num_layers=1, **sizes)


def quantize(model: nn.Module, recipe: str | Recipe, folder: Path) -> loraq.pipeline.report.Report:
    """Quantize by a fast method, and save."""
    made = Recipe.of(recipe)
    method = "svdquant" if made.scheme.branch else made.method
    report = loraq.quantize_(model, replace(made, method=method), progress=False)
    loraq.save(model, folder)
    return report


def export(source: Path, target: Path, to: str):
    return loraq.export(source, target, to=to, progress=False)


@pytest.fixture(autouse=True)
def graph(monkeypatch):
    """Packages of ONNX are not needed here: `make test-exports` builds and runs the graphs."""
    monkeypatch.setattr("loraq.exports.onnx.build_graph", lambda *_: b"graph")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_target_holds_every_layer_of_its_recipe(tmp_path, recipe, name):
    model, to = build(name), target_recipes()[recipe].limits.name
    if to in NEEDS:
        pytest.importorskip(NEEDS[to])
    if name in STRANGE.get(to, ()):
        with pytest.raises(RecipeError, match=type(model).__name__) as caught:
            quantize(model, recipe, tmp_path / "quantized")
        assert "Use the recipe 'sdnq-b32', for `loraq export --to sdnq`." in str(caught.value)
        assert not quantized_layers(model)
        return
    report = quantize(model, recipe, tmp_path / "quantized")
    fit = report.plan.target
    left = 2 if name == "sana" and to not in WITH_CONVOLUTIONS else 0
    assert sum(fit.left.values()) == left
    assert fit.share_left == left / 4
    done = export(tmp_path / "quantized", tmp_path / "out", to)
    assert {layer.fate for layer in done.layers} == {"exact"}
    n_layers = sum(max(1, len(layer.parts)) for layer in done.layers)  # some are joined there
    assert n_layers == len(quantized_layers(model))
    assert done.largest_change == 0.0


def test_what_it_costs_is_in_the_plan():
    alone = loraq.plan_model(build("flux"), "int4+bf16")
    plan = loraq.plan_model(build("flux"), replace(Recipe.of("nunchaku-int4"), budget="r16=40"))
    fit = plan.target
    assert (fit.ranks, fit.ranks_alone) == ((32, 32), (40, 40))
    assert fit.bits_per_weight < fit.bits_alone
    assert "one rank for all layers, a multiple of 16" in fit.limits
    assert plan.target.left == {}
    assert alone.target is None
    sana = loraq.plan_model(build("sana"), "nunchaku-int4")
    assert sana.target.bits_per_weight > sana.target.bits_alone
    kept = {layer.name.rpartition(".")[2] for layer in sana.kept if "nunchaku" in layer.reason}
    assert kept == {"conv_inverted", "conv_point"}


def test_ranks_are_those_that_the_narrowest_layer_has():
    shapes = {"a": nn.Linear(128, 512), "b": nn.Linear(1024, 1024)}
    recipe = replace(Recipe.of("nunchaku-int4"), budget="5")
    fit = loraq.plan_model(nn.ModuleDict(shapes), replace(recipe, budget="8")).target
    assert fit.ranks_alone[0] < fit.ranks_alone[1]
    assert fit.ranks == (fit.ranks_alone[0] // 16 * 16,) * 2
    with pytest.raises(SchemeError, match=r"rank 4, and target 'nunchaku-lite' takes multiples"):
        loraq.plan_model(nn.ModuleDict(shapes), replace(recipe, budget="5"))


def test_much_that_stays_in_16_bits_is_warned_of(caplog):
    loraq.plan_model(build("sana"), "nunchaku-int4")
    assert "50 % of the weights that recipe 'nunchaku-int4' is for stay in 16 bits" in caplog.text
    assert "Recipe 'sdnq-b32' holds most" in caplog.text


@pytest.mark.parametrize(
    ("name", "recipe", "bits"),
    [
        ("FLUX.1-dev", "nunchaku-int4", 4.5),
        ("PixArt-Σ XL", "nunchaku-int4", 4.95),
        ("SD3.5 large", "nunchaku-int4", 4.46),
        ("SANA 1.6B", "sdnq-b32", 4.8),
        ("SANA 1.6B", "gguf-q4_0", None),
        pytest.param("Qwen-Image", "nunchaku-int4", 4.5, marks=pytest.mark.slow),
        pytest.param("Qwen-Image", "gguf-q4_0", 4.7, marks=pytest.mark.slow),
    ],
)
def test_real_sizes_fit(name, recipe, bits):
    fit = loraq.plan_model(published_model(name), recipe).target
    if bits is None:  # most of its weights are 1×1 convolutions
        assert 0.5 < fit.share_left < 0.7
        return
    assert fit.share_left == 0.0
    assert fit.ranks == (32, 32)
    assert fit.bits_per_weight == pytest.approx(bits, abs=0.15)


def test_a_model_that_a_target_cannot_hold_is_refused_before_work():
    with pytest.raises(
        SchemeError, match=r"holds none of the 160 layers .*2240×2240 is not in"
    ) as e:
        loraq.plan_model(published_model("SANA 1.6B"), "nunchaku-int4")
    assert "Use the recipe 'sdnq-b32'" in str(e.value)


def published_model(name: str) -> nn.Module:
    from loraq.integrations.diffusers import transformer_classes

    entry = published()[name]
    with torch.device("meta"):
        return transformer_classes()[entry["class"]](**entry["config"])


# --- what refusals name ---------------------------------------------------------------------------


def follow(message: str, model: nn.Module, to: str, place: Path):
    """Do what a message says: quantize with the recipe that it names, and export."""
    found = re.search(r"recipe '([^']+)'(?: and `--to ([\w-]+)`)?", message)
    assert found, message
    quantize(model, found[1], place / "again")
    done = export(place / "again", place / "out", found[2] or to)
    assert done.counts["dense"] == 0
    return done


def refused(source: Path, target: Path, to: str) -> str:
    with pytest.raises(ExportError) as caught:
        export(source, target, to)
    assert not target.exists()
    return str(caught.value)


@pytest.mark.parametrize("to", TARGETS)
def test_what_the_default_recipe_made_is_exported_or_refused_with_a_way_that_works(tmp_path, to):
    if to in NEEDS:
        pytest.importorskip(NEEDS[to])
    quantize(build("flux"), "default", tmp_path / "quantized")
    try:
        done = export(tmp_path / "quantized", tmp_path / "out", to)
    except LoraqError as error:
        assert to not in ("sdnq", "dense")
        follow(str(error), build("flux"), to, tmp_path)
    else:
        assert to in ("sdnq", "gguf", "onnx", "openvino", "dense")
        assert to == "dense" or done.dense_share == 0.0


#: What a target may not take: a model, a recipe, and what the refusal must say of it.
BAD = {
    "rotation": ("flux", "nvfp4-a4+bf16-r16-h32", "are rotated"),
    "ranks": (
        "flux",
        {
            "scheme": "int4-a16+bf16-r24",
            "rules": [
                {"match": "*norm*.linear", "skip": True},
                {"match": "*single*", "branch": {"rank": 8}},
            ],
        },
        "one rank for all layers, a multiple of 16, and there are 8, 24",
    ),
    "class": ("pixart", "int4_b32-a16+bf16-r16", "PixArtTransformer2DModel"),
    "format": ("flux", "fp8_e4m3-a16+bf16-r16", "of the quantized weights as floats"),
}
#: Who takes which of them.
TAKES = {
    "rotation": {"dense"},
    "ranks": {"sdnq", "gguf", "onnx", "openvino", "dense"},
    "class": {"sdnq", "onnx", "openvino", "dense"},
    "format": {"openvino", "dense"},
}


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_model_is_refused_before_writing_with_a_way_that_works(tmp_path, bad, to):
    if to in NEEDS:
        pytest.importorskip(NEEDS[to])
    name, recipe, reason = BAD[bad]
    asked = Recipe.from_dict({"scheme": recipe} if isinstance(recipe, str) else recipe)
    quantize(build(name), replace(asked, keep="float"), tmp_path / "quantized")
    if to in TAKES[bad]:
        export(tmp_path / "quantized", tmp_path / "out", to)
        return
    message = refused(tmp_path / "quantized", tmp_path / "out", to)
    about_format = "of the quantized weights as floats"  # the model is not for this target at all
    assert reason in message or (bad in ("ranks", "class") and about_format in message)
    follow(message, build(name), to, tmp_path)


def test_ranks_that_differ_have_a_recipe(tmp_path):
    table = {"scheme": "int4+bf16-r24", "rules": [{"match": "*.norm*.linear", "skip": True}]}
    quantize(build("flux"), Recipe.from_dict(table), tmp_path / "quantized")
    message = refused(tmp_path / "quantized", tmp_path / "out", "nunchaku-lite")
    assert "there are 24" in message
    follow(message, build("flux"), "nunchaku-lite", tmp_path)


def test_a_model_that_a_target_cannot_hold_has_another_target(tmp_path):
    def narrow() -> nn.Module:
        sizes = {"num_attention_heads": 6, "cross_attention_dim": 96, "num_layers": 1}
        return small_pixart(torch.float32, **sizes)

    quantize(narrow(), "int4+bf16-r16", tmp_path / "quantized")
    message = refused(tmp_path / "quantized", tmp_path / "out", "nunchaku-lite")
    assert "96×96 is not in multiples of 128×128" in message
    assert "use the recipe 'sdnq-b32' and `--to sdnq`" in message.lower()
    follow(message, narrow(), "nunchaku-lite", tmp_path)
