"""After `import loraq.diffusers`, diffusers' own `from_pretrained`
and `save_pretrained` serve quantized models.
"""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small.pixart import small_pixart, velocity
from test_diffusers import (
    RECIPE,
    edit_json,
    edit_weights,
    files_of,
    quantize,
)

import loraq
from loraq.checkpoint.folder import file_sha256
from loraq.checkpoint.manifest import FILE_NAME
from loraq.errors import (
    CalibrationError,
    CheckpointError,
    KernelError,
    LayerError,
    LoraqError,
    RecipeError,
)
from loraq.integrations.hub import fetch_manifest
from loraq.layers import quantized_layers
from loraq.nn import QuantizedLinear
from loraq.recipe import Recipe

diffusers = pytest.importorskip("diffusers")
from loraq.diffusers import LoraqConfig  # noqa: E402
from loraq.integrations.loading import require_supported  # noqa: E402
from loraq.integrations.quantizer import SUPPORTED, LoraqQuantizer  # noqa: E402

PixArt = diffusers.PixArtTransformer2DModel
#: Of the models here; without a dtype, diffusers loads fp32.
BF16 = {"dtype": torch.bfloat16}


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models have the same tensors, bit for bit, under the same names."""
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype
        for name in ours
    )


@pytest.fixture(scope="module")
def model():
    return small_pixart()


@pytest.fixture(scope="module")
def source(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "transformer"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory) -> Path:
    """What `loraq quantize` makes of the source; tests only read it."""
    folder = tmp_path_factory.mktemp("quantized") / "transformer"
    quantize(source, folder)
    return folder


def change_manifest(folder: Path, change) -> None:
    path = folder / FILE_NAME
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def relist(folder: Path) -> None:
    """Make the manifest agree with the files, as somebody who edits a folder on purpose would."""

    def change(manifest: dict) -> None:
        manifest["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in folder.iterdir()
            if path.name != FILE_NAME
        }

    change_manifest(folder, change)


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "damaged"))


NO_CONFIG = object()


@pytest.mark.parametrize(
    "said",
    [
        NO_CONFIG,
        None,
        [],
        "",
        "loraq",
        0,
        True,
        1.5,
        {},
        [{"quant_method": "loraq"}],
        {"quant_method": None},
        {"quant_method": ["loraq"]},
        {"quant_method": {"quant_method": "loraq"}},
        {"quant_method": "LORAQ"},
        {"quant_method": "gguf"},
        {"quant_method": "torchao"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "loraq", "load_in_8bit": True},
        {"quant_method": "loraq", "recipe": 3},
        {"quant_method": "loraq", "recipe": "/etc/recipe.toml"},
        {"quant_method": "loraq", "recipe": {"scheme": {}}},
        {"quant_method": "loraq", "recipe": None},
        {"quant_method": "loraq", "recipe": "mxfp4"},
    ],
    ids=lambda config: "no config" if config is NO_CONFIG else str(config),
)
@pytest.mark.filterwarnings("ignore")
def test_whatever_a_configuration_says_packed_weights_are_loaded_right_or_refused(
    damaged, folder, tmp_path, said
):
    config = json.loads((damaged / "config.json").read_text())
    del config["quantization_config"]
    if said is not NO_CONFIG:
        config["quantization_config"] = said
    (damaged / "config.json").write_text(json.dumps(config))
    relist(damaged)
    loads = [lambda: loraq.load(damaged)]
    if not (isinstance(said, dict) and "bitsandbytes" in said.values()):  # wants a GPU first
        loads.append(lambda: PixArt.from_pretrained(damaged, **BF16))
    right = []
    for load in loads:
        try:
            assert same(load(), loraq.load(folder))
            right.append(True)
        except LoraqError:
            right.append(False)
    says_so = isinstance(said, dict) and said.get("quant_method") == "loraq"
    usable = says_so and said.get("recipe", None) in (None, "mxfp4") and len(said) <= 2
    assert right[0]  # the manifest says what the folder is
    assert right[1:] in ([], [usable and "load_in_8bit" not in said])
    (damaged / FILE_NAME).unlink()
    if said is not NO_CONFIG:
        with pytest.raises(LoraqError, match="is quantized already"):
            loraq.quantize_checkpoint(damaged, tmp_path / "out", RECIPE, progress=False)
    else:
        with pytest.raises(LoraqError, match="do not fit"):
            loraq.quantize_checkpoint(damaged, tmp_path / "out", RECIPE, progress=False)


# --- loading --------------------------------------------------------------------------------------


def test_a_quantized_folder_loads_as_it_was_saved(folder):
    loaded = PixArt.from_pretrained(folder, **BF16)
    assert same(loaded, loraq.load(folder))
    assert len(quantized_layers(loaded)) == 16
    assert not loaded.training
    assert loaded.dtype == torch.bfloat16  # as stored, since no `dtype` was given
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


def test_the_output_is_that_of_the_saved_model(tmp_path):
    model = small_pixart(torch.float32)
    loraq.quantize_(model, RECIPE, progress=False)
    loraq.save(model, tmp_path / "out")
    assert torch.equal(velocity(PixArt.from_pretrained(tmp_path / "out")), velocity(model))


def test_weights_are_never_decoded_while_loading(folder, monkeypatch):
    def decoded(*_):
        raise AssertionError("a weight was decoded")

    monkeypatch.setattr(loraq.QTensor, "dequantize", decoded)
    PixArt.from_pretrained(folder)


def test_dtype_is_of_what_stays_float(folder):
    loaded = PixArt.from_pretrained(folder, dtype=torch.float32)
    stored = loraq.load(folder)
    dtypes = {p.dtype for name, p in loaded.named_parameters()}
    assert dtypes == {torch.float32, torch.uint8}
    packed = [name for name, p in stored.named_parameters() if p.dtype == torch.uint8]
    assert packed
    assert all(
        torch.equal(loaded.get_parameter(name), stored.get_parameter(name)) for name in packed
    )
    assert loaded.get_parameter("proj_out.weight").equal(
        stored.get_parameter("proj_out.weight").float()
    )


def test_sharded_folders_load(folder, tmp_path):
    loraq.save(loraq.load(folder), tmp_path / "shards", shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same(PixArt.from_pretrained(tmp_path / "shards", **BF16), loraq.load(folder))


def test_the_configuration_of_a_loaded_model_has_the_stored_recipe(folder, tmp_path):
    loaded = PixArt.from_pretrained(folder, **BF16)
    assert loaded.config.quantization_config.recipe == RECIPE
    assert loaded.config.quantization_config is loaded.hf_quantizer.quantization_config
    assert json.loads(loaded.to_json_string())["quantization_config"]["recipe"] == RECIPE.to_dict()
    # It is a whole configuration: float weights quantized with it give the same folder.
    small_pixart().save_pretrained(tmp_path / "float")
    again = PixArt.from_pretrained(
        tmp_path / "float", quantization_config=loaded.config.quantization_config, **BF16
    )
    assert same(again, loaded)


def test_a_folder_that_notes_no_recipe_names_none(damaged, source):
    def forget(manifest: dict) -> None:
        manifest["recipes"] = []
        for layer in manifest["layers"].values():
            del layer["recipe"]

    change_manifest(damaged, forget)
    config = PixArt.from_pretrained(damaged).config.quantization_config
    assert config.recipe is None
    assert config.to_dict()["recipe"] is None
    with pytest.raises(LoraqError, match="does not say how it was made"):
        PixArt.from_pretrained(source, quantization_config=config)


def test_the_recipe_of_most_layers_is_shown_and_an_unreadable_one_is_none(damaged):
    def two(manifest: dict) -> None:
        manifest["recipes"].append({**manifest["recipes"][0], "seed": 77})
        for layer in list(manifest["layers"].values())[1:]:
            layer["recipe"] = 1

    def newer(manifest: dict) -> None:
        manifest["recipes"][1]["a_field_of_the_future"] = 1

    change_manifest(damaged, two)
    assert PixArt.from_pretrained(damaged).config.quantization_config.recipe == replace(
        RECIPE, seed=77
    )
    change_manifest(damaged, newer)
    assert PixArt.from_pretrained(damaged).config.quantization_config.recipe is None


def test_what_is_stored_wins_over_what_is_passed_and_a_warning_names_both(folder):
    other = replace(RECIPE, seed=5)
    with pytest.warns(UserWarning, match="quantized already") as caught:
        loaded = PixArt.from_pretrained(folder, quantization_config=LoraqConfig(other), **BF16)
    assert [str(warning.message) for warning in caught] == [
        f"'{folder}' is quantized already and loads as it is stored: LoraqConfig with "
        f"seed={RECIPE.seed}. The recipe of the `quantization_config` that was passed is not used: "
        "LoraqConfig with seed=5. To quantize with it, start from the float weights."
    ]
    assert same(loaded, loraq.load(folder))
    assert loaded.config.quantization_config.recipe == RECIPE
    assert "ignored_config" not in json.dumps(loaded.config.quantization_config.to_dict())


def test_passing_what_is_stored_is_no_reason_to_warn(folder):
    # Warnings are errors here.
    PixArt.from_pretrained(folder, quantization_config=LoraqConfig(RECIPE))


def test_the_configuration_of_another_quantizer_is_named_too(folder):
    with pytest.warns(
        UserWarning, match=r"method='lqer'.*not used: GGUFQuantizationConfig\. To quantize"
    ):
        PixArt.from_pretrained(folder, quantization_config=diffusers.GGUFQuantizationConfig())


def test_other_folders_are_merged_as_diffusers_does():
    merge = diffusers.quantizers.auto.DiffusersAutoQuantizer.merge_quantization_configs
    stored = diffusers.GGUFQuantizationConfig()
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        assert merge(stored, LoraqConfig("int4")) is stored


def test_tied_tensors_stay_tied(tmp_path):
    model = small_pixart()
    model.transformer_blocks[1].attn1.to_q.bias = model.transformer_blocks[0].attn1.to_q.bias
    loraq.quantize_(model, RECIPE, progress=False)
    loraq.save(model, tmp_path / "out")
    loaded = PixArt.from_pretrained(tmp_path / "out", **BF16)
    assert (
        loaded.transformer_blocks[1].attn1.to_q.bias is loaded.transformer_blocks[0].attn1.to_q.bias
    )
    assert same(loaded, model)


# --- quantizing while loading ---------------------------------------------------------------------


def test_quantizing_while_loading_gives_the_bytes_of_quantizing_afterwards(model, source, tmp_path):
    loaded = PixArt.from_pretrained(source, quantization_config=LoraqConfig(RECIPE), **BF16)
    expected = copy.deepcopy(model)
    loraq.quantize_(expected, RECIPE, progress=False)
    assert same(loaded, expected)
    loaded.save_pretrained(tmp_path / "a")
    loraq.save(expected, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_shards_and_another_dtype(model, tmp_path):
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    loaded = PixArt.from_pretrained(
        tmp_path / "shards", quantization_config=LoraqConfig(RECIPE), dtype=torch.float32
    )
    expected = torch.nn.Module.to(copy.deepcopy(model), torch.float32)
    loraq.quantize_(expected, RECIPE, progress=False)
    assert same(loaded, expected)


def test_a_weight_that_is_not_finite_is_named(source, tmp_path):
    shutil.copytree(source, tmp_path / "nan")
    edit_weights(
        tmp_path / "nan",
        lambda tensors: tensors["transformer_blocks.1.attn1.to_q.weight"].fill_(torch.nan),
    )
    with pytest.raises(LayerError, match=r"transformer_blocks\.1\.attn1\.to_q"):
        PixArt.from_pretrained(tmp_path / "nan", quantization_config=LoraqConfig(RECIPE))


def test_missing_weights_are_named(source, tmp_path):
    shutil.copytree(source, tmp_path / "less")
    edit_weights(
        tmp_path / "less", lambda tensors: tensors.pop("transformer_blocks.1.attn1.to_q.weight")
    )
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.1\.attn1\.to_q"):
        PixArt.from_pretrained(tmp_path / "less", quantization_config=LoraqConfig(RECIPE))


def test_a_recipe_that_leaves_nothing_is_refused(source):
    recipe = Recipe.from_dict({"scheme": "mxfp4", "rules": [{"match": "*", "skip": True}]})
    with pytest.raises(
        LoraqError, match="every linear layer of PixArtTransformer2DModel is skipped"
    ):
        PixArt.from_pretrained(source, quantization_config=LoraqConfig(recipe))


def test_what_needs_more_than_one_weight_at_a_time_is_refused(source):
    statistics = replace(Recipe.named("int4-a16+w8a8-r4"), method="gptq")
    with pytest.raises(
        CalibrationError, match=r"which loading does not take\. Run `loraq quantize --stats` once"
    ):
        PixArt.from_pretrained(source, quantization_config=LoraqConfig(statistics))
    shared = replace(Recipe.named("int4-a16+w8a8"), allocation="greedy")
    with pytest.raises(LoraqError, match="looks at all weights before it quantizes the first"):
        PixArt.from_pretrained(source, quantization_config=LoraqConfig(shared))


def test_a_single_file_says_what_to_do_instead(model):
    # What `from_single_file` calls: it hands over the model, and no place of files.
    quantizer = LoraqQuantizer(LoraqConfig(RECIPE), pre_quantized=False)
    with pytest.raises(LoraqError, match="another way than `from_pretrained`"):
        quantizer.preprocess_model(copy.deepcopy(model), device_map=None, state_dict={})


# --- saving ---------------------------------------------------------------------------------------


def test_save_pretrained_writes_the_folder_back(folder, tmp_path):
    native = PixArt.from_pretrained(folder, **BF16)
    for name, loaded in (("native", native), ("ours", loraq.load(folder))):
        loaded.save_pretrained(tmp_path / name)
        assert files_of(tmp_path / name) == files_of(folder)


def test_a_model_that_was_quantized_in_memory_saves_its_manifest_too(model, folder, tmp_path):
    quantized = copy.deepcopy(model)
    loraq.quantize_(quantized, RECIPE, progress=False)
    quantized.save_pretrained(tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(folder)


def test_the_way_around_is_closed(folder, tmp_path):
    loaded = PixArt.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="own `save_pretrained`"):
        PixArt.save_pretrained(loaded, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda place: (place / FILE_NAME).unlink(), "no 'loraq.json'"),
        (lambda place: edit_json(place / "config.json", num_layers=1), "config.json"),
        (
            lambda place: edit_weights(place, lambda t: t.pop("proj_out.bias")),
            "bytes|missing|changed",
        ),
    ],
    ids=["no manifest", "other config", "a tensor less"],
)
def test_damaged_folders_are_refused(damaged, damage, match):
    damage(damaged)
    with pytest.raises(CheckpointError, match=match):
        PixArt.from_pretrained(damaged)


def test_a_changed_byte_is_found_unless_hashes_are_skipped(damaged, monkeypatch):
    path = damaged / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckpointError, match="hash differs"):
        PixArt.from_pretrained(damaged)
    monkeypatch.setenv("LORAQ_VERIFY", "0")
    PixArt.from_pretrained(damaged)


def test_casting_is_refused_as_for_every_quantizer_of_diffusers(folder):
    loaded = PixArt.from_pretrained(folder)
    before = copy.deepcopy(loaded.state_dict())
    with pytest.raises(ValueError, match="Casting a quantized model"):
        loaded.to(torch.float32)
    assert loaded.to("cpu") is loaded
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


PLAIN = """
import sys, torch, diffusers
try:
    diffusers.{cls}.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_without_loraq_nothing_is_loaded(folder):
    program = PLAIN.format(cls="PixArtTransformer2DModel")
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Unknown quantization type, got loraq - supported types are:")


def test_importing_loraq_alone_leaves_diffusers_as_it_is():
    program = "import loraq, sys\nloraq.quantize_weight, loraq.save\n"
    program += "assert 'diffusers' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("version", ["0.41.0", "0.43.0.dev0", "1.0.0"])
def test_other_versions_of_diffusers_are_refused_by_name(version):
    with pytest.raises(
        LoraqError, match=rf"diffusers {version} is installed; loraq.diffusers knows {SUPPORTED[0]}"
    ):
        require_supported("diffusers", version, SUPPORTED)


def test_the_installed_version_is_supported():
    require_supported("diffusers", diffusers.__version__, SUPPORTED)


# --- the configuration ----------------------------------------------------------------------------


def test_a_configuration_survives_json():
    config = LoraqConfig(RECIPE)
    again = LoraqConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.recipe == RECIPE
    assert again.to_dict() == config.to_dict()
    assert again.quant_method.value == "loraq"
    assert json.loads(str(config).removeprefix("LoraqConfig "))["quant_method"] == "loraq"


def test_a_configuration_takes_what_adjusts_a_recipe(source):
    config = LoraqConfig(
        "mxfp4+w8a8", effort="fast", rank=4, keep="float", modules_to_not_convert=["ff"]
    )
    assert (config.recipe.effort, config.recipe.scheme.branch.rank) == ("fast", 4)
    mapping = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": config})
    assert mapping.quant_mapping["transformer"].recipe == config.recipe
    layers = quantized_layers(PixArt.from_pretrained(source, quantization_config=config))
    assert {layer.scheme.branch.rank for layer in layers.values()} == {4}
    assert layers
    assert not [name for name in layers if ".ff." in name]
    with pytest.raises(LoraqError, match="'rank' of `__init__` is 0"):
        LoraqConfig("mxfp4+w8a8", rank=0)


@pytest.mark.parametrize("which", ["source", "folder"])
def test_a_configuration_names_the_back_end(which, request):
    path, folder = request.getfixturevalue(which), request.getfixturevalue("folder")
    config = LoraqConfig(RECIPE, backend="resident")
    loaded = PixArt.from_pretrained(path, quantization_config=config)
    assert {layer.backend for layer in quantized_layers(loaded).values()} == {"resident"}
    assert "backend" not in loaded.config.quantization_config.to_dict()
    # It is no argument of diffusers, which says nothing of it and leaves layers to themselves.
    plain = PixArt.from_pretrained(folder, backend="resident")
    assert "resident" not in {layer.backend for layer in quantized_layers(plain).values()}
    with pytest.raises(KernelError, match="Unknown back end 'fast'"):
        LoraqConfig(RECIPE, backend="fast")


@pytest.mark.parametrize(
    "config",
    [LoraqConfig(backend="resident"), {"quant_method": "loraq", "backend": "resident"}],
    ids=["object", "table"],
)
def test_a_configuration_without_a_recipe_only_says_how_a_quantized_folder_runs(folder, config):
    # Warnings are errors here: the stored recipe is no other than the one that was not named.
    loaded = PixArt.from_pretrained(folder, quantization_config=config)
    assert {layer.backend for layer in quantized_layers(loaded).values()} == {"resident"}
    assert loaded.config.quantization_config.recipe == RECIPE


@pytest.mark.parametrize("which", ["source", "folder"])
def test_a_configuration_names_the_dtype_of_what_stays_float(which, request):
    path = request.getfixturevalue(which)
    recipe = RECIPE if which == "source" else None
    config = LoraqConfig(recipe, dtype=torch.float16)
    loaded = PixArt.from_pretrained(path, quantization_config=config)
    plain = LoraqConfig(recipe)
    assert same(loaded, PixArt.from_pretrained(path, quantization_config=plain, dtype=torch.half))
    assert velocity(loaded).dtype == torch.float16
    assert "dtype" not in loaded.config.quantization_config.to_dict()
    # Said by both, it is that of the configuration.
    assert PixArt.from_pretrained(path, quantization_config=config, **BF16).dtype == torch.float16
    with pytest.raises(LoraqError, match=r"dtype is torch\.int8"):
        LoraqConfig(recipe, dtype=torch.int8)


def test_layers_are_solved_on_the_device_of_the_configuration(model, source):
    """Where there is no other device than the CPU, that nothing changes is all that can be seen."""
    config = LoraqConfig(RECIPE, device="cpu")
    loaded = PixArt.from_pretrained(source, quantization_config=config, **BF16)
    expected = loraq.quantize(model, RECIPE, device="cpu", progress=False)
    assert same(loaded, expected)


def test_arguments_that_it_does_not_have():
    with pytest.raises(LoraqError, match="got bits"):
        LoraqConfig("mxfp4", bits=4)
    with pytest.raises(LoraqError, match="quant_method='gptq'"):
        LoraqConfig.from_dict({"quant_method": "gptq"})
    with pytest.raises(RecipeError, match="nonsense"):
        LoraqConfig("nonsense")


# --- where it runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(folder, device_map):
    loaded = PixArt.from_pretrained(folder, device_map=device_map)
    assert torch.equal(velocity(loaded), velocity(PixArt.from_pretrained(folder)))


# accelerate does not know that diffusers wants parameters of the model itself in the map.
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
def test_layers_on_the_disk_run_but_are_not_quantized_there(source, folder, tmp_path):
    parts = [name for name, _ in loraq.load(folder).named_children()]
    device_map = {
        **dict.fromkeys([*parts, "scale_shift_table"], "cpu"),
        "transformer_blocks": "disk",
    }
    loaded = PixArt.from_pretrained(
        folder, device_map=device_map, offload_folder=str(tmp_path / "disk")
    )
    assert loaded.transformer_blocks[1].attn1.to_q.weight_packed.is_meta
    assert torch.equal(velocity(loaded), velocity(PixArt.from_pretrained(folder)))
    with pytest.raises(LoraqError, match="go to the disk"):
        PixArt.from_pretrained(
            source,
            quantization_config=LoraqConfig(RECIPE),
            device_map=device_map,
            offload_folder=str(tmp_path / "d"),
        )


def test_offloading_hooks(folder):
    from accelerate import cpu_offload, cpu_offload_with_hook

    expected = velocity(PixArt.from_pretrained(folder))
    whole = PixArt.from_pretrained(folder)
    _, hook = cpu_offload_with_hook(whole, execution_device="cpu")
    assert torch.equal(velocity(whole), expected)
    hook.offload()
    assert torch.equal(velocity(whole), expected)
    by_layer = PixArt.from_pretrained(folder)
    cpu_offload(by_layer, execution_device=torch.device("cpu"))
    assert by_layer.transformer_blocks[1].attn1.to_q.weight_packed.is_meta
    for _ in range(2):
        assert torch.equal(velocity(by_layer), expected)


@pytest.mark.slow
def test_it_compiles_without_a_break(folder):
    loaded = PixArt.from_pretrained(folder)
    expected = velocity(loaded)
    block = loaded.transformer_blocks[0]
    block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    assert torch.allclose(velocity(loaded).float(), expected.float(), atol=1e-2)
    assert LoraqQuantizer.is_compileable


# --- the hub's cache ------------------------------------------------------------------------------


def test_the_manifest_of_a_hub_model_is_fetched_too(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *args, **kwargs: asked.append((args, kwargs))
    )
    snapshot = (
        tmp_path / "hub" / "models--someone--model-x" / "snapshots" / "abc123" / "transformer"
    )
    snapshot.mkdir(parents=True)
    fetch_manifest(snapshot)
    assert asked == [
        (
            ("someone/model-x", "transformer/loraq.json"),
            {"revision": "abc123", "cache_dir": tmp_path / "hub"},
        )
    ]
    (snapshot / FILE_NAME).write_text("{}")
    fetch_manifest(snapshot)
    fetch_manifest(tmp_path)
    assert len(asked) == 1


# --- pipelines ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> tuple[Path, Path]:
    from tiny_pipelines import tiny_pixart_sigma

    place = tmp_path_factory.mktemp("pipelines")
    source = tiny_pixart_sigma(place / "float")
    quantize(source, place / "quantized")
    return source, place / "quantized"


def image(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    array = pipeline(
        "a red fox",
        num_inference_steps=2,
        height=32,
        width=32,
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    return torch.from_numpy(array)


#: A warning of diffusers' own scheduler about numpy, not ours.
of_diffusers = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword"
)


@of_diffusers
@pytest.mark.slow
def test_a_quantized_pipeline_loads_runs_and_is_written_back(pipelines, tmp_path):
    source, quantized = pipelines
    exact = image(diffusers.DiffusionPipeline.from_pretrained(source))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(quantized)
    assert isinstance(pipeline.transformer.transformer_blocks[0].attn1.to_q, QuantizedLinear)
    ours = image(pipeline)
    assert 0 < (ours - exact).abs().mean() < 0.05
    pipeline.save_pretrained(tmp_path / "again")
    written, stored = (files_of(at / "transformer") for at in (tmp_path / "again", quantized))
    manifests = [json.loads(files.pop("loraq.json")) for files in (written, stored)]
    del manifests[1]["components"]  # diffusers writes a pipeline one component at a time
    assert manifests[0] == manifests[1]
    assert written == stored
    assert torch.equal(image(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")), ours)


@of_diffusers
@pytest.mark.slow
def test_a_pipeline_is_quantized_while_it_loads(pipelines):
    source, quantized = pipelines
    config = diffusers.PipelineQuantizationConfig(
        quant_mapping={"transformer": LoraqConfig(RECIPE)}
    )
    pipeline = diffusers.DiffusionPipeline.from_pretrained(source, quantization_config=config)
    assert same(pipeline.transformer, loraq.load(quantized))
    assert torch.equal(
        image(pipeline), image(diffusers.DiffusionPipeline.from_pretrained(quantized))
    )


def flux():
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1}
    sizes |= {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16}
    sizes |= {"joint_attention_dim": 32, "pooled_projection_dim": 32}
    return diffusers.FluxTransformer2DModel(**sizes, axes_dims_rope=(4, 4, 8)), sizes


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
def test_a_controlnet_of_a_quantized_model_has_its_weights_or_is_refused(tmp_path):
    model, sizes = flux()
    loraq.quantize_(model, "int8", progress=False)
    model.save_pretrained(tmp_path / "out")
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "out")
    build = diffusers.FluxControlNetModel.from_transformer
    sizes = {name: sizes[name] for name in list(sizes)[:4]}
    for quantized in (model, loaded):
        with pytest.raises(LayerError, match=r"no quantized layer there.*dequantize_"):
            build(quantized, **sizes)
        weight = quantized.transformer_blocks[0].attn.to_q.reconstruct()
        net = build(quantized.dequantize(), **sizes)
        assert torch.equal(net.transformer_blocks[0].attn.to_q.weight, weight)


def test_a_float_model_with_the_configuration_of_a_quantized_one_is_a_float_model(
    model, source, tmp_path
):
    quantized = PixArt.from_pretrained(source, quantization_config=LoraqConfig(RECIPE))
    quantized.save_pretrained(tmp_path / "out")
    quantized = PixArt.from_pretrained(tmp_path / "out")
    fresh = PixArt.from_config(quantized.config)
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(tmp_path / "fresh")
    for _ in range(2):
        loaded = PixArt.from_pretrained(tmp_path / "fresh")
        assert same(loaded, fresh)
        assert not quantized_layers(loaded)
        assert "quantization_config" not in loaded.config
        loaded.save_pretrained(tmp_path / "fresh")
        assert "quantization_config" not in json.loads((tmp_path / "fresh/config.json").read_text())
        loaded.half()
    fresh.save_pretrained(tmp_path / "fresh")
    config = LoraqConfig("int8")
    loaded = PixArt.from_pretrained(tmp_path / "fresh", quantization_config=config)
    assert quantized_layers(loaded)
    loraq.quantize_(fresh, "int8", progress=False)
    assert same(loaded, fresh)


@pytest.mark.parametrize("kind", ["T5", "UMT5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_text_encoders_that_read_a_weight_in_their_forward_run(kind, dtype):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_layers=1)
    model = getattr(transformers, f"{kind}EncoderModel")(config).eval().to(dtype)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        exact = model(tokens)[0]
        loraq.quantize_(model, "int8-a16", progress=False)
        ours = model(tokens)[0]
    assert ours.dtype == dtype
    assert (ours - exact).norm() < 0.03 * exact.norm()
