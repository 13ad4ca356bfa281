"""Folders of diffusers: a transformer's and a pipeline's, from float to quantized, and
everything that is refused.
"""

import copy
import json
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small.pixart import small_pixart, velocity
from torch import nn

import loraq
from loraq.checkpoint.manifest import Manifest
from loraq.errors import CheckpointError, LoraqError, RecipeError, SchemeError
from loraq.integrations.checkpoints import plan_checkpoint, quantize_checkpoint
from loraq.integrations.diffusers import (
    empty_model,
    load_float,
    model_folder,
)
from loraq.layers import quantized_layers
from loraq.recipe import Recipe
from loraq.safetensors.reader import ShardReader
from tests.folders import alone, components_of, files_of

pytest.importorskip("diffusers")

RECIPE = replace(Recipe.named("mxfp4+w8a8-r8"), method="lqer", keep="float")
#: Files of the other components, some of them in deeper folders.
OTHERS = {
    "model_index.json": b'{"_class_name": "PixArtSigmaPipeline",'
    b' "scheduler": ["diffusers", "DPMSolver"], "text_encoder": ["transformers", "T5EncoderModel"],'
    b' "tokenizer": ["transformers", "T5Tokenizer"], "transformer": ["diffusers", "PixArt"],'
    b' "unet": [null, null], "vae": ["diffusers", "AutoencoderKL"]}',
    "scheduler/scheduler_config.json": b'{"steps": 20}\n',
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": bytes(range(256)),
    "text_encoder/nested/transformer/keep.bin": b"\x00\xff",
    "tokenizer/vocab.txt": "größe\r\n".encode(),
    "README.md": b"# model",
}


def quantize(source: Path, target: Path, recipe: Recipe = RECIPE, **options):
    return quantize_checkpoint(source, target, recipe, progress=False, **options)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_pixart()


@pytest.fixture(scope="module")
def written(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    model.save_pretrained(folder / "transformer")
    return folder / "transformer"


@pytest.fixture
def source(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "source"))


@pytest.fixture
def pipeline(written, tmp_path) -> Path:
    folder = tmp_path / "pipeline"
    shutil.copytree(written, folder / "transformer")
    for name, content in OTHERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# --- the job --------------------------------------------------------------------------------------


def test_a_transformer_folder_gives_what_quantizing_in_memory_gives(model, source, tmp_path):
    report = quantize(source, tmp_path / "out")
    in_memory = copy.deepcopy(model)
    expected = loraq.quantize_(in_memory, RECIPE, progress=False)
    loaded = loraq.load(tmp_path / "out")
    assert not loaded.training
    ours, theirs = loaded.state_dict(), in_memory.state_dict()
    assert list(ours) == list(theirs)
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype
        for name in theirs
    )
    assert torch.equal(velocity(loaded), velocity(in_memory))
    assert [layer.record() for layer in report.layers] == [
        layer.record() for layer in expected.layers
    ]
    assert sorted(files_of(tmp_path / "out")) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "loraq.json",
    ]


def test_the_source_is_only_read(source, tmp_path):
    before = files_of(source)
    quantize(source, tmp_path / "out")
    assert files_of(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_the_plan_is_what_is_done(source, pipeline, tmp_path):
    for place in (source, pipeline):
        plan = plan_checkpoint(place, RECIPE)
        report = quantize(place, tmp_path / f"out-{place.name}")
        assert report.plan == plan
        assert [(layer.name, layer.shape, layer.scheme) for layer in report.layers] == [
            (layer.name, layer.shape, layer.scheme) for layer in plan.quantized
        ]
        assert sum(layer.nbytes for layer in report.layers) == sum(
            layer.nbytes for layer in plan.quantized
        )
    assert plan_checkpoint(source, RECIPE) == plan_checkpoint(pipeline, RECIPE)


def test_the_plan_needs_no_weights(source):
    plan = plan_checkpoint(source, RECIPE)
    (source / "diffusion_pytorch_model.safetensors").unlink()
    assert plan_checkpoint(str(source), RECIPE) == plan
    assert len(plan.quantized) == 16


def test_the_other_components_of_a_pipeline_are_copied_byte_for_byte(pipeline, source, tmp_path):
    quantize(pipeline, tmp_path / "out")
    quantize(source, tmp_path / "alone")
    copied = files_of(tmp_path / "out")
    inner = {name for name in copied if name.startswith("transformer/")}
    assert {name: copied[name] for name in copied.keys() - inner} == OTHERS
    assert alone(tmp_path / "out" / "transformer") == files_of(tmp_path / "alone")
    manifest = json.loads(copied["transformer/loraq.json"])
    assert manifest["components"] == components_of(OTHERS)
    assert list(manifest["components"]) == sorted(OTHERS)
    assert model_folder(tmp_path / "out") == tmp_path / "out" / "transformer"
    assert torch.equal(
        velocity(loraq.load(tmp_path / "out")), velocity(loraq.load(tmp_path / "alone"))
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "alone",
        "out",
        "pipeline",
        "source",
    ]


def test_a_unet_is_taken_where_there_is_no_transformer(pipeline):
    (pipeline / "transformer").rename(pipeline / "unet")
    edit_json(pipeline / "model_index.json", transformer=[None, None], unet=["diffusers", "UNet"])
    assert model_folder(pipeline) == pipeline / "unet"


def test_a_source_of_links_as_the_hub_cache_has_gives_plain_files(written, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    (snapshot / "transformer").mkdir(parents=True)
    blobs.mkdir()
    for path in written.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / "transformer" / path.name).symlink_to(f"../../../blobs/{path.name}")
    (blobs / "0123").write_bytes(OTHERS["model_index.json"])
    (snapshot / "model_index.json").symlink_to("../../blobs/0123")
    quantize(snapshot, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    loraq.load(tmp_path / "out")


def test_shards_with_an_index_are_a_source_too(model, source, tmp_path):
    model.save_pretrained(tmp_path / "shards", max_shard_size=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    quantize(source, tmp_path / "a")
    quantize(tmp_path / "shards", tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_workers_do_not_change_a_byte(source, tmp_path):
    quantize(source, tmp_path / "a")
    quantize(source, tmp_path / "b", workers=2)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_progress_is_told(source, tmp_path):
    seen = []
    quantize_checkpoint(
        source, tmp_path / "out", RECIPE, progress=lambda *event: seen.append(event)
    )
    assert [event[:2] for event in seen] == [(i + 1, 16) for i in range(16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_stays_float_keeps_its_dtype(tmp_path, dtype):
    small_pixart(dtype, num_layers=1).save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out")
    loaded = loraq.load(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {dtype, torch.uint8}


def test_overwriting_replaces_the_target(source, tmp_path):
    quantize(source, tmp_path / "out", shard_bytes=1000)
    with pytest.raises(CheckpointError, match="is not empty"):
        quantize(source, tmp_path / "out", replace(RECIPE, seed=7))
    n_files = len(files_of(tmp_path / "out"))
    quantize(source, tmp_path / "out", replace(RECIPE, seed=7), overwrite=True)
    assert len(files_of(tmp_path / "out")) < n_files
    assert Manifest.read(tmp_path / "out").recipes[0]["seed"] == 7


def test_loading_is_on_the_back_end_that_is_asked_for(source, tmp_path):
    quantize(source, tmp_path / "out")
    loaded = loraq.load(tmp_path / "out", backend="reference")
    assert {layer.backend for layer in quantized_layers(loaded).values()} == {"reference"}


def test_no_weights_are_made_while_an_empty_model_is(source):
    model = empty_model(source)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_no_default_device_changes_what_is_loaded(source, tmp_path, default):
    quantize(source, tmp_path / "out")
    wanted = [loraq.load(tmp_path / "out"), load_float(source)]
    with torch.device(default):
        found = [loraq.load(tmp_path / "out"), load_float(source)]
    for first, second in zip(wanted, found, strict=True):
        assert torch.equal(
            velocity(nn.Module.to(first, torch.float32)),
            velocity(nn.Module.to(second, torch.float32)),
        )


def test_tensors_go_to_their_device_one_by_one(source, tmp_path, monkeypatch):
    quantize(source, tmp_path / "out")
    living, most = [], []

    def read(self, name, read=ShardReader.read):
        most.append(sum(each() is not None for each in living))
        living.append(weakref.ref(tensor := read(self, name)))
        return tensor

    monkeypatch.setattr(ShardReader, "read", read)
    loaded = loraq.load(tmp_path / "out", device="meta")
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"meta"}
    assert len(most) > 20
    assert max(most) == 0


def test_float_weights_are_read_exactly(model, source):
    loaded = load_float(source)
    assert not loaded.training
    assert torch.equal(velocity(nn.Module.to(loaded, torch.bfloat16)), velocity(model))


# --- refused before work starts -------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch):
    """Fail if quantization starts."""

    def started(*_, **__):
        raise AssertionError("work has started")

    monkeypatch.setattr("loraq.pipeline.ranks.Ranks.run", started)


def refused(
    source: Path, target: Path, match: str, *, overwrite: bool = False, kind: type = CheckpointError
) -> None:
    before = files_of(source)
    with pytest.raises(kind, match=match):
        quantize(source, target, overwrite=overwrite)
    assert files_of(source) == before
    assert not target.exists() or target.is_dir()
    assert not [path for path in target.parent.glob(".*")]


def test_sources_that_are_no_folders_of_diffusers(no_work, tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "out", r"'.*nowhere' is not a folder")
    (tmp_path / "empty").mkdir()
    refused(
        tmp_path / "empty",
        tmp_path / "out",
        "has neither 'config\\.json' nor 'model_index\\.json' nor weights",
    )
    (tmp_path / "empty" / "model_index.json").write_text("{}")
    refused(tmp_path / "empty", tmp_path / "out", "has no transformer and no U-Net")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"_class_name": "NoSuchModel"},
            r"names the class 'NoSuchModel', which diffusers \d.* does not have",
        ),
        ({"_class_name": None}, "names the class None"),
        ({"_class_name": ["PixArtTransformer2DModel"]}, r"names the class \["),
        ({"_class_name": "DDPMScheduler"}, "names the class 'DDPMScheduler'"),
        ({"_class_name": "utils"}, "names the class 'utils'"),
        ({"norm_type": "nonsense"}, "PixArtTransformer2DModel refuses"),
        ({"num_attention_heads": "two"}, "PixArtTransformer2DModel refuses"),
        ({"num_layers": 3}, r"do not fit its config\.json\. Missing keys: transformer_blocks\.2\."),
        ({"num_layers": 1}, r"Unexpected keys: transformer_blocks\.1\."),
        ({"caption_channels": 24}, r"has shape \(32, 16\), config\.json wants \(32, 24\)"),
        ({"quantization_config": {"quant_method": "torchao"}}, "is quantized already"),
    ],
)
def test_a_configuration_that_does_not_fit(no_work, source, tmp_path, change, match):
    edit_json(source / "config.json", **change)
    refused(source, tmp_path / "out", match)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_damaged_configuration(no_work, source, tmp_path, text):
    (source / "config.json").write_text(text)
    refused(source, tmp_path / "out", r"config\.json'")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
def test_weights_that_are_integers(no_work, source, tmp_path, dtype):
    name = "transformer_blocks.0.ff.net.2.weight"
    edit_weights(source, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(
        source,
        tmp_path / "out",
        rf"tensor '{name}' is .*\. Float weights of 16 bits or more are required",
    )


def test_weights_that_are_missing_or_truncated(no_work, source, tmp_path):
    weights = source / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(source, tmp_path / "out", "is truncated or not a safetensors file")
    weights.rename(source / "diffusion_pytorch_model.bin")
    refused(
        source, tmp_path / "out", r"has no \.safetensors file\. Other weight files are not read"
    )


def test_a_source_that_is_quantized(source, pipeline, tmp_path, monkeypatch):
    for place in (source, pipeline):
        quantize(place, tmp_path / f"q-{place.name}")
        refused(
            tmp_path / f"q-{place.name}",
            tmp_path / "out",
            r"is quantized already(| \(transformer\))\. Start from the float weights",
        )
        with pytest.raises(CheckpointError, match="is quantized already"):
            plan_checkpoint(tmp_path / f"q-{place.name}", RECIPE)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_target_that_touches_the_source(no_work, pipeline, tmp_path, monkeypatch, overwrite):
    (tmp_path / "link").symlink_to("pipeline")
    monkeypatch.chdir(tmp_path)
    for same in (pipeline, pipeline / "vae" / "..", tmp_path / "link", Path("pipeline")):
        refused(pipeline, same, "Source and target are both", overwrite=overwrite)
    for inside in (pipeline / "out", pipeline / "transformer", tmp_path / "link" / "a" / "b"):
        refused(pipeline, inside, "lies inside", overwrite=overwrite)
    refused(pipeline / "transformer", pipeline, "lies inside", overwrite=overwrite)
    assert (pipeline / "model_index.json").exists()


def test_a_target_that_cannot_be_made(no_work, source, tmp_path):
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(CheckpointError, match=r"a file of this name exists|is a file"):
            quantize(source, target, overwrite=True)


@pytest.mark.parametrize("place", ["source", "pipeline"])
def test_a_disk_without_space(no_work, request, tmp_path, monkeypatch, place):
    folder = request.getfixturevalue(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    match = r"has 1e-06 GB free and about \S+e-05 GB are needed\. Free space, or choose another"
    refused(folder, tmp_path / "deep" / "out", match)


def test_a_disk_with_just_enough_space(source, tmp_path, monkeypatch):
    quantize(source, tmp_path / "first")
    size = sum(len(content) for content in files_of(tmp_path / "first").values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * size))
    quantize(source, tmp_path / "out")


def test_a_recipe_that_does_not_fit(no_work, source, tmp_path):
    with pytest.raises(
        SchemeError, match=r"Layer 'transformer_blocks\.0\.attn1\.to_q': Branch rank 33"
    ):
        quantize(source, tmp_path / "out", Recipe.named("mxfp4+bf16-r33"))
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_leaves_nothing(source, tmp_path):
    recipe = Recipe.from_dict({"scheme": "mxfp4", "rules": [{"match": "*", "skip": True}]})
    with pytest.raises(RecipeError, match="Nothing to quantize"):
        quantize(source, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(source, tmp_path):
    def spoil(tensors):
        tensors["transformer_blocks.1.attn1.to_k.weight"][3, 5] = float("nan")

    edit_weights(source, spoil)
    refused(
        source,
        tmp_path / "out",
        r"Tensor 'transformer_blocks\.1\.attn1\.to_k\.weight' .*: the value at \(3, 5\) is nan",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["source", "pipeline"])
def test_an_interrupt_leaves_nothing_under_the_name_of_the_target(request, tmp_path, place):
    def interrupt(*_):
        raise KeyboardInterrupt

    folder = request.getfixturevalue(place)
    with pytest.raises(
        KeyboardInterrupt, match=r"^Interrupted\. 1 of 16 layers are kept; run the same command to"
    ):
        quantize_checkpoint(folder, tmp_path / "out", RECIPE, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", folder.name]
    assert quantize(folder, tmp_path / "out").kept == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", folder.name]
    quantize(folder, tmp_path / "again")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")


# --- loading --------------------------------------------------------------------------------------


def test_loading_a_float_folder_says_what_to_do(source, pipeline):
    for place in (source, pipeline):
        with pytest.raises(
            CheckpointError, match=r"is not a loraq checkpoint: it has no 'loraq\.json'"
        ):
            loraq.load(place)


def test_loading_a_folder_without_a_configuration_points_to_load_into(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32))
    loraq.quantize_(model, "mxfp4", progress=False)
    loraq.save(model, tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"has no 'config\.json'.*`loraq\.load_into`"):
        loraq.load(tmp_path / "plain")


def test_loading_with_a_changed_configuration(source, tmp_path):
    quantize(source, tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", num_layers=1)
    with pytest.raises(CheckpointError, match=r"config\.json' has \d+ bytes"):
        loraq.load(tmp_path / "out")


def test_a_missing_diffusers_gives_the_line_that_installs_it(source, tmp_path, monkeypatch):
    quantize(source, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    install = r'pip install "loraq\[diffusers\]"'
    with pytest.raises(LoraqError, match=install):
        loraq.load(tmp_path / "out")
    with pytest.raises(LoraqError, match=install):
        plan_checkpoint(source, RECIPE)
    with pytest.raises(LoraqError, match=install):
        quantize(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_missing_accelerate_gives_the_same_line(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(LoraqError, match=r'pip install "loraq\[diffusers\]"'):
        plan_checkpoint(source, RECIPE)


def test_load_into_needs_no_diffusers(source, tmp_path, monkeypatch):
    quantize(source, tmp_path / "out")
    target = small_pixart()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    loraq.load_into(target, tmp_path / "out")
    assert len(quantized_layers(target)) == 16
