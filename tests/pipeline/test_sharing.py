"""One budget for all layers, in memory and from files: the same
plan everywhere, and never a byte more.
"""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import loraq
from benchmarks.worlds.matrices import dit_like, gaussian
from loraq.errors import CheckpointError, LayerError, RecipeError, SchemeError
from loraq.integrations.checkpoints import plan_checkpoint
from loraq.pipeline.module import plan_model
from loraq.pipeline.plan import Plan
from loraq.recipe import Recipe
from loraq.rules import Rule
from loraq.safetensors.layout import write_shards
from loraq.scheme import Branch, Scheme
from tests.folders import files_of

GREEDY = Recipe(
    Scheme("mxfp4", branch=Branch(0, "mxint8")), budget="r16=4", method="lqer", allocation="greedy"
)
UNIFORM = replace(GREEDY, allocation="uniform")


def net() -> nn.Module:
    """Layers that differ in size and in how fast their singular values fall."""
    torch.manual_seed(0)  # biases
    model = nn.Sequential(
        nn.Linear(64, 96), nn.Linear(96, 96), nn.Linear(96, 192, bias=False), nn.Linear(192, 64)
    )
    kinds = (dit_like, gaussian, dit_like, gaussian)
    for i, (layer, kind) in enumerate(zip(model, kinds, strict=True)):
        layer.weight.data = kind(*layer.weight.shape, seed=i) * 0.02
    return model


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    write_shards(net().state_dict(), folder, "model")
    return folder


def ranks(plan: Plan) -> list[int]:
    return [job.scheme.branch.rank for job in plan.quantized if job.scheme.branch]


def quantize(
    source: Path, target: Path, recipe: Recipe = GREEDY, **options
) -> loraq.pipeline.module.Report:
    return loraq.quantize_checkpoint(source, target, recipe, **{"progress": False, **options})


@pytest.mark.parametrize("method", ["loraq", "svdquant", "lqer"])
@pytest.mark.parametrize("budget", ["r16=2", "r16=8", "5.5", "7"])
def test_the_layers_store_no_more_than_they_would_alone(method, budget):
    recipe = replace(GREEDY, method=method, budget=budget)
    uniform = plan_model(net(), replace(recipe, allocation="uniform"))
    shared = plan_model(net(), recipe, progress=False)
    assert shared.nbytes <= uniform.nbytes
    assert shared.nbytes > 0.98 * uniform.nbytes
    assert ranks(shared) != ranks(uniform)
    assert all(0 < layer.scheme.branch.rank <= min(layer.shape) for layer in shared.quantized)


def test_the_summed_squared_error_falls():
    """LQER is the truncated SVD of the rounding error: its
    prediction is all but exact, so this must hold.
    """
    total = {}
    for recipe in (UNIFORM, GREEDY):
        model = net()
        report = loraq.quantize_(model, recipe, progress=False)
        energies = [layer.weight.square().sum().item() for layer in net()]
        total[recipe.allocation] = sum(
            e * n.relative_error**2 for e, n in zip(energies, report.layers, strict=True)
        )
    assert total["greedy"] < 0.99 * total["uniform"]


def test_without_it_nothing_changes(tmp_path, source):
    quantize(source, tmp_path / "asked", UNIFORM)
    quantize(
        source, tmp_path / "default", Recipe(UNIFORM.scheme, budget=UNIFORM.budget, method="lqer")
    )
    assert files_of(tmp_path / "asked") == files_of(tmp_path / "default")
    assert plan_model(net(), UNIFORM) == Plan.of_model(net(), UNIFORM)


def test_ranks_that_are_given_stay_and_their_bytes_are_not_shared():
    recipe = replace(GREEDY, rules=(Rule("2", branch={"rank": 3}), Rule("3", skip=True)))
    plan = plan_model(net(), recipe, progress=False)
    assert ranks(plan)[2:] == [3]
    assert ranks(plan)[:2] != ranks(plan_model(net(), replace(recipe, allocation="uniform")))[:2]


def test_memory_files_and_workers_agree(tmp_path, source):
    plan = plan_model(net(), GREEDY, progress=False)
    assert plan_model(net(), GREEDY, workers=3, progress=False) == plan
    assert ranks(plan_checkpoint(source, GREEDY, progress=False)) == ranks(plan)
    report = quantize(source, tmp_path / "streamed")
    assert report.plan.nbytes == plan.nbytes
    model = net()
    assert loraq.quantize_(model, GREEDY, workers=2, progress=False).plan == plan
    loraq.save(model, tmp_path / "saved")
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "saved")


@pytest.mark.slow
def test_processes_agree(tmp_path, source):
    quantize(source, tmp_path / "one")
    quantize(source, tmp_path / "two", workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_an_interrupted_run_reaches_the_same_plan(tmp_path, source):
    quantize(source, tmp_path / "whole")

    def interrupt(*event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="1 of 4 layers are kept"):
        quantize(source, tmp_path / "out", progress=interrupt)
    assert quantize(source, tmp_path / "out").kept == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_the_pass_over_the_weights_is_on_show(capsys):
    plan_model(net(), GREEDY)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"allocate: layer {i} of 4" for i in (1, 2, 3, 4)
    ]
    called: list[tuple] = []
    loraq.quantize_(net(), GREEDY, progress=lambda *event: called.append(event))
    assert [event[:2] for event in called] == [(i, 4) for i in (1, 2, 3, 4)]
    assert not capsys.readouterr().err


def test_what_cannot_be_shared_is_an_error_before_any_work(tmp_path, source):
    with pytest.raises(
        RecipeError,
        match=r"'greedy' shares bytes among layers .* there are none: all ranks are fixed",
    ):
        plan_model(net(), replace(GREEDY, scheme=Scheme("mxfp4", branch=Branch(4, "mxint8"))))
    with pytest.raises(RecipeError, match="no layer has a branch"):
        plan_model(net(), replace(GREEDY, method="rtn"))
    with pytest.raises(RecipeError, match=r"allocation 'best'.*greedy, uniform"):
        replace(GREEDY, allocation="best")
    with pytest.raises(
        SchemeError, match=r"Layer '0': A budget of 4\.3 .* it takes 4\.\d\d bits per weight"
    ):
        plan_model(net(), replace(GREEDY, budget="4.3"))
    with pytest.raises(LayerError, match="meta device"):
        plan_model(net().to("meta"), GREEDY)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        quantize(source, tmp_path / "out", progress=pytest.fail)


def test_a_model_that_is_quantized_in_part_is_refused():
    model = net()
    loraq.quantize_(model, replace(UNIFORM, rules=(Rule("[23]", skip=True),)), progress=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RecipeError,
        match=r"2 layers of Sequential are quantized already.*Start from the float model",
    ):
        loraq.quantize_(model, GREEDY, progress=False)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )


def test_a_number_that_is_not_finite_names_its_layer(tmp_path):
    state = net().state_dict()
    state["1.weight"][3, 4] = torch.nan
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(LayerError, match=r"Layer '1' failed: .*nan"):
        quantize(tmp_path / "bad.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_keeps_its_allocation():
    assert Recipe.from_dict(GREEDY.to_dict()) == GREEDY
    assert Recipe.from_dict({"scheme": "mxfp4+w8a8"}).allocation == "uniform"
