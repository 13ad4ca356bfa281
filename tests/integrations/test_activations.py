"""Precision of activations at run time: a whole model, and step by step of a pipeline."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import loraq
from loraq.errors import KernelError, LoraqError
from loraq.evaluation.digits import load_transformer
from loraq.layers import quantized_layers
from loraq.linalg import relative_error

RECIPE = loraq.Recipe.named("mxfp4+w8a8-r16")


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    model = load_transformer()
    loraq.quantize_(
        model, loraq.Recipe(RECIPE.scheme, method="svdquant", keep="float"), progress=False
    )
    return model


def asked(model: nn.Module) -> dict[str, str]:
    return {name: layer.activations for name, layer in quantized_layers(model).items()}


def test_the_same_bytes_run_more_and_less_precisely(quantized):
    model = copy.deepcopy(quantized)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = next(layer for layer in quantized_layers(model).values() if layer.scheme.branch)
    x = torch.randn(50, layer.in_features, generator=torch.Generator().manual_seed(0))
    exact = x @ layer.reconstruct().T + layer.bias
    errors = {}
    for precision in ("a4", "a8", "a16", "stored"):
        loraq.set_activations(model, precision, simulate=True)
        errors[precision] = relative_error(exact, layer(x))
    assert errors["a16"] < 1e-5 < errors["a8"] < errors["a4"] / 4
    assert errors["stored"] == errors["a4"]
    loraq.set_activations(model, "a4")  # gains nothing on a CPU
    assert relative_error(exact, layer(x)) < 1e-5
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_a_weight_only_layer_beside_others_stays_in_16_bits(quantized):
    model = copy.deepcopy(quantized)
    first = next(iter(quantized_layers(model)))
    layer = model.get_submodule(first)
    layer.scheme = loraq.Scheme(layer.scheme.weight, "bf16", layer.scheme.weight_only().branch)
    loraq.set_activations(model, "a4", simulate=True)
    assert asked(model) == {name: "a16" if name == first else "a4" for name in asked(model)}


def test_layers_that_a_class_keeps_stay_in_16_bits():
    """They are weight-only in a model of which all other layers are that too, by the recipe."""
    model = load_transformer()
    recipe = loraq.Recipe(loraq.Scheme("int4"), method="rtn")
    loraq.quantize_(model, recipe, progress=False)
    kept = {name for name, layer in quantized_layers(model).items() if layer.record.get("kept")}
    loraq.set_activations(model, "a4")
    assert kept
    assert {name for name, precision in asked(model).items() if precision == "a16"} == kept
    before = asked(model)
    with pytest.raises(KernelError, match="Unknown precision of activations 'a5'"):
        loraq.set_activations(model, "a5")
    assert asked(model) == before


def test_an_unknown_precision_switches_no_layer(quantized):
    model = copy.deepcopy(quantized)
    layer = next(iter(quantized_layers(model).values()))
    layer.scheme = loraq.Scheme(layer.scheme.weight, "bf16", layer.scheme.weight_only().branch)
    with pytest.raises(KernelError, match="Unknown precision of activations 'a5'"):
        loraq.set_activations(model, "a5")
    assert set(asked(model).values()) == {"stored"}


def test_an_unknown_precision_changes_nothing(quantized):
    with pytest.raises(KernelError, match="Unknown precision of activations 'a5'"):
        loraq.set_activations(quantized, "a5")
    assert set(asked(quantized).values()) == {"stored"}
    with pytest.raises(LoraqError, match="Linear has no quantized layer"):
        loraq.set_activations(nn.Linear(2, 2), "a8")


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (1, 1, ["a16", "a8", "a8", "a8", "a16"]),
        (2, 0, ["a16", "a16", "a8", "a8", "a8"]),
        (0, 2, ["a8", "a8", "a8", "a16", "a16"]),
        (3, 4, ["a16"] * 5),
    ],
)
def test_a_schedule_switches_between_the_steps(quantized, first, last, expected):
    model = copy.deepcopy(quantized)
    pipeline = SimpleNamespace(components={"transformer": model, "vae": None}, num_timesteps=5)
    callback = loraq.ActivationSchedule(pipeline, "a8", first=first, last=last)
    for _ in range(2):  # the second image begins as the first
        seen = []
        for step in range(5):
            seen.append(set(asked(model).values()))
            given = {"latents": step}
            assert callback(pipeline, step, None, given) is given
        assert seen == [{precision} for precision in expected]


def test_a_schedule_without_a_quantized_model_is_refused():
    pipeline = SimpleNamespace(components={"transformer": nn.Linear(2, 2)}, num_timesteps=5)
    with pytest.raises(LoraqError, match="holds no quantized model"):
        loraq.ActivationSchedule(pipeline)


def test_an_unknown_precision_of_a_schedule_is_refused_before_the_first_step(quantized):
    pipeline = SimpleNamespace(components={"transformer": quantized}, num_timesteps=5)
    with pytest.raises(KernelError, match="Unknown precision"):
        loraq.ActivationSchedule(pipeline, "a3")
