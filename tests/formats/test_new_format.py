"""A new format is one entry of `FORMATS`: names of recipes,
scale rules and solvers follow from it.
"""

import re
from dataclasses import replace

import pytest
import torch

import loraq
from benchmarks.worlds.matrices import dit_like, gaussian
from loraq.errors import RecipeError
from loraq.formats import FORMATS, BlockFormat, ElementFormat, ScaleFit, ScaleRule
from loraq.formats.element import integer
from loraq.formats.scale_rules import rule_names
from loraq.formats.scales import BF16_SCALE, E4M3_SCALE, E8M0_SCALE
from loraq.recipe import Recipe
from loraq.recipe_names import parse_scheme

#: Signs and powers of two from 2^-2 to 2^4: no named format has this element.
E3M0 = ElementFormat("e3m0", bits=4, exponent_bits=3, mantissa_bits=0, max=16.0)
TOYS = {
    "toy": BlockFormat(
        "toy",
        integer(5),
        BF16_SCALE,
        24,
        fit=ScaleFit(0.95, factors=(0.9, 0.8), least_squares=2),
        activations={4: "toy4", 8: "int8"},
    ),
    "toy4": BlockFormat(
        "toy4",
        E3M0,
        E8M0_SCALE,
        16,
        fit=ScaleFit(1.3),
        activations={4: "toy4", 8: "mxint8"},
        rotation=16,
    ),
    "toynv": BlockFormat("toynv", E3M0, E4M3_SCALE, 16),
}
each_toy = pytest.mark.parametrize("name", TOYS)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    for name, fmt in TOYS.items():
        monkeypatch.setitem(FORMATS, name, fmt)


def test_a_recipe_s_name_gives_it_its_own_activations_and_rotation():
    eight = parse_scheme("toy-a8+w8a8")
    assert (eight.weight, eight.activation, eight.rotation) == ("toy", "int8", 0)
    assert eight.branch == parse_scheme("mxfp4-a8+w8a8").branch
    four = parse_scheme("toy4+w8a8")
    assert (four.weight, four.activation, four.rotation) == ("toy4", "toy4", 16)
    assert parse_scheme("toy-a4+w8a8") == replace(four, weight="toy")
    assert parse_scheme("toy4+bf16").rotation == 0
    assert parse_scheme("toy4-a8").activation == "mxint8"
    assert parse_scheme("mxfp4-atoy4").activation == "toy4"
    assert parse_scheme("mxfp4+toy").branch.weight == "toy"


@pytest.mark.parametrize(
    ("name", "bits"), [("toynv", 4), ("toynv-a8+w8a8", 8), ("toynv-a4+toy-r3", 4)]
)
def test_a_main_format_without_default_activations_says_what_to_write(name, bits):
    message = (
        rf"Recipe name '{name}': 'toynv' has no default activations of {bits} bits\. Name their "
        r"format, as in 'toynv-amxint8', or write 'toynv-a16'"
    )
    with pytest.raises(RecipeError, match=re.sub(r"\+", r"\\+", message)):
        Recipe.of(name)
    assert parse_scheme("toynv-amxint8").activation == "mxint8"
    assert parse_scheme("toynv-a16").activation == "bf16"


@each_toy
def test_every_scale_rule_rounds_to_what_is_stored(name):
    fmt = FORMATS[name]
    x = dit_like(20, 72)
    errors = {}
    for variant in (fmt, fmt.for_rows()):
        for rule in rule_names(fmt.scale_format):
            rounded, q = variant.round(x, rule), variant.quantize(x, rule)
            assert torch.equal(rounded, q.dequantize())
            assert q.nbytes == variant.nbytes(x.shape)
            errors[rule] = (rounded - x).norm() / x.norm()
    assert max(errors.values()) < 0.4
    assert errors["search"] <= min(errors.values()) * (1 + 1e-6)


def test_the_fitted_numbers_are_its_own():
    assert TOYS["toy"].scale_rule("fitted") == ScaleRule("fitted", (0.9, 0.8), 2, signed=True)
    assert TOYS["toy"].scale_rule("constant") == ScaleRule("constant", (0.95,), signed=True)
    assert TOYS["toy4"].scale_rule("fitted") == ScaleRule("fitted", (1.3,))
    assert TOYS["toynv"].scale_rule("fitted") == ScaleRule("fitted")


@pytest.mark.parametrize("name", ["toy-a8+w8a8-r4", "toy4+w8a8-r4", "toynv-a16+toy-r4"])
def test_a_weight_is_quantized_and_the_layer_runs(name):
    weight, x = gaussian(48, 64), gaussian(5, 64, seed=1)
    layer = torch.nn.Linear(64, 48, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    expected = layer(x)
    recipe = replace(Recipe.of(name), options={"steps": 3, "refine_steps": 2})
    solution = loraq.quantize_weight(weight, recipe)
    plain = FORMATS[solution.packed.scheme.weight].round(weight, "search")
    assert solution.relative_error < (plain - weight).norm() / weight.norm()
    model = torch.nn.Sequential(layer)
    loraq.quantize_(model, recipe, progress=False)
    assert (model(x) - expected).norm() < 0.4 * expected.norm()
