"""Mixtures of experts of diffusers and transformers: quantized, run, saved, loaded."""

import copy
import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import loraq
from loraq.errors import CalibrationError, CheckpointError, LayerError
from loraq.experts import QuantizedExperts
from loraq.layers import find_stacks, quantized_layers
from loraq.nn import QuantizedLinear
from loraq.pipeline.module import plan_model

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from small.models import run, small_model  # noqa: E402

RECIPE = loraq.Recipe.from_dict({"scheme": "mxfp4+w8a8-r4", "method": "lqer"})
EXACT = loraq.Recipe.from_dict(
    {"scheme": {"weight": "int8", "activation": "int8"}, "method": "rtn", "keep": "float"}
)
#: What files are made of: one linear layer, and the experts.
ONLY = [
    {"match": "*experts*|*.0.attn.to_q", "skip": False},
    {"match": "*", "skip": True},
]
FEW = loraq.Recipe.from_dict({**RECIPE.to_dict(), "rules": ONLY})
IDS = torch.arange(12)[None]
WIDTH, INNER, EXPERTS = 64, 32, 4
SIZES = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
}


@cache
def _qwen() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **SIZES, intermediate_size=WIDTH, moe_intermediate_size=INNER, num_experts=EXPERTS
    )
    return randomized(transformers.Qwen3MoeModel(config))


@cache
def _gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(**SIZES, intermediate_size=INNER, num_local_experts=EXPERTS)
    return randomized(transformers.GptOssModel(config))


@cache
def _llama4() -> nn.Module:
    config = transformers.Llama4TextConfig(
        **SIZES,
        intermediate_size=INNER,
        intermediate_size_mlp=WIDTH,
        num_local_experts=EXPERTS,
        pad_token_id=0,
    )
    return randomized(transformers.Llama4TextModel(config))


@cache
def _nucleus() -> nn.Module:
    return small_model(diffusers.NucleusMoEImageTransformer2DModel)


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter.data, std=0.05)
    return model.eval()


def answers(model: nn.Module) -> list[Tensor]:
    if hasattr(model, "register_to_config"):
        return run(model)
    with torch.no_grad():
        return [model(IDS).last_hidden_state]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Nucleus": _nucleus,
    "Qwen3Moe": _qwen,
    "GptOss": _gpt_oss,
    "Llama4": _llama4,
}
each_model = pytest.mark.parametrize("name", MODELS)


def built(name: str) -> nn.Module:
    return copy.deepcopy(MODELS[name]())


def quantized(name: str, recipe: loraq.Recipe = RECIPE) -> nn.Module:
    model = built(name)
    loraq.quantize_(model, recipe, progress=False)
    return model


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))


@each_model
def test_it_is_saved_loaded_and_the_same(name, tmp_path):
    exact, model = answers(built(name)), quantized(name)
    stacks = [s for s in quantized_layers(model).values() if isinstance(s, QuantizedExperts)]
    assert len(stacks) == len(find_stacks(built(name))) > 0
    outputs = answers(model)
    assert not all_equal(outputs, exact)
    loraq.save(model, tmp_path / "saved")
    loaded = built(name)
    loraq.load_into(loaded, tmp_path / "saved")
    assert all_equal(answers(loaded), outputs)
    loraq.load_into(loaded, tmp_path / "saved")  # in place of quantized ones
    loraq.save(loaded, tmp_path / "again")
    for file in (tmp_path / "saved").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@each_model
def test_eight_bits_are_close_to_floats(name):
    exact, outputs = answers(built(name)), answers(quantized(name, EXACT))
    for x, y in zip(exact, outputs, strict=True):
        assert (x - y).norm() / x.norm() < 0.03


@each_model
def test_every_expert_is_what_it_would_be_alone(name):
    model, floats = quantized(name), built(name)
    for stack_name, stack in find_stacks(floats).items():
        layer = model.get_submodule(stack_name)
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
        for e, weight in enumerate(floats.get_parameter(stack_name).detach()):
            matrix = weight.t().contiguous() if stack.transposed else weight
            recipe = replace(loraq.Recipe.of(RECIPE), scheme=layer.scheme)
            alone = loraq.quantize_weight(matrix, recipe, name=f"{stack_name}.{e}").packed
            product = x @ (layer[e] if stack.transposed else layer[e].t())
            assert torch.equal(product, QuantizedLinear.from_packed(alone)(x))


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_every_implementation_of_transformers_runs_the_same_experts(name):
    model = quantized(name)
    outputs = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        outputs += answers(model)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert torch.allclose(outputs[0], outputs[2], atol=1e-5)


def test_nucleus_runs_grouped_products_too():
    model = quantized("Nucleus")
    outputs = answers(model)
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.use_grouped_mm = True
    for x, y in zip(outputs, answers(model), strict=True):
        assert torch.allclose(x, y, atol=1e-4)


@each_model
def test_it_becomes_floats_again(name):
    model = quantized(name)
    stack = next(n for n, s in quantized_layers(model).items() if isinstance(s, QuantizedExperts))
    weight = model.get_submodule(stack).weight.clone()
    assert torch.equal(model.state_dict()[stack].clone(), weight)
    loraq.dequantize_(model)
    assert torch.equal(model.get_parameter(stack), weight)
    assert model.state_dict().keys() == built(name).state_dict().keys()
    assert model.num_parameters() == built(name).num_parameters()
    answers(model)


def test_parameters_are_counted_as_those_of_floats():
    assert quantized("Nucleus").num_parameters() == built("Nucleus").num_parameters()


def test_a_copy_is_quantized_and_the_model_stays():
    model = built("Qwen3Moe")
    exact = answers(model)
    copied = loraq.quantize(model, RECIPE, progress=False)
    assert all_equal(answers(copied), answers(quantized("Qwen3Moe")))
    assert all_equal(answers(model), exact)
    assert not quantized_layers(model)


def test_precision_of_activations_reaches_the_experts():
    model = quantized("Qwen3Moe", FEW)
    rounded = copy.deepcopy(model)
    loraq.set_activations(rounded, "stored", simulate=True)
    assert not all_equal(answers(rounded), answers(model))


def test_the_hooks_of_an_owner_stay():
    model, seen = built("Qwen3Moe"), []
    model.layers[0].mlp.experts.register_forward_hook(lambda *_: seen.append(1))
    loraq.quantize_(model, FEW, progress=False)
    answers(model)
    assert seen


def test_a_state_goes_to_quantized_stacks_only():
    recipe = FEW  # of which this model has the experts alone
    model = quantized("Qwen3Moe", recipe)
    assert {type(layer) for layer in quantized_layers(model).values()} == {QuantizedExperts}
    state, outputs = model.state_dict(), answers(model)
    other = quantized("Qwen3Moe", recipe)
    for parameter in other.parameters():
        parameter.data.zero_()
    for layer in quantized_layers(other).values():
        layer.invalidate()
    other.load_state_dict(state)
    assert all_equal(answers(other), outputs)
    for _ in range(2):
        with pytest.raises(LayerError, match="in quantized form"):
            built("Qwen3Moe").load_state_dict(state, strict=False)


def test_rules_and_the_plan_know_stacks():
    plan = plan_model(_nucleus(), RECIPE)
    stacks = {layer.name: layer for layer in plan.quantized if layer.is_stack}
    assert {name.rpartition(".")[2] for name in stacks} == {"gate_up_proj", "down_proj"}
    assert not any("Experts" in other.reason for other in plan.others)
    for layer in stacks.values():
        assert layer.shape[0] == EXPERTS
        assert layer.nbytes == EXPERTS * layer.scheme.nbytes(layer.matrix)
    rules = [{"match": "*experts.down_proj", "skip": True, "reason": "wanted"}]
    skipped = plan_model(_nucleus(), loraq.Recipe.from_dict({**RECIPE.to_dict(), "rules": rules}))
    kept = {layer.name: layer for layer in skipped.kept if layer.reason == "wanted"}
    assert set(kept) == {name for name in stacks if name.endswith("down_proj")}


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nucleus") / "float"
    _nucleus().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
def test_files_become_what_the_model_becomes(source, allocation, tmp_path):
    recipe = loraq.Recipe.from_dict(
        {
            "scheme": "mxfp4+w8a8",
            "method": "lqer",
            "budget": "8",
            "allocation": allocation,
            "rules": ONLY,
        }
    )
    report = loraq.quantize_checkpoint(source, tmp_path / "files", recipe, progress=False)
    assert any(len(layer.shape) == 3 for layer in report.layers)
    loraq.save(quantized("Nucleus", recipe), tmp_path / "memory")
    for file in (tmp_path / "memory").iterdir():
        assert file.read_bytes() == (tmp_path / "files" / file.name).read_bytes()
    again = loraq.quantize_checkpoint(source, tmp_path / "files", recipe, progress=False)
    assert again.already_complete


def test_every_way_to_load_gives_the_same_model(source, tmp_path):
    loraq.quantize_checkpoint(source, tmp_path / "out", FEW, progress=False)
    outputs, kind = answers(quantized("Nucleus", FEW)), type(_nucleus())
    assert all_equal(answers(loraq.load(tmp_path / "out")), outputs)
    plugin = importlib.import_module("loraq.diffusers")  # registers the quantizer
    loaded = kind.from_pretrained(tmp_path / "out")
    assert all_equal(answers(loaded), outputs)
    config = plugin.LoraqConfig(FEW)
    now = kind.from_pretrained(source, quantization_config=config)
    assert all_equal(answers(now), outputs)
    now.save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "saved" / file.name).read_bytes()


def test_a_run_that_stopped_goes_on(source, tmp_path):
    whole = loraq.quantize_checkpoint(source, tmp_path / "whole", FEW, progress=False)

    def stop(done: int, *_: object) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loraq.quantize_checkpoint(source, tmp_path / "out", FEW, progress=stop)
    report = loraq.quantize_checkpoint(source, tmp_path / "out", FEW, progress=False)
    assert report.kept == 3
    assert len(report.layers) == len(whole.layers)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_it_is_inspected_and_compared(source, tmp_path):
    from click.testing import CliRunner

    from loraq.cli import main

    def command(*arguments: object) -> dict:
        finished = CliRunner().invoke(main, [*map(str, arguments), "--json"])
        assert finished.exit_code == 0, finished.output
        return json.loads(finished.stdout)

    loraq.quantize_checkpoint(source, tmp_path / "out", FEW, progress=False)
    layers = command("inspect", tmp_path / "out")["layers"]
    name = next(name for name in layers if name.endswith("gate_up_proj"))
    assert layers[name]["shape"] == [EXPERTS, 32, 32]
    compared = {d["name"]: d for d in command("compare", source, tmp_path / "out")["layers"]}
    # The record has the mean of the experts' squares, which differ little.
    assert compared[name]["relative_error"] == pytest.approx(
        layers[name]["relative_error"], rel=0.02
    )
    memory = command("inspect", tmp_path / "out", "--memory")["memory"]
    kept = {each["backend"]: each for each in memory}
    assert kept["reference"]["kept"] == 0
    assert kept["resident"]["kept"] > sum(2 * layer["nbytes"] for layer in layers.values())
    assert all(each["refused"] <= len(layers) for each in memory)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_names_its_expert(bad, tmp_path):
    model = built("Nucleus")
    name = next(iter(find_stacks(model)))
    with torch.no_grad():
        model.get_parameter(name)[2, 1, 3] = bad
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(LayerError, match=rf"'{name}\.2' cannot be quantized"):
        loraq.quantize_(model, FEW, progress=False)
    with pytest.raises(CheckpointError, match=rf"'{name}', expert 2, cannot be used"):
        loraq.quantize_checkpoint(tmp_path / "float", tmp_path / "out", FEW, progress=False)


def test_statistics_of_experts_are_refused_where_a_method_needs_them():
    gptq = loraq.Recipe.from_dict({"scheme": "int4", "method": "gptq"})
    with pytest.raises(CalibrationError, match="stacked experts are not counted"):
        loraq.quantize_(built("Qwen3Moe"), gptq, progress=False)


# --- wrong folders --------------------------------------------------------------------------------


def edited(folder: Path, change: Callable[[dict], object]) -> Path:
    file = folder / "loraq.json"
    content = json.loads(file.read_text())
    for name, layer in content["layers"].items():
        if name.endswith("gate_up_proj"):
            change(layer)
    file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda layer: layer.update(shape=[2, *layer["shape"][1:]]), "stack of experts of shape"),
        (lambda layer: layer.update(shape=layer["shape"][1:]), "linear layer of shape"),
        (lambda layer: layer.update(shape=[1, *layer["shape"]]), "has the shape"),
        (lambda layer: layer.update(transposed=True), "stack of experts of shape"),
        (lambda layer: layer.update(transposed=1), "'transposed' of layer"),
        (lambda layer: layer.pop("transposed"), "'transposed' of layer"),
    ],
)
def test_a_manifest_of_other_experts_is_refused(change, complaint, tmp_path):
    loraq.save(quantized("Qwen3Moe"), tmp_path / "saved")
    model = built("Qwen3Moe")
    with pytest.raises(CheckpointError, match=complaint):
        loraq.load_into(model, edited(tmp_path / "saved", change))
    assert not quantized_layers(model)


def test_a_model_without_these_experts_is_refused(tmp_path):
    loraq.save(quantized("Qwen3Moe"), tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"experts|fit"):
        loraq.load_into(built("GptOss"), tmp_path / "saved")


def test_offloaded_experts_run(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = quantized("Qwen3Moe")
    outputs = answers(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all_equal(answers(model), outputs)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_a_compiled_model_gives_the_same(implementation):
    model = quantized("Qwen3Moe", FEW)
    model.set_experts_implementation(implementation)
    outputs = answers(model)
    assert all_equal(answers(torch.compile(model, backend="aot_eager")), outputs)
