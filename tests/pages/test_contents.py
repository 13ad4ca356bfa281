"""What a report says is what is in the folder, and what its recipe plans."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import loraq
from loraq.errors import CheckpointError
from loraq.pages.contents import Model, group_kinds, read_models, split_depth
from loraq.pages.report import draw_report, page_beside, summarize, write_report
from loraq.recipe import Recipe

RECIPE = "mxfp4-a16+w8a8-r4"
HOSTILE = "<img src=x onerror=alert(1)>"


def plain(folder: Path, *names: str, recipe: str = RECIPE) -> Path:
    """Save a quantized model without a configuration."""
    torch.manual_seed(0)
    model = nn.Module()
    for name in names:
        model.add_module(name, nn.Linear(64, 64, bias=False))
    options = replace(Recipe.named(recipe), effort="fast")
    loraq.quantize_(model, options, progress=False)
    loraq.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A quantized PixArt, alone and twice in a pipeline, with its report."""
    pytest.importorskip("diffusers")
    from small.pixart import small_pixart

    place = tmp_path_factory.mktemp("small")
    model = small_pixart(torch.float32, num_layers=1)
    model.save_pretrained(place / "float")
    for name in ("transformer", "transformer_2"):
        model.save_pretrained(place / "pipeline" / name)
    index = {
        name: ["diffusers", "PixArtTransformer2DModel"] for name in ("transformer", "transformer_2")
    }
    (place / "pipeline" / "model_index.json").write_text(json.dumps(index))
    recipe = replace(Recipe.named(RECIPE), method="svdquant")
    for name in ("float", "pipeline"):
        loraq.quantize_checkpoint(place / name, place / f"{name}-q", recipe, progress=False)
    return place


@pytest.mark.parametrize(
    ("name", "kind", "depth"),
    [
        ("transformer_blocks.11.ff.net.0.proj", "transformer_blocks.*.ff.net.0.proj", 11),
        ("proj_out", "proj_out", 0),
        ("0", "0", 0),
        ("a.1234567.b", "a.1234567.b", 0),  # the number of no block
    ],
)
def test_the_first_number_of_a_name_is_the_depth(name, kind, depth):
    assert split_depth(name) == (kind, depth)


def test_layers_of_a_kind_stand_in_the_order_of_the_blocks():
    kinds = group_kinds(["a.10.x", "b", "a.2.x"])
    assert [(kind.name, list(kind.layers.values())) for kind in kinds] == [
        ("a.*.x", ["a.2.x", "a.10.x"]),
        ("b", ["b"]),
    ]


def test_the_parts_sum_up_to_the_bytes_of_the_model(small):
    (model,) = read_models(small / "float-q")
    parts = dict(model.split_bytes())
    assert sum(parts.values()) == model.nbytes
    assert all(parts.values())
    planned = sum(job.nbytes for job in model.plan.quantized)
    assert planned == model.nbytes - parts["not quantized"]


def test_what_was_kept_is_said_with_its_reason(small):
    (model,) = read_models(small / "float-q")
    kept = model.kept()
    assert {each.stored for each in kept} == {"8 bits", "16 bits"}
    assert all(each.reason for each in kept)
    assert sum(each.n_layers for each in kept) + len(model.made) == len(model.plan.layers)
    page = draw_report("x", [model])
    assert all(each.reason in page for each in kept)


def test_the_worst_layers_come_first_and_errors_are_those_of_the_manifest(small):
    (model,) = read_models(small / "float-q")
    worst = model.worst(3)
    errors = {name: layer.record["relative_error"] for name, layer in model.made.items()}
    assert [errors[name] for name in worst] == sorted(errors.values(), reverse=True)[:3]
    assert model.mean_error == pytest.approx(sum(errors.values()) / len(errors))


def test_a_result_that_follows_its_plan(small):
    (model,) = read_models(small / "float-q")
    assert model.differences() == []
    assert "Every layer is stored as its recipe plans it" in draw_report("x", [model])


def test_ranks_that_were_moved_are_named(small):
    (model,) = read_models(small / "float-q")
    name = next(iter(model.made))
    layer = model.manifest.layers[name]
    branch = replace(layer.scheme.branch, rank=2)
    layers = dict(model.manifest.layers)
    layers[name] = replace(layer, scheme=replace(layer.scheme, branch=branch))
    moved = replace(model, manifest=replace(model.manifest, layers=layers))
    (difference,) = moved.differences()
    assert difference.name == name
    assert ("rank 4" in difference.planned, "rank 2" in difference.stored) == (True, True)
    assert "1 layers are stored otherwise" in draw_report("x", [moved])


def test_a_pipeline_has_a_section_for_each_model(small):
    models = read_models(small / "pipeline-q")
    assert [model.component for model in models] == ["transformer", "transformer_2"]
    page = draw_report("pipeline", models)
    assert page.count('class="part"') == 2
    assert 'href="#transformer_2"' in page
    assert page.count("Error by depth and kind") == 2


def test_a_model_without_a_configuration_says_what_is_not_known(tmp_path):
    models = read_models(plain(tmp_path / "out", "a", "b"))
    assert models[0].plan is None
    page = draw_report("out", models)
    assert "no configuration that names a class" in page
    assert summarize(models[0])["layers"] == 2


def test_names_of_strangers_are_text(tmp_path):
    folder = plain(tmp_path / HOSTILE.replace("/", ""), HOSTILE)
    page = draw_report(folder.name, read_models(folder))
    assert "<img" not in page
    assert "&lt;img src=x onerror" in page


@pytest.mark.parametrize("error", [float("1e300"), -1, 10**18, None])
def test_an_error_that_none_can_be_is_left_out(tmp_path, error):
    folder = plain(tmp_path / "out", "a")
    path = folder / "loraq.json"
    manifest = json.loads(path.read_text())
    if error is None:
        del manifest["layers"]["a"]["relative_error"]
    else:
        manifest["layers"]["a"]["relative_error"] = error
    path.write_text(json.dumps(manifest))
    models = read_models(folder)
    assert models[0].errors == {}
    assert models[0].mean_error is None
    assert "Error by depth" not in draw_report("out", models)


def test_a_page_is_written_beside_its_folder_and_not_into_it(tmp_path):
    folder = plain(tmp_path / "out", "a")
    assert page_beside(folder) == tmp_path / "out.report.html"
    write_report(folder, page_beside(folder))
    assert (tmp_path / "out.report.html").read_text().startswith("<!doctype html>")
    with pytest.raises(CheckpointError, match="lies inside"):
        write_report(folder, folder / "report.html")


def test_experts_and_shared_weights_count_once(tmp_path):
    folder = plain(tmp_path / "out", "a")
    model = Model.read(folder)
    stored = model.manifest.layers["a"]
    stack = replace(stored, shape=(4, 64, 64), scheme=replace(stored.scheme, branch=None))
    stacked = replace(model, manifest=replace(model.manifest, layers={"a": stack}))
    assert stacked.scratch == 3 * 64 * 64
    assert dict(stacked.split_bytes())["packed weights"] == 4 * 64 * 64 * 4.25 / 8
