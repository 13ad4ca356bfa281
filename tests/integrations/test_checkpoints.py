"""Everything a source may be: sharded folders, pipelines, single files in either layout, the
hub; and bad ones.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loraq
from loraq.diffusers import LoraqConfig
from loraq.errors import CheckpointError, LoraqError
from loraq.integrations.checkpoints import (
    locate,
    plan_checkpoint,
    quantize_checkpoint,
)
from loraq.integrations.diffusers import _quiet_diffusers, load_float
from loraq.integrations.single_file import ConvertedReader
from loraq.pipeline.source import list_tensors
from loraq.recipe import Recipe
from loraq.safetensors.header import TensorSpec, encode_header, read_header
from loraq.safetensors.layout import write_shards
from tests.folders import alone, components_of, files_of

pytest.importorskip("diffusers")

RECIPE = replace(Recipe.named("mxfp4+w8a8-r4"), method="lqer", keep="float")
#: Names in the files of the library, and in the original ones.
Z_IMAGE_NAMES = {
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    "attention.to_out.0.": "attention.out.",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def quantize(source, target: Path, **options):
    return quantize_checkpoint(source, target, RECIPE, **{"progress": False, **options})


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A small Z-Image: its original layout has other names and fused q, k and v."""
    folder = tmp_path_factory.mktemp("z-image") / "transformer"
    with _quiet_diffusers() as diffusers:
        torch.manual_seed(0)
        model = diffusers.ZImageTransformer2DModel(
            dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, in_channels=4,
            cap_feat_dim=32, axes_dims=[8, 12, 12], axes_lens=[16, 16, 16],
        )  # fmt: skip
        nn.Module.to(model, torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "transformer"))


@pytest.fixture(scope="module")
def expected(written, tmp_path_factory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("expected") / "out"
    quantize(written, target)
    return files_of(target)


@pytest.fixture
def pipeline(folder, tmp_path) -> Path:
    place = tmp_path / "pipeline"
    shutil.copytree(folder, place / "transformer")
    index = {"transformer": ["diffusers", "ZImage"], "vae": ["diffusers", "AutoencoderKL"]}
    (place / "model_index.json").write_text(json.dumps(index))
    (place / "vae").mkdir()
    (place / "vae" / "weights.safetensors").write_bytes(bytes(range(256)))
    return place


def in_original_layout(
    tensors: dict[str, torch.Tensor], prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Undo what diffusers does to a Z-Image checkpoint: written
    from its names, not with its code.
    """
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in Z_IMAGE_NAMES.items():
            name = name.replace(ours, theirs)
        renamed[prefix + name] = tensor
    for name in [name for name in renamed if name.endswith("attention.to_q.weight")]:
        parts = [renamed.pop(name.replace("to_q", f"to_{part}")) for part in "qkv"]
        renamed[name.replace("to_q", "qkv")] = torch.cat(parts)
    return renamed


# --- kinds of sources -----------------------------------------------------------------------------


def test_streaming_gives_the_files_of_quantizing_in_memory_and_saving(folder, expected, tmp_path):
    model = load_float(folder)
    loraq.quantize_(model, RECIPE, progress=False)
    loraq.save(model, tmp_path / "saved")
    assert files_of(tmp_path / "saved") == expected


def test_it_also_does_with_small_shards(folder, tmp_path):
    model = load_float(folder)
    loraq.quantize_(model, RECIPE, progress=False)
    loraq.save(model, tmp_path / "saved", shard_bytes=20_000)
    quantize(folder, tmp_path / "out", shard_bytes=20_000)
    assert files_of(tmp_path / "saved") == files_of(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    loraq.load(tmp_path / "out")


def test_the_kind_of_source_does_not_change_a_byte(folder, pipeline, expected, tmp_path):
    write_shards(load_file(folder / WEIGHTS), tmp_path, "single")
    kinds = {
        "folder": (folder, {}),
        "file, configuration from a folder": (tmp_path / "single.safetensors", {"config": folder}),
        "file, configuration": (
            str(tmp_path / "single.safetensors"),
            {"config": folder / "config.json"},
        ),
        "file, configuration from a pipeline": (
            tmp_path / "single.safetensors",
            {"config": str(pipeline)},
        ),
    }
    for kind, (source, options) in kinds.items():
        quantize(source, tmp_path / kind, **options)
        assert files_of(tmp_path / kind) == expected, kind
    quantize(pipeline, tmp_path / "whole")
    assert alone(tmp_path / "whole" / "transformer") == expected


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_in_the_original_layout_is_converted(folder, expected, tmp_path, prefix):
    original = in_original_layout(load_file(folder / WEIGHTS), prefix)
    assert any("qkv" in name for name in original)
    save_file(original, tmp_path / "original.safetensors")
    quantize(tmp_path / "original.safetensors", tmp_path / "out", config=folder)
    assert files_of(tmp_path / "out") == expected


#: What stands beside a transformer in files that hold everything.
OF_OTHERS = {
    "vae.decoder.conv_in.weight": torch.full((4, 4, 3, 3), float("nan")),
    "text_encoders.qwen3_4b.transformer.model.embed_tokens.weight": torch.ones(8, 4),
    "text_embedding_projection.weight": torch.ones(4, 4),
}


@pytest.mark.parametrize("original", [True, False])
def test_tensors_of_other_models_in_one_file_are_left_out(folder, expected, tmp_path, original):
    tensors = load_file(folder / WEIGHTS)
    tensors = in_original_layout(tensors, "model.diffusion_model.") if original else tensors
    save_file(tensors | OF_OTHERS, tmp_path / "all.safetensors")
    report = quantize(tmp_path / "all.safetensors", tmp_path / "out", config=folder)
    assert files_of(tmp_path / "out") == expected
    assert report.plan.notes == (
        "3 tensors of the file belong to other models and are left out: "
        f"{', '.join(sorted(OF_OTHERS))}.",
    )


def test_a_file_with_more_of_the_model_than_the_configuration_says_is_refused(folder, tmp_path):
    more = {"layers.7.attention.to_q.weight": torch.ones(64, 64)}
    save_file(load_file(folder / WEIGHTS) | more | OF_OTHERS, tmp_path / "all.safetensors")
    with pytest.raises(
        CheckpointError, match=r"Unexpected keys: layers\.7\.attention\.to_q\.weight\."
    ):
        quantize(tmp_path / "all.safetensors", tmp_path / "out", config=folder)


def test_a_flux_file_in_the_original_layout_fits_its_class(tmp_path):
    """One block of each kind at full width, which the converter
    demands; the file is a hole, its numbers unread.
    """
    width, mlp = 3072, 12288
    shapes = {"img_in": (width, 64), "txt_in": (width, 4096), "final_layer.linear": (64, width)}
    shapes |= {"final_layer.adaLN_modulation.1": (2 * width, width)}
    for name, n_in in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        shapes |= {f"{name}.in_layer": (width, n_in), f"{name}.out_layer": (width, width)}
    for side in ("double_blocks.0.img", "double_blocks.0.txt"):
        shapes |= {f"{side}_mod.lin": (6 * width, width), f"{side}_attn.qkv": (3 * width, width)}
        shapes |= {
            f"{side}_attn.proj": (width, width),
            f"{side}_mlp.0": (mlp, width),
            f"{side}_mlp.2": (width, mlp),
        }
    shapes |= {
        "single_blocks.0.linear1": (3 * width + mlp, width),
        "single_blocks.0.linear2": (width, width + mlp),
    }
    shapes |= {"single_blocks.0.modulation.lin": (3 * width, width)}
    specs = {f"{name}.weight": TensorSpec("BF16", shape) for name, shape in shapes.items()}
    specs |= {f"{name}.bias": TensorSpec("BF16", shape[:1]) for name, shape in shapes.items()}
    for norm in (
        "double_blocks.0.img_attn.norm",
        "double_blocks.0.txt_attn.norm",
        "single_blocks.0.norm",
    ):
        specs |= {
            f"{norm}.{part}_norm.scale": TensorSpec("BF16", (128,)) for part in ("query", "key")
        }
    with (tmp_path / "flux.safetensors").open("wb") as file:
        first, _ = encode_header(specs)
        file.write(first)
        file.truncate(len(first) + sum(spec.nbytes for spec in specs.values()))
    config = {
        "_class_name": "FluxTransformer2DModel",
        "num_layers": 1,
        "num_single_layers": 1,
        "guidance_embeds": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    located = locate(tmp_path / "flux.safetensors", tmp_path / "config.json")
    source = located.open(RECIPE).sources[""]
    assert source.reader.shape("single_transformer_blocks.0.proj_mlp.weight") == (mlp, width)
    assert source.reader.read("transformer_blocks.0.attn.to_k.bias").shape == (width,)
    assert "transformer_blocks.0.attn.add_v_proj" in [layer.name for layer in source.plan.quantized]


@pytest.mark.slow
def test_workers_convert_for_themselves(folder, expected, tmp_path):
    save_file(in_original_layout(load_file(folder / WEIGHTS)), tmp_path / "original.safetensors")
    quantize(tmp_path / "original.safetensors", tmp_path / "out", config=folder, workers=2)
    assert files_of(tmp_path / "out") == expected


def test_splits_joins_and_slices_wait_until_they_are_read(tmp_path, monkeypatch):
    def convert(checkpoint, **_):
        shift, scale = checkpoint.pop("mod").chunk(2, dim=0)
        q, *_ = torch.split(checkpoint.pop("fused"), (2, 3, 1), dim=0)
        row = checkpoint.pop("row")
        assert row.shape == (1, 4)
        return {"swapped": torch.cat([scale, shift], dim=0), "q": torch.cat([q]), "row": row[0],
                "t": row.T, "wide": row.unsqueeze(0).to(torch.float64), "none": None}  # fmt: skip

    tensors = {
        "mod": torch.arange(8.0).view(4, 2),
        "fused": torch.arange(12.0).view(6, 2),
        "row": torch.ones(1, 4),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with _quiet_diffusers():
        from diffusers.loaders import single_file_model
    monkeypatch.setitem(
        single_file_model.SINGLE_FILE_LOADABLE_CLASSES,
        "FluxTransformer2DModel",
        {"checkpoint_mapping_fn": convert},
    )
    files = loraq.safetensors.reader.ShardReader(tmp_path / "a.safetensors")
    reads = []
    read = type(files).read
    monkeypatch.setattr(
        type(files), "read", lambda self, name: reads.append(name) or read(self, name)
    )
    reader = ConvertedReader(files, "FluxTransformer2DModel", {})
    wanted = {name: tensor for name, tensor in convert(dict(tensors)).items() if tensor is not None}
    assert reader.names == list(wanted)
    assert {name: reader.shape(name) for name in wanted} == {
        name: tuple(t.shape) for name, t in wanted.items()
    }
    assert reader.dtype("wide") == "F64"
    assert reads == []
    for name, tensor in wanted.items():
        assert torch.equal(reader.read(name), tensor)
        assert reader.read(name).is_contiguous()
    assert torch.equal(reader.read("swapped"), torch.tensor([[4.0, 5], [6, 7], [0, 1], [2, 3]]))


def test_names_that_nothing_converts(folder, tmp_path):
    save_file({"what.is.this": torch.zeros(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"do not fit its config\.json\. Missing keys: .*Unexpected keys: what",
    ):
        quantize(tmp_path / "odd.safetensors", tmp_path / "out", config=folder)
    with _quiet_diffusers() as diffusers:
        config = dict(
            diffusers.PixArtTransformer2DModel.load_config(folder)
            | {"_class_name": "DiTTransformer2DModel"}
        )
    (tmp_path / "dit.json").write_text(
        json.dumps({k: v for k, v in config.items() if k.startswith("_")})
    )
    with pytest.raises(
        CheckpointError,
        match=r"do not have the names of DiTTransformer2DModel, and .* no converter",
    ):
        quantize(tmp_path / "odd.safetensors", tmp_path / "out", config=tmp_path / "dit.json")
    (tmp_path / "flux.json").write_text(
        '{"_class_name": "FluxTransformer2DModel", "num_layers": 1}'
    )
    with pytest.raises(
        CheckpointError,
        match=r"converter for FluxTransformer2DModel does not understand .*`--config`",
    ):
        quantize(tmp_path / "odd.safetensors", tmp_path / "out", config=tmp_path / "flux.json")


def test_a_file_without_a_configuration_is_planned_from_its_tensors(folder, tmp_path):
    plan = plan_checkpoint(folder / WEIGHTS, RECIPE)
    assert "layers.0.attention.to_q" in [layer.name for layer in plan.quantized]
    quantize(folder / WEIGHTS, tmp_path / "out")
    assert "config.json" not in files_of(tmp_path / "out")
    loaded = load_float(folder)
    loraq.load_into(loaded, tmp_path / "out")


def test_a_configuration_without_a_class_is_copied_with_the_mark(folder, tmp_path):
    (folder / "config.json").write_text('{"architectures": ["Something"]}')
    quantize(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {
        "architectures": ["Something"],
        "quantization_config": {"quant_method": "loraq"},
    }


def test_other_components_can_be_linked(pipeline, tmp_path):
    quantize(pipeline, tmp_path / "copied")
    quantize(pipeline, tmp_path / "linked", link=True)
    assert files_of(tmp_path / "copied") == files_of(tmp_path / "linked")
    original = (pipeline / "vae" / "weights.safetensors").stat().st_ino
    assert (tmp_path / "linked" / "vae" / "weights.safetensors").stat().st_ino == original
    assert (tmp_path / "copied" / "vae" / "weights.safetensors").stat().st_ino != original


def in_the_cache(pipeline: Path, place: Path) -> tuple[Path, Path]:
    """Lay a pipeline out as the hub's cache does: links from a snapshot to blobs."""
    repository = place / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    blobs.mkdir(parents=True)
    for name in files_of(pipeline):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        blob = (pipeline / name).rename(blobs / name.replace("/", "-"))
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot, blobs


def test_linking_resolves_the_links_of_the_hub_cache(pipeline, tmp_path):
    snapshot, blobs = in_the_cache(pipeline, tmp_path)
    quantize(snapshot, tmp_path / "out", link=True)
    linked = tmp_path / "out" / "vae" / "weights.safetensors"
    assert not linked.is_symlink()
    assert linked.stat().st_ino == (blobs / "vae-weights.safetensors").stat().st_ino


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("change", ["deleted", "changed"])
def test_a_component_that_changes_during_a_run_is_not_published(pipeline, tmp_path, link, change):
    file = tmp_path / ".out.partial" / "files" / "vae" / "weights.safetensors"

    def meddle(done, *_):
        if done == 1 and change == "deleted":
            file.unlink()
        elif done == 1:
            file.write_bytes(bytes(256))

    with pytest.raises(
        CheckpointError, match=r"vae/weights\.safetensors' (is missing|was changed)"
    ):
        quantize_checkpoint(pipeline, tmp_path / "out", RECIPE, link=link, progress=meddle)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("linked", ["vae/key", "transformer/config.json", f"transformer/{WEIGHTS}"])
def test_a_link_out_of_a_pipeline_is_refused_before_work(pipeline, tmp_path, linked):
    (tmp_path / "secret").write_bytes(b"private")
    (pipeline / linked).unlink(missing_ok=True)
    (pipeline / linked).symlink_to(tmp_path / "secret")
    name = linked if linked.startswith("vae") else Path(linked).name
    refused(pipeline, tmp_path, rf"'{name}' \(a link out of it, to '.*secret'\)")


def test_a_pipe_or_a_circle_in_a_pipeline_is_refused_before_work(pipeline, tmp_path):
    os.mkfifo(pipeline / "vae" / "pipe")
    (pipeline / "vae" / "again").symlink_to("..")
    refused(pipeline, tmp_path, r"'vae/again' \(a link to a folder .*'vae/pipe' \(a pipe\)")


def test_a_pipeline_in_the_cache_of_the_hub_is_a_source(pipeline, expected, tmp_path):
    others = {name: content for name, content in files_of(pipeline).items() if "/" not in name}
    snapshot, _ = in_the_cache(pipeline, tmp_path)
    quantize(snapshot, tmp_path / "out")
    assert alone(tmp_path / "out" / "transformer") == expected
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert {name: (tmp_path / "out" / name).read_bytes() for name in others} == others


@pytest.mark.parametrize("where", ["source", "target"])
def test_a_target_with_another_component_is_not_complete(pipeline, tmp_path, where):
    quantize(pipeline, tmp_path / "out")
    assert quantize(pipeline, tmp_path / "out").already_complete
    path = (pipeline if where == "source" else tmp_path / "out") / "vae" / "weights.safetensors"
    before = path.stat()
    path.write_bytes(bytes(256))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match="is not empty"):
        quantize(pipeline, tmp_path / "out")


def test_a_resumed_pipeline_has_the_component_that_is_there_now(pipeline, tmp_path):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    path = pipeline / "vae" / "weights.safetensors"
    before = path.stat()
    with pytest.raises(KeyboardInterrupt):
        quantize(pipeline, tmp_path / "out", progress=interrupt)
    path.write_bytes(b"x" * 256)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert quantize(pipeline, tmp_path / "out").kept == 1
    assert (tmp_path / "out" / "vae" / "weights.safetensors").read_bytes() == b"x" * 256
    manifest = json.loads((tmp_path / "out" / "transformer" / "loraq.json").read_text())
    others = {name: files_of(pipeline)[name] for name in manifest["components"]}
    assert manifest["components"] == components_of(others)


def test_an_interrupted_pipeline_goes_on(pipeline, expected, tmp_path):
    calls = []

    def interrupt(*event):
        calls.append(event)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="2 of 31 layers are kept"):
        quantize(pipeline, tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()
    assert quantize(pipeline, tmp_path / "out").kept == 2
    assert alone(tmp_path / "out" / "transformer") == expected
    assert (tmp_path / "out" / "vae" / "weights.safetensors").read_bytes() == bytes(range(256))


def test_a_module_in_two_places_is_stored_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared, "d": nn.Linear(4, 4)})})
    expected, tied = list_tensors(
        model, ["a.weight", "a.bias", "b.d.weight", "b.d.bias", "b.c.weight"]
    )
    assert tied == {"b.c.weight": "a.weight", "b.c.bias": "a.bias"}
    assert list(expected) == ["a.weight", "a.bias", "b.c.weight", "b.d.weight", "b.d.bias"]


# --- the hub --------------------------------------------------------------------------------------


def test_a_repository_of_the_hub_comes_from_its_cache(
    pipeline, folder, expected, tmp_path, monkeypatch
):
    """A cache as the hub's library lays it out, read by that library without a network."""
    for name, content in (("org/pipe", pipeline), ("org/alone", folder)):
        place = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        shutil.copytree(content, place / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    quantize("org/alone", tmp_path / "a")
    assert files_of(tmp_path / "a") == expected
    quantize(Path("org/pipe"), tmp_path / "b")
    assert alone(tmp_path / "b" / "transformer") == expected
    with pytest.raises(
        CheckpointError, match="'org/unknown' is not a file or folder here, and cannot be fetched"
    ):
        quantize("org/unknown", tmp_path / "c")


def test_only_what_is_needed_is_fetched(pipeline, folder, tmp_path, monkeypatch):
    asked = []

    def download(repository, *, allow_patterns, ignore_patterns=None):
        asked.append((repository, allow_patterns, ignore_patterns))
        return str(pipeline if repository == "org/pipe" else folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    plan_checkpoint("org/pipe", RECIPE)
    plan_checkpoint("org/alone", RECIPE)
    assert [patterns[-1] for _, patterns, _ in asked] == [
        "*.model",
        "*/*.safetensors",
        "*.model",
        "*.safetensors",
    ]
    assert "*.fp16.safetensors" in asked[1][2]


def test_a_path_that_exists_wins_over_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)  # a call would be a TypeError
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    folder.rename(tmp_path / "org" / "name")
    quantize("org/name", tmp_path / "out")


def test_a_missing_hub_library_gives_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(LoraqError, match=r'pip install "loraq\[diffusers\]"'):
        quantize("org/name", tmp_path / "out")


# --- bad input, refused before any long work ------------------------------------------------------


def refused(source: Path, tmp_path: Path, match: str, **options) -> None:
    with pytest.raises(CheckpointError, match=match):
        quantize(
            source,
            tmp_path / "target",
            progress=lambda *_: pytest.fail("work has started"),
            **options,
        )
    assert not [path for path in tmp_path.iterdir() if "target" in path.name]


def edit(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def sharded(folder: Path) -> Path:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    write_shards(tensors, folder, "diffusion_pytorch_model", 30_000)
    return folder / f"{WEIGHTS}.index.json"


def test_a_missing_shard(folder, tmp_path):
    sharded(folder)
    next(iter(sorted(folder.glob("*-00002-of-*")))).unlink()
    refused(folder, tmp_path, r"Shard '.*-00002-of-.*' is missing from")


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin"]
)
def test_an_index_that_points_elsewhere(folder, tmp_path, file):
    index = sharded(folder)
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = file
    index.write_text(json.dumps(content))
    refused(
        folder,
        tmp_path,
        r"names the file '.*'\. Only \.safetensors files beside the index are read",
    )


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(64, 64, dtype=torch.uint8), "is U8.* Float weights of 16 bits or more"),
        (torch.zeros(64, 32), r"has shape \(64, 32\), config\.json wants \(64, 64\)"),
        (
            torch.full((64, 64), float("nan")),
            r"cannot be used: the value at \(0, 0\) is nan",
        ),
        (torch.full((64, 64), float("-inf")), r"cannot be used: the value at \(0, 0\) is -inf"),
    ],
)
@pytest.mark.parametrize("generic", [False, True])
def test_weights_that_cannot_be_used(folder, tmp_path, tensor, match, generic):
    edit(
        folder / WEIGHTS, lambda tensors: tensors.update({"layers.1.attention.to_k.weight": tensor})
    )
    if "wants" in match and generic:
        return  # without a configuration nothing says what is wanted
    refused(
        folder / WEIGHTS if generic else folder,
        tmp_path,
        rf"[Tt]ensor 'layers\.1\.attention\.to_k\.weight' {match}",
    )


def test_a_single_bad_number_in_what_is_only_copied_is_told_by_every_road(folder, tmp_path, caplog):
    name = "layers.0.attention_norm1.weight"
    with _quiet_diffusers() as diffusers:
        kind = diffusers.ZImageTransformer2DModel
    edit(folder / WEIGHTS, lambda tensors: tensors[name].view(-1)[-1:].fill_(float("inf")))
    quantize(folder, tmp_path / "out")
    loaded = kind.from_pretrained(folder)
    loraq.quantize_(loaded, RECIPE, progress=False)
    ways = [
        kind.from_pretrained(tmp_path / "out"),
        loaded,
        kind.from_pretrained(folder, quantization_config=LoraqConfig(RECIPE)),
    ]
    assert all(model.get_parameter(name)[-1].isinf() for model in ways)
    told = [text for text in caplog.messages if f"'{name}' (the value at (63,) is inf" in text]
    assert len(told) == 3


def test_an_unknown_architecture(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "TomorrowTransformer"}))
    refused(
        folder,
        tmp_path,
        r"names the class 'TomorrowTransformer', which diffusers \d.* does not have",
    )


def test_a_header_of_absurd_length(folder, tmp_path):
    with (folder / WEIGHTS).open("r+b") as file:
        file.write((2**50).to_bytes(8, "little"))
    refused(folder, tmp_path, rf"a header of {2**50} is announced")


def test_offsets_that_overlap(folder, tmp_path):
    text = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(text[:8], "little")
    header = json.loads(text[8 : 8 + length])
    names = [
        name for name, spec in read_header(folder / WEIGHTS).specs.items() if spec.shape == (64, 64)
    ]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    raw = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + text[8 + length :])
    refused(folder, tmp_path, "starts at byte")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    refused(
        tmp_path / "model.ckpt",
        tmp_path,
        r"is not a \.safetensors file\. Other weight files are not read",
    )


def test_a_quantized_configuration(folder, tmp_path):
    (tmp_path / "q.json").write_text('{"_class_name": "X", "quantization_config": {}}')
    refused(folder / WEIGHTS, tmp_path, "is quantized already", config=tmp_path / "q.json")


def test_a_link_across_disks(pipeline, tmp_path, monkeypatch):
    if os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is not another disk")
    target = Path("/dev/shm") / f"loraq-test-{os.getpid()}"
    with pytest.raises(
        CheckpointError, match=r"on another disk than the source.*Leave `--link` out"
    ):
        quantize(pipeline, target, link=True)
    assert not target.exists()
