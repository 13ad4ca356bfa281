"""Finding, replacing and switching the linear layers of a module."""

import copy
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from benchmarks.worlds.matrices import gaussian
from loraq.checkpoint import load_into, save
from loraq.errors import KernelError, LayerError
from loraq.layers import (
    bare_model,
    is_linear,
    linear_layers,
    matrix_of,
    matrix_shapes,
    other_weights,
    quantized_class,
    quantized_layers,
    replace_layer,
    require_bare,
    set_backend,
)
from loraq.nn import QuantizedConv1x1, QuantizedLinear
from loraq.pipeline.module import quantize_, quantize_weight
from loraq.scheme import Scheme


class OwnLinear(nn.Linear):
    """A subclass may compute something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class NamedLinear(nn.Linear):
    """A subclass that computes the same is the same layer."""

    label = "a"


class Tower(nn.Module):
    """Linear layers in every kind of place, some of them in two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.steps = nn.Sequential(
            nn.Linear(8, 8), nn.SiLU(), nn.Sequential(nn.Linear(8, 8), self.first)
        )
        self.listed = nn.ModuleList([nn.Linear(8, 8), self.steps[0]])
        self.named = nn.ModuleDict({"a": nn.Linear(8, 8)})
        self.own = OwnLinear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.nothing = None


def quantized(bias: torch.Tensor | None = None) -> QuantizedLinear:
    return QuantizedLinear.from_packed(quantize_weight(gaussian(8, 8), "mxfp4").packed, bias)


def test_linear_layers_are_found_once_in_the_order_of_the_tree():
    tower = Tower()
    found = linear_layers(tower)
    assert list(found) == ["first", "steps.0", "steps.2.0", "listed.0", "named.a"]
    assert all(found[name] is tower.get_submodule(name) for name in found)


def test_subclasses_that_compute_something_else_are_left_out():
    assert not {"own", "attention.out_proj"} & set(linear_layers(Tower()))


def test_subclasses_that_compute_the_same_are_linear():
    computed = parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(NamedLinear(8, 8), computed)
    assert list(linear_layers(model)) == ["0", "1"]
    require_bare(model)


def test_hooks_go_over_to_the_new_layer_and_their_handles_still_remove_them():
    tower, seen = Tower(), []
    handles = [
        tower.steps[0].register_forward_hook(lambda *_: seen.append("after")),
        tower.steps[0].register_forward_pre_hook(
            lambda *_, **__: seen.append("before"), with_kwargs=True
        ),
    ]
    replace_layer(tower, "steps.0", quantized())
    tower.steps[0](torch.ones(1, 8))
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    tower.steps[0](torch.ones(1, 8))
    assert len(seen) == 2


def sharded() -> nn.Module:
    """Stands for FSDP: this child is what it is known by."""
    wrapper = nn.Module()
    wrapper._fsdp_wrapped_module = Tower()
    return wrapper


def adapted() -> nn.Module:
    """Stands for PEFT: this child is what it is known by."""
    layer = nn.Module()
    layer.base_layer = nn.Linear(8, 8)
    return layer


def patched() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


def foreign() -> nn.Linear:
    class Packed(nn.Parameter):
        pass

    layer = nn.Linear(8, 8)
    layer.weight = Packed(layer.weight.detach())
    return layer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's own compiler
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (adapted, "'0' carries an adapter"),
        (lambda: torch.compile(Tower()), r"'0' is compiled.*`module.compile\(\)`"),
        (sharded, r"'0' is sharded \(FSDP\)"),
        (patched, "Layer '0' runs a function that was put in place"),
        (lambda: prune.identity(nn.Linear(8, 8), "weight"), "layer '0' is not a parameter"),
        (foreign, "layer '0' is a Packed, not a plain tensor"),
    ],
)
def test_layers_that_are_a_part_of_something_else_are_refused_before_work(make, match):
    model = nn.Sequential(make(), nn.Linear(8, 8))
    for refuse in (require_bare, partial(quantize_, recipe="mxfp4", progress=False)):
        with pytest.raises(LayerError, match=match):
            refuse(model)
    assert not quantized_layers(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's own compiler
@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, AveragedModel, lambda m: torch.compile(AveragedModel(m))],
)
def test_a_wrapped_model_is_treated_and_saved_as_the_model_itself(wrap, tmp_path):
    torch.manual_seed(0)
    alone, wrapped = Tower(), Tower()
    wrapped.load_state_dict(alone.state_dict())
    wrapped = wrap(wrapped)
    for name, model in {"alone": alone, "wrapped": wrapped}.items():
        report = quantize_(model, "mxfp4", progress=False)
        assert [layer.name for layer in report.layers] == list(quantized_layers(alone))
        save(model, tmp_path / name)
        again = wrap(Tower())
        load_into(again, tmp_path / "alone")
        assert list(quantized_layers(bare_model(again))) == list(quantized_layers(alone))
    for file in ("model.safetensors", "loraq.json"):
        texts = [(tmp_path / name / file).read_bytes() for name in ("alone", "wrapped")]
        if file == "loraq.json":  # all but how long it took
            texts = [re.sub(rb'"seconds": [^,}]*', b"", text) for text in texts]
        assert texts[0] == texts[1]


def test_a_layer_that_is_the_whole_module_is_left_out_because_it_stands_in_no_place():
    assert linear_layers(nn.Linear(8, 8)) == {}
    assert list(linear_layers(nn.Sequential(nn.Linear(8, 8)))) == ["0"]


def test_quantized_layers_are_found_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"a": quantized()}))
    assert list(quantized_layers(model)) == ["1.a"]
    assert quantized_layers(Tower()) == {}


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("first", ["first", "again", "steps.2.1"]),
        ("again", ["first", "again", "steps.2.1"]),
        ("steps.2.1", ["first", "again", "steps.2.1"]),
        ("steps.0", ["steps.0", "listed.1"]),
        ("listed.0", ["listed.0"]),
        ("named.a", ["named.a"]),
    ],
)
def test_a_layer_is_replaced_at_every_place_where_it_stands(name, places):
    tower, new = Tower(), quantized()
    before = dict(tower.named_modules(remove_duplicate=False))
    replace_layer(tower, name, new)
    after = dict(tower.named_modules(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert {place for place in after if after[place] is new} == set(places)
    assert all(after[place] is before[place] for place in after if place not in places)


def test_the_order_of_the_modules_stays():
    tower = Tower()
    names = [name for name, _ in tower.named_modules(remove_duplicate=False)]
    replace_layer(tower, "first", quantized())
    assert [name for name, _ in tower.named_modules(remove_duplicate=False)] == names


@pytest.mark.parametrize("training", [True, False])
def test_the_new_layer_takes_over_the_mode(training):
    tower = Tower().train(training)
    replace_layer(tower, "steps.0", quantized())
    assert tower.steps[0].training is training


def test_a_name_that_does_not_exist_changes_nothing():
    tower = Tower()
    with pytest.raises(AttributeError, match="no attribute `7`"):
        replace_layer(tower, "steps.7", quantized())
    assert not quantized_layers(tower)


def test_the_back_end_is_switched_in_every_layer():
    model = nn.Sequential(quantized(), nn.Sequential(quantized(), nn.Linear(8, 8)))
    set_backend(model, "reference")
    assert [layer.backend for layer in quantized_layers(model).values()] == ["reference"] * 2
    set_backend(model[1], "resident")
    assert [layer.backend for layer in quantized_layers(model).values()] == [
        "reference",
        "resident",
    ]


def test_a_single_layer_can_be_switched_like_a_model():
    layer = quantized()
    set_backend(layer, "reference")
    assert layer.backend == "reference"


@pytest.mark.parametrize(
    "model", [nn.Sequential(quantized(), quantized()), nn.Linear(2, 2)], ids=["quantized", "plain"]
)
def test_an_unknown_back_end_is_refused_and_nothing_is_switched(model):
    with pytest.raises(KernelError, match=r"Unknown back end 'residend'\. Did you mean 'resident'"):
        set_backend(model, "residend")
    assert all(layer.backend == "low_memory" for layer in quantized_layers(model).values())


def test_a_model_runs_on_the_automatic_choice_where_the_asked_back_end_refuses(caplog):
    a8, a16 = (
        QuantizedLinear.from_packed(quantize_weight(gaussian(8, 64), n).packed)
        for n in ("int8-a8", "mxfp4-a16")
    )
    wide = gaussian(8, 512)
    wide[:, 0] = 40  # INT8 rows would lose too much, which only the values tell
    unfit = QuantizedLinear.from_packed(quantize_weight(wide, Scheme("mxint4", "int8")).packed)
    model = nn.ModuleList([a16, copy.deepcopy(a16), a8, unfit])
    set_backend(model, "int8_row")
    (record,) = caplog.records
    assert (record.levelname, record.name) == ("WARNING", "loraq.kernels")
    assert record.getMessage().startswith(
        "The back end 'int8_row' refuses 2 of 4 layers, which run on the automatic choice. The "
        "first one is 8×64: its activations are 'bf16'"
    )
    for layer in model[:3]:
        layer(gaussian(2, 64))
    assert len(caplog.records) == 1
    unfit(gaussian(2, 512))
    assert (
        "low_memory (not int8_row: INT8 rows change the weight in 'mxint4'"
        in caplog.records[1].getMessage()
    )
    assert [layer.backend for layer in model] == [
        "low_memory",
        "low_memory",
        "int8_row",
        "low_memory",
    ]


def test_a_back_end_that_refuses_every_layer_is_an_error_and_nothing_is_switched():
    model = nn.Sequential(quantized(), quantized())
    with pytest.raises(
        KernelError,
        match=r"'int8_row' cannot run any of the 2 quantized layers.*its activations are",
    ):
        set_backend(model, "int8_row")
    assert all(layer.backend == "low_memory" for layer in quantized_layers(model).values())


def test_a_replaced_layer_computes_in_place_of_the_old_one():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.SiLU()), gaussian(4, 8)
    new = quantized(torch.ones(8))
    expected = nn.functional.silu(new(x))
    replace_layer(model, "0", new)
    assert torch.equal(model(x), expected)


# --- 1×1 convolutions, and what is not linear -----------------------------------------------------


class OwnConv(nn.Conv2d):
    """A subclass may compute something else."""

    def _conv_forward(self, *args: torch.Tensor) -> torch.Tensor:
        return super()._conv_forward(*args) * 2


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_one_pixel_is_linear(bias):
    layer = nn.Conv2d(6, 8, 1, bias=bias)
    assert is_linear(layer)
    assert torch.equal(matrix_of(layer), layer.weight[:, :, 0, 0])
    assert matrix_of(layer).data_ptr() == layer.weight.data_ptr()
    assert quantized_class(layer) is QuantizedConv1x1


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3),
        nn.Conv2d(6, 8, (1, 3)),
        nn.Conv2d(6, 8, 1, stride=2),
        nn.Conv2d(6, 8, 1, padding=1),
        nn.Conv2d(6, 8, 1, groups=2),
        nn.Conv1d(6, 8, 1),
        nn.ConvTranspose2d(6, 8, 1),
        OwnConv(6, 8, 1),
        OwnLinear(6, 8),
        nn.Embedding(6, 8),
        nn.Bilinear(6, 6, 8),
    ],
    ids=str,
)
def test_other_layers_are_not_linear(layer):
    assert not is_linear(layer)
    model = nn.Sequential(nn.Linear(4, 6), layer)
    assert list(linear_layers(model)) == ["0"]
    assert other_weights(model) == {"1.weight": (tuple(layer.weight.shape), type(layer).__name__)}


def test_the_shapes_are_those_of_the_matrices():
    model = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3))
    assert matrix_shapes(model) == {"0": (6, 4), "1": (8, 6)}
    assert matrix_shapes(model.to("meta")) == {"0": (6, 4), "1": (8, 6)}


def test_experts_that_are_stacked_in_one_tensor_are_other_weights():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(4, 8, 8))
            self.scale = nn.Parameter(torch.zeros(8))

    assert other_weights(nn.ModuleDict({"moe": Experts(), "to_q": nn.Linear(8, 8)})) == {
        "moe.up": ((4, 8, 8), "Experts")
    }


def test_packed_bytes_are_no_other_weights():
    assert other_weights(nn.Sequential(quantized(torch.ones(8)))) == {}


def test_a_quantized_layer_keeps_its_class():
    assert quantized_class(nn.Linear(8, 8)) is quantized_class(quantized()) is QuantizedLinear
    conv = QuantizedConv1x1.from_packed(quantize_weight(gaussian(8, 8), "mxfp4").packed)
    assert quantized_class(conv) is QuantizedConv1x1
