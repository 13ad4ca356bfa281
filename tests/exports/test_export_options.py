"""Options of `export`, target by target: each works, or is refused by what the target has."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from small.pixart import small_pixart

import loraq
from loraq.cli import main
from loraq.errors import ExportError
from loraq.exports.table import TARGETS
from loraq.recipe import Recipe

pytest.importorskip("diffusers")

#: Of each target: dtypes that it takes, whether it fills up ranks, whether it has several files.
TAKES = {
    "sdnq": (("bfloat16", "float16", "float32"), False, True),
    "gguf": (("bfloat16", "float16", "float32"), False, False),
    "nunchaku-lite": (("bfloat16", "float16"), True, True),
    "onnx": (("float32",), False, False),
    "openvino": (("float32",), False, False),
    "torchao": (("bfloat16", "float16", "float32"), False, True),
    "comfy": (("bfloat16", "float16", "float32"), False, False),
    "dense": (("bfloat16", "float16", "float32"), False, True),
}
OPTIONS = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
    "int8": {"dtype": "int8"},
    "pad_rank": {"pad_rank": True},
    "shard_bytes": {"shard_bytes": 100_000},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("options")
    model = small_pixart(torch.float32, num_layers=1)
    rules = [{"match": "proj_out", "skip": True}]
    recipe = {"scheme": "int4_b32-a16+bf16-r8", "method": "rtn", "keep": "float", "rules": rules}
    loraq.quantize_(model, Recipe.from_dict(recipe | {"method": "svdquant"}), progress=False)
    loraq.save(model, place / "quantized")
    return place / "quantized"


def test_every_target_is_in_the_table():
    assert TAKES.keys() == TARGETS.keys()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("to", TARGETS)
def test_what_a_target_has_not_is_refused_before_anything_is_read(tmp_path, to, option):
    dtypes, pads, has_shards = TAKES[to]
    is_there = {"pad_rank": pads, "shard_bytes": has_shards}.get(option, option in dtypes)
    for run in (loraq.plan_export, lambda *a, **b: loraq.export(*a, tmp_path / "out", **b)):
        with pytest.raises(loraq.LoraqError) as caught:
            run(tmp_path / "nothing", to=to, **OPTIONS[option])
        message = str(caught.value)
        assert ("nothing" in message) == is_there
        if not is_there:
            assert isinstance(caught.value, ExportError)
            assert f"'{option}'" in message or "Leave it out" in message
    assert list(tmp_path.iterdir()) == []


def test_a_plan_refuses_what_the_export_refuses_by_the_command_too(tmp_path):
    for rest in (["--plan"], [str(tmp_path / "out")]):
        asked = ["export", str(tmp_path / "in"), *rest, "--to", "gguf", "--shard-size", "1GB"]
        result = CliRunner().invoke(main, asked)
        assert result.exit_code == 1
        assert "Target 'gguf' has one weight file, 'model.gguf'" in result.output


def test_a_plan_counts_the_headers_of_all_shards(place, tmp_path):
    options = {"to": "sdnq", "shard_bytes": 100_000}
    planned = loraq.plan_export(place, **options)
    done = loraq.export(place, tmp_path / "out", progress=False, **options)
    assert planned.nbytes == done.nbytes
    assert sum(name.endswith(".safetensors") for name in done.files) > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_card_loads_the_model_in_the_dtype_of_its_floats(place, tmp_path, dtype):
    loraq.export(place, tmp_path / "out", to="sdnq", dtype=dtype, progress=False)
    assert f"torch_dtype=torch.{dtype})" in (tmp_path / "out/README.md").read_text()
    written = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    assert written["proj_out.weight"].dtype == getattr(torch, dtype)


def test_a_lora_on_a_float_layer_is_added_before_the_one_rounding(tmp_path, rng):
    """The source is in bf16, and an export in fp32 holds the sum as it is."""
    model = small_pixart(torch.bfloat16, num_layers=1)
    weight = model.proj_out.weight.detach().clone()
    rules = [{"match": "proj_out", "skip": True}]
    recipe = {"scheme": "int4_b32-a16", "method": "rtn", "keep": "float", "rules": rules}
    loraq.quantize_(model, Recipe.from_dict(recipe), progress=False)
    loraq.save(model, tmp_path / "quantized")
    down = torch.randn(4, weight.shape[1], generator=rng)
    up = torch.randn(weight.shape[0], 4, generator=rng) * 0.05
    factors = {"proj_out.lora_A.weight": down, "proj_out.lora_B.weight": up}
    save_file(factors, tmp_path / "style.safetensors", {"format": "pt"})
    loraq.export(
        *(tmp_path / "quantized", tmp_path / "out"),
        **{"to": "dense", "dtype": "float32", "progress": False},
        lora=[tmp_path / "style.safetensors"],
    )
    written = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    assert torch.equal(written["proj_out.weight"], weight.float() + up @ down)


@pytest.mark.parametrize("name", ["proj_out", "transformer_blocks.0.attn1.to_q"])
def test_a_number_beyond_the_dtype_is_said_to_be_one(place, tmp_path, name):
    """In a layer that stays float, and in one that becomes float."""
    layer = loraq.load(place).get_submodule(name)
    n, k = layer.out_features, layer.in_features
    factors = {
        f"{name}.lora_A.weight": torch.full((1, k), 1000.0),
        f"{name}.lora_B.weight": torch.full((n, 1), 1000.0),
    }
    save_file(factors, tmp_path / "large.safetensors", {"format": "pt"})
    lora = [tmp_path / "large.safetensors"]
    with pytest.raises(ExportError, match=r"has values beyond F16\. Use another `--dtype`"):
        loraq.export(
            *(place, tmp_path / "out"),
            **{"to": "dense", "dtype": "float16", "lora": lora, "progress": False},
        )
    assert not (tmp_path / "out").exists()


def test_the_list_is_data_too():
    result = CliRunner().invoke(main, ["export", "--list", "--json"])
    listed = {each["name"]: each for each in json.loads(result.stdout)["targets"]}
    assert listed.keys() == TARGETS.keys()
    assert listed["torchao"]["branch_file"]["name"] == "branch.safetensors"
    assert listed["sdnq"]["branch_file"] is None
    for name, (dtypes, _, _) in TAKES.items():
        assert listed[name]["dtypes"] == list(dtypes)
