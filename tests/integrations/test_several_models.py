"""Pipelines with several models: all denoisers in one run, text encoders on request; what is
chosen, what is left, what is written, and what is refused.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import loraq
from loraq.checkpoint.inspect import inspect_folder
from loraq.cli import main
from loraq.errors import CalibrationError, CheckpointError, LoraqError, RecipeError
from loraq.integrations.checkpoints import plan_checkpoint, quantize_checkpoint
from loraq.integrations.diffusers import load_float
from loraq.layers import linear_layers, quantized_layers
from loraq.recipe import Recipe
from loraq.rules import Rule
from loraq.safetensors.header import read_header
from loraq.stats import ActivationStats
from tests.folders import alone, files_of

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

RECIPE = replace(Recipe.named("int4-a16+w8a8-r4"), method="lqer", keep="float")
DENOISERS = ("transformer", "transformer_2")
WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 1,
}
T5 = {"vocab_size": 32, "d_model": 64, "d_kv": 32, "d_ff": 256, "num_layers": 4, "num_heads": 2}


def wan(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Module.to(diffusers.WanTransformer3DModel(**WAN).eval(), torch.bfloat16)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A pipeline of two transformers, a large text encoder and a scheduler; only read."""
    place = tmp_path_factory.mktemp("pipelines") / "float"
    for seed, name in enumerate(DENOISERS):
        wan(seed).save_pretrained(place / name)
    torch.manual_seed(2)
    transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)).save_pretrained(
        place / "text_encoder"
    )
    diffusers.UniPCMultistepScheduler().save_pretrained(place / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": 0.875,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": [None, None],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": [None, None],
    }
    (place / "model_index.json").write_text(json.dumps(index))
    return place


@pytest.fixture
def source(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "source"))


@pytest.fixture(scope="module")
def made(written, tmp_path_factory) -> Path:
    """What one run makes of both transformers; only read."""
    target = tmp_path_factory.mktemp("made") / "out"
    quantize(written, target)
    return target


@pytest.fixture(scope="module")
def expected(written, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The files of each model, quantized alone."""
    place = tmp_path_factory.mktemp("alone")
    for name in (*DENOISERS, "text_encoder"):
        quantize(written / name, place / name)
    return {name: files_of(place / name) for name in (*DENOISERS, "text_encoder")}


def quantize(source: Path, target: Path, recipe: Recipe = RECIPE, **options):
    return quantize_checkpoint(source, target, recipe, **{"progress": False, **options})


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeeds(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(source: Path, tmp_path: Path, match: str, error=CheckpointError, **options) -> None:
    with pytest.raises(error, match=match):
        quantize(
            source,
            tmp_path / "target",
            progress=lambda *_: pytest.fail("work has started"),
            **options,
        )
    assert not [path for path in tmp_path.iterdir() if "target" in path.name]


def edit_weight(root: Path, factor: float) -> None:
    file = root / "transformer_2" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.0.attn1.to_q.weight"][0] *= factor
    save_file(tensors, file, {"format": "pt"})


def edit_index(root: Path, **changes: object) -> None:
    file = root / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- the same bytes -------------------------------------------------------------------------------


def test_each_transformer_gets_the_files_that_it_gets_alone(written, made, expected):
    for name in DENOISERS:
        assert alone(made / name) == expected[name]
    assert expected["transformer"] != expected["transformer_2"]
    before, after = files_of(written), files_of(made)
    rest = {name for name in before if not name.startswith(tuple(f"{each}/" for each in DENOISERS))}
    assert {name: after[name] for name in rest} == {name: before[name] for name in rest}
    assert after.keys() - rest == {f"{n}/{file}" for n in DENOISERS for file in expected[n]}


def test_all_takes_the_text_encoders_too(written, expected, tmp_path):
    for asked in ("all", ["text_encoder", "transformer", "transformer_2"]):
        report = quantize(written, tmp_path / "out", components=asked, overwrite=True)
        assert list(report.components) == ["text_encoder", *DENOISERS]
        for name in report.components:
            assert alone(tmp_path / "out" / name) == expected[name]
    assert report.already_complete
    assert report.plan.notes == ()


def test_small_shards_and_workers_change_nothing_else(written, tmp_path):
    options = {"shard_bytes": 10_000}
    quantize(written, tmp_path / "out", **options)
    for name in DENOISERS:
        quantize(written / name, tmp_path / name, **options)
        assert alone(tmp_path / "out" / name) == files_of(tmp_path / name)


def test_each_model_shares_its_own_budget(written, tmp_path):
    recipe = replace(Recipe.named("int4-a16+w8a8"), method="lqer", budget="6.0")
    recipe = replace(recipe, allocation="greedy")
    quantize(written, tmp_path / "out", recipe)
    quantize(written / "transformer_2", tmp_path / "alone", recipe)
    assert alone(tmp_path / "out" / "transformer_2") == files_of(tmp_path / "alone")
    planned = plan_checkpoint(written, recipe, progress=False)
    assert planned.components["transformer_2"] == plan_checkpoint(
        written / "transformer_2", recipe, progress=False
    )


# --- one report, one journal ----------------------------------------------------------------------


def test_one_plan_one_report_one_list_of_layers(written, tmp_path):
    shown = []
    report = quantize(written, tmp_path / "out", progress=lambda *event: shown.append(event))
    names = {f"{name}/{layer}" for name in DENOISERS for layer in linear_layers(wan(0))}
    planned = plan_checkpoint(written, RECIPE)
    assert planned.components == report.plan.components
    assert {layer.name for layer in planned.layers} == names
    assert [layer.name for layer in planned.quantized] == [layer.name for layer in report.layers]
    assert sorted(name for _, _, name, _ in shown) == sorted(layer.name for layer in report.layers)
    assert {total for _, total, _, _ in shown} == {len(report.layers)}
    sizes = {layer.name: layer.shape[0] * layer.shape[1] for layer in report.layers}
    order = [sizes[name] for _, _, name, _ in shown]
    assert order == sorted(order, reverse=True)
    first = report.components["transformer"]
    assert [layer.name for layer in first.layers] == [job.name for job in first.plan.quantized]
    assert report.plan.nbytes == sum(each.plan.nbytes for each in report.components.values())


@pytest.mark.parametrize("after", [1, 5, 21])
def test_an_interrupted_run_goes_on(written, made, tmp_path, after):
    done = []

    def stop(*event: object) -> None:
        done.append(event[2])
        if len(done) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=rf"{after} of 22 layers are kept"):
        quantize(written, tmp_path / "out", progress=stop)
    rest = []
    report = quantize(written, tmp_path / "out", progress=lambda *event: rest.append(event[2]))
    assert report.kept == after == sum(each.kept for each in report.components.values())
    assert not set(done) & set(rest)
    assert len(done + rest) == 22
    assert files_of(tmp_path / "out") == files_of(made)


def test_other_components_are_other_settings(written, tmp_path):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(written, tmp_path / "out", progress=stop)
    for components in ("transformer", "all"):
        with pytest.raises(CheckpointError, match="of a run with other settings"):
            quantize(written, tmp_path / "out", components=components)


def test_a_changed_weight_is_named_with_its_component(source, tmp_path):
    def stop(done: int, *_: object) -> None:
        if done == 22:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", progress=stop)
    edit_weight(source, 2)
    with pytest.raises(
        CheckpointError, match=r"layer 'transformer_2/blocks\.0\.attn1\.to_q' is not what it was"
    ):
        quantize(source, tmp_path / "out")


def test_a_byte_that_something_else_changes_is_named_with_its_component(written, tmp_path):
    def change(done: int, *_: object) -> None:
        if done == 22:
            folder = tmp_path / ".out.partial" / "files" / "transformer_2"
            (file,) = folder.glob("*.safetensors")
            raw = bytearray(file.read_bytes())
            raw[read_header(file).offsets["blocks.0.attn1.to_q.weight_packed"]] ^= 1
            file.write_bytes(raw)

    with pytest.raises(
        CheckpointError, match=r"something else has changed transformer_2/blocks\.0\.attn1\.to_q\."
    ):
        quantize(written, tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_ended_is_complete_and_is_recognised_as_ours(source, tmp_path):
    quantize(source, tmp_path / "out")
    again = quantize(source, tmp_path / "out")
    assert again.already_complete
    assert all(report.already_complete for report in again.components.values())
    other = replace(RECIPE, method="rtn", scheme=Recipe.named("int4-a16").scheme)
    with pytest.raises(CheckpointError, match="is not empty"):
        quantize(source, tmp_path / "out", other)
    assert not quantize(source, tmp_path / "out", other, overwrite=True).already_complete
    with pytest.raises(CheckpointError, match="is not empty"):
        quantize(source, tmp_path / "out", other, components="transformer")


@pytest.mark.parametrize("name", ["transformer/config.json", "transformer_2/loraq.json", "README"])
def test_a_folder_with_something_else_is_not_complete(source, tmp_path, name):
    (source / "README").write_text("old")
    quantize(source, tmp_path / "out")
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(CheckpointError, match="is not empty"):
        quantize(source, tmp_path / "out")


def test_the_space_for_all_is_asked_for_before_work(written, tmp_path, monkeypatch):
    needed = sum(
        path.stat().st_size
        for path in written.rglob("*")
        if path.is_file() and path.parent.name not in DENOISERS
    )
    usage = type("Usage", (), {"free": needed + 30_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    quantize(written, tmp_path / "one", components="transformer_2", link=True)
    refused(written, tmp_path, "GB are needed")


# --- what is chosen -------------------------------------------------------------------------------


def test_what_is_left_is_said(written, source, tmp_path):
    (note,) = quantize(written, tmp_path / "a").plan.notes
    assert note.startswith("Left as it is: text_encoder (UMT5EncoderModel). `--components`")
    report = quantize(written, tmp_path / "b", components="transformer_2")
    assert report.components == {}
    assert (
        "Left as it is: text_encoder (UMT5EncoderModel), transformer (Wan" in report.plan.notes[0]
    )
    assert [layer.name for layer in report.layers] == [j.name for j in report.plan.quantized]
    assert not (tmp_path / "b" / "transformer" / "loraq.json").exists()


def test_what_the_index_does_not_name_stays_behind(source, tmp_path):
    shutil.copytree(source / "transformer", source / "transformer_old")
    save_file({"a": torch.ones(2)}, source / "all_in_one.safetensors")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("x")
    (source / "LICENSE").write_text("free")
    edit_index(source, unet=["diffusers", "UNet2DConditionModel"])
    (source / "unet").mkdir()
    edit_index(source, unet=[None, None])
    report = quantize(source, tmp_path / "out")
    assert report.plan.notes[-1] == (
        "Not part of the pipeline, and left out: .git, all_in_one.safetensors, transformer_old, "
        "unet."
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("LICENSE", "model_index.json", "scheduler", "text_encoder", *DENOISERS)
    ]


@pytest.mark.parametrize(
    ("name", "entry", "is_chosen"),
    [
        ("unconditional_transformer", ["diffusers", "Something"], True),
        ("unet", ["diffusers", "Something"], True),
        ("prior", ["diffusers", "PriorTransformer"], True),
        ("decoder", ["stable_cascade", "StableCascadeUNet"], True),
        ("prior", ["diffusers", "Something"], False),
        ("vae", ["diffusers", "AutoencoderKL"], False),
        ("controlnet", ["diffusers", "WanControlnet"], False),
        ("image_encoder", ["transformers", "CLIPVisionModel"], False),
        ("safety_checker", ["stable_diffusion", "StableDiffusionSafetyChecker"], False),
    ],
)
def test_a_denoiser_is_known_by_its_name_or_class(source, tmp_path, name, entry, is_chosen):
    (source / "transformer_2").rename(source / name)
    edit_index(source, transformer_2=[None, None], **{name: entry})
    plan = plan_checkpoint(source, RECIPE)
    assert list(plan.components) == (["transformer", name] if is_chosen else [])
    assert list(plan_checkpoint(source, RECIPE, components=name).components) == []


@pytest.mark.parametrize(
    ("components", "match"),
    [
        ("vae_2", r"no component vae_2\. It has scheduler, text_encoder, transformer, transf"),
        ("transformer, transformer3", "no component transformer3"),
        ("tokenizer", "no component tokenizer"),
        ([], "no component"),
        ("", "no component"),
        ("scheduler", r"has no model in scheduler: .* there are text_encoder \(UMT5"),
    ],
)
def test_a_component_that_is_not_there(written, tmp_path, components, match):
    refused(written, tmp_path, match, components=components)
    with pytest.raises(CheckpointError, match=match):
        plan_checkpoint(written, RECIPE, components=components)


def test_a_component_that_the_index_names_and_nobody_downloaded(source, tmp_path):
    shutil.rmtree(source / "transformer_2")
    refused(source, tmp_path, "has no model in transformer_2: .*Download it again")
    quantize(source, tmp_path / "out", components="transformer")


def test_one_model_has_no_components(written, tmp_path):
    refused(written / "transformer", tmp_path, "is no pipeline", components="all")
    with pytest.raises(LoraqError, match="is one model and has no components"):
        loraq.quantize_(wan(0), RECIPE, components="all", progress=False)


def test_an_error_says_of_which_component_it_is(source, tmp_path):
    edit_weight(source, torch.nan)
    refused(source, tmp_path, r"Component 'transformer_2': Tensor 'blocks\.0\.attn1\.to_q\.weight'")
    nothing = replace(RECIPE, rules=(Rule("*", skip=True),))
    with pytest.raises(RecipeError, match="Component 'transformer': Nothing to quantize"):
        quantize(source, tmp_path / "target", nothing)


def test_one_configuration_is_not_of_two_models(written, tmp_path):
    config = written / "transformer" / "config.json"
    refused(
        written, tmp_path, "has 2 models to quantize: transformer, transformer_2", config=config
    )
    quantize(written, tmp_path / "out", components="transformer_2", config=config)


def test_a_variant_counts_where_a_component_has_it(source, tmp_path):
    name = "diffusion_pytorch_model{}.safetensors"
    shutil.copy(source / "transformer_2" / name.format(""), source / "transformer_2" / "kept")
    (source / "transformer" / name.format("")).rename(source / "transformer" / name.format(".fp16"))
    report = quantize(source, tmp_path / "out", variant="fp16")
    assert report.plan.notes[0] == (
        "transformer_2 has no weights of variant 'fp16': its default is used."
    )
    assert list(report.components) == list(DENOISERS)
    refused(source, tmp_path, "no weights of the variant 'ema'", variant="ema")


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_are_given_by_component(written, expected, tmp_path):
    recipe = Recipe.from_dict({"scheme": "int4-a16+w8a8-r4", "method": "gptq"})
    jobs = plan_checkpoint(written / "transformer", recipe).quantized
    stats = {
        name: {job.name: ActivationStats(9, (i + 1) * torch.eye(job.shape[1])) for job in jobs}
        for i, name in enumerate(DENOISERS)
    }
    refused(
        written, tmp_path, "2 are quantized: transformer, transformer_2", CalibrationError,
        stats=stats["transformer"],
    )  # fmt: skip
    refused(
        written, tmp_path, "statistics of text_encoder, which is not quant", CalibrationError,
        stats={"text_encoder": stats["transformer"]},
    )  # fmt: skip
    with pytest.raises(CalibrationError, match=r"Component 'transformer_2': Method 'gptq' needs"):
        quantize(written, tmp_path / "target", recipe, stats={"transformer": stats["transformer"]})
    files = {name: tmp_path / f"{name}.safetensors" for name in DENOISERS}
    for name, file in files.items():
        loraq.save_stats(stats[name], file)
    quantize(written, tmp_path / "a", recipe, stats=stats)
    quantize(written, tmp_path / "b", recipe, stats=files)
    quantize(written / "transformer_2", tmp_path / "alone", recipe, stats=stats["transformer_2"])
    assert alone(tmp_path / "a" / "transformer_2") == files_of(tmp_path / "alone")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    given = [part for name, file in files.items() for part in ("--stats", f"{name}={file}")]
    arguments = ("--method", "gptq", "--recipe", "int4-a16+w8a8-r4")
    succeeds("quantize", written, tmp_path / "c", *arguments, *given)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "c")
    result = run("quantize", written, tmp_path / "d", *arguments, "--stats", files["transformer"])
    assert "Give them by component (`--stats NAME=FILE`" in result.stderr
    assert run("quantize", written, tmp_path / "d", "--stats", "a=b", "--stats", "c").exit_code == 2


# --- folders that are quantized, wholly or in part ------------------------------------------------


def test_a_quantized_pipeline_is_refused_and_its_components_named(made, tmp_path):
    refused(made, tmp_path, r"is quantized already \(transformer, transformer_2\)")
    refused(made, tmp_path, r"quantized already \(transformer\)", components="transformer")


def test_of_a_pipeline_that_is_quantized_in_part_the_rest_is_quantized(
    written, made, expected, tmp_path
):
    report = quantize(made, tmp_path / "a", components="text_encoder")
    assert alone(tmp_path / "a" / "text_encoder") == expected["text_encoder"]
    assert not report.components
    report = quantize(made, tmp_path / "b", components="all")
    assert report.plan.notes[0].startswith("Quantized already, and left as it is: transformer (Wan")
    for folder in (tmp_path / "a", tmp_path / "b"):
        found = inspect_folder(folder)
        assert list(found.manifests) == ["text_encoder", *DENOISERS]
        assert {name.partition("/")[0] for name in found.others} == {
            *("model_index.json", "scheduler")
        }


# --- looking at it --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("rm transformer_2", "'transformer_2/config.json' is missing"),
        ("rm transformer_2/loraq.json", "transformer_2' is not a loraq checkpoint"),
        ("edit transformer_2/config.json", "config.json' was changed|has .* bytes"),
        ("edit scheduler/scheduler_config.json", "'scheduler/scheduler_config.json' was changed"),
        ("rm text_encoder/model.safetensors", "'text_encoder/model.safetensors' is missing"),
    ],
)
@pytest.mark.parametrize("inner", ["", "transformer"])
def test_inspect_finds_what_is_missing_or_changed(made, tmp_path, change, match, inner):
    root = Path(shutil.copytree(made, tmp_path / "out"))
    assert len(inspect_folder(root / inner).manifests) == (1 if inner else 2)
    verb, name = change.split()
    if verb == "edit":
        text = (root / name).read_text()
        (root / name).write_text(text.replace("{", "{ ", 1))
    elif (root / name).is_dir():
        shutil.rmtree(root / name)
    else:
        (root / name).unlink()
    with pytest.raises(CheckpointError, match=match):
        inspect_folder(root / inner)


def test_a_model_that_is_quantized_anew_in_its_place_is_a_part_of_the_pipeline(
    written, made, tmp_path
):
    root = Path(shutil.copytree(made, tmp_path / "out"))
    other = replace(RECIPE, method="rtn", scheme=Recipe.named("int4-a16").scheme)
    quantize(written / "transformer_2", root / "transformer_2", other, overwrite=True)
    assert list(inspect_folder(root).manifests) == list(DENOISERS)


def test_the_command_shows_all_models(written, made):
    text = succeeds("inspect", made)
    assert text.splitlines()[0] == "transformer:"
    assert "\ntransformer_2:\n" in text
    assert text.count("11 quantized layers, ") == 2
    assert "So are the other files of the pipeline: " in text
    document = json.loads(succeeds("inspect", made, "--json"))
    assert list(document["models"]) == list(DENOISERS)
    assert document["models"]["transformer_2"]["layers"]["blocks.0.attn1.to_q"]["shape"] == [32, 32]
    assert document["components"]["checked"]
    assert list(json.loads(succeeds("inspect", made, "--memory", "--json"))["memory"]) == list(
        DENOISERS
    )
    text = succeeds("compare", written, made)
    assert "transformer_2/blocks.0.attn1.to_q" in text
    assert "Mean relative error of 22 layers" in text


def test_the_command_reports_each_component(written, made, tmp_path):
    arguments = ("--recipe", "int4-a16", "--method", "rtn", "--components", "transformer_2,text_enc"
                 "oder")  # fmt: skip
    text = succeeds("quantize", written, tmp_path / "out", *arguments)
    assert text.splitlines()[0].startswith("text_encoder: ")
    assert text.splitlines()[1].startswith("transformer_2: 11 layers quantized, 5 kept, ")
    document = json.loads(succeeds("quantize", written, tmp_path / "out", *arguments, "--json"))
    assert document["already_complete"]
    assert document["components"]["transformer_2"]["layers"] == 11
    assert document["layers"][-1]["name"].startswith("transformer_2/")


def test_the_plan_shows_each_component_and_recommends_a_large_text_encoder(written):
    planned = plan_checkpoint(written, RECIPE)
    sizes = {size.name: size for size in planned.sizes}
    assert list(sizes) == ["text_encoder", *DENOISERS]
    elements = sum(p.numel() for p in load_float(written / "transformer").parameters())
    assert sizes["transformer"].nbytes_bf16 == 2 * elements
    stored = sum(
        tensor.nbytes for name, tensor in quantized_tensors(written / "transformer").items()
    )
    assert sizes["transformer"].nbytes == stored
    left = sizes["text_encoder"]
    assert left.nbytes is None
    assert left.if_quantized < left.nbytes_bf16 / 2
    (note,) = [note for note in planned.notes if "in bf16" in note]
    ratio = left.nbytes_bf16 / (2 * sizes["transformer"].nbytes_bf16)
    assert note.startswith(f"text_encoder (UMT5EncoderModel): {left.nbytes_bf16 / 1e6:.3g} MB in")
    assert f"{ratio:.1f} times all that is quantized." in note
    assert "`--components transformer,transformer_2,text_encoder` would make it" in note
    text = succeeds("plan", written, "--recipe", "int4-a16")
    assert "transformer_2:\nlayer " in text
    assert "22 layers quantized at " in text
    assert "text_encoder   UMT5EncoderModel       " in text
    document = json.loads(succeeds("plan", written, "--components", "all", "--json"))
    assert list(document["components"]) == ["text_encoder", *DENOISERS]
    assert all(size["nbytes"] for size in document["sizes"])
    assert not [note for note in document["notes"] if "in bf16" in note]


def test_sizes_are_known_without_weights_too(source):
    with_weights = plan_checkpoint(source, RECIPE)
    for path in source.rglob("*.safetensors"):
        path.unlink()
    planned = plan_checkpoint(source, RECIPE)
    assert planned.sizes == with_weights.sizes
    assert planned.notes == with_weights.notes


def quantized_tensors(folder: Path) -> dict[str, torch.Tensor]:
    model = load_float(folder)
    loraq.quantize_(model, RECIPE, progress=False)
    return dict(model.state_dict())


def test_a_large_text_encoder_that_cannot_be_quantized_is_no_obstacle(source):
    (source / "text_encoder" / "model.safetensors").rename(
        source / "text_encoder" / "pytorch_model.bin"
    )
    notes = plan_checkpoint(source, RECIPE).notes
    assert any("It cannot be quantized as it is: " in note for note in notes)


# --- loading --------------------------------------------------------------------------------------


def test_diffusers_loads_all_of_them(made, written):
    import loraq.diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        made, tokenizer=None, vae=None, text_encoder=None, dtype=torch.bfloat16
    )
    for name in DENOISERS:
        loaded = loraq.load(made, component=name)
        assert len(quantized_layers(getattr(pipeline, name))) == 11
        state = getattr(pipeline, name).state_dict()
        assert all(torch.equal(state[key], value) for key, value in loaded.state_dict().items())


def test_diffusers_loads_a_text_encoder_too(written, tmp_path):
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    import loraq.diffusers

    if "loraq" not in AUTO_QUANTIZER_MAPPING:
        pytest.skip("no quantizer for models of transformers is registered")
    quantize(written, tmp_path / "out", components="all")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "out", tokenizer=None, vae=None, dtype=torch.bfloat16
    )
    assert len(quantized_layers(pipeline.text_encoder)) == 28
    assert len(quantized_layers(pipeline.transformer_2)) == 11
    assert len(quantized_layers(loraq.load(tmp_path / "out", component="text_encoder"))) == 28


def test_which_model_is_loaded(written, made, tmp_path):
    with pytest.raises(CheckpointError, match=r"2 models: transformer \(Wan.*`component="):
        loraq.load(made)
    with pytest.raises(CheckpointError, match=r"no model 'scheduler'\. It has text_encoder"):
        loraq.load(made, component="scheduler")
    with pytest.raises(CheckpointError, match=r"is no pipeline .* has no component 'x'"):
        loraq.load(made / "transformer", component="x")
    with pytest.raises(CheckpointError, match="text_encoder' is not a loraq checkpoint"):
        loraq.load(made, component="text_encoder")
    quantize(written, tmp_path / "one", components="transformer_2")
    assert len(quantized_layers(loraq.load(tmp_path / "one"))) == 11


def test_a_text_encoder_loads_into_its_class(written, tmp_path):
    quantize(written, tmp_path / "out", components=["text_encoder", "transformer"])
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**T5))
    loraq.load_into(model, tmp_path / "out" / "text_encoder")
    assert len(quantized_layers(model)) == 28
    stored = load_file(written / "text_encoder" / "model.safetensors")
    assert torch.equal(model.shared.weight, stored["shared.weight"])


# --- a pipeline in memory, and a LoRA -------------------------------------------------------------


def test_a_pipeline_in_memory_takes_names_too():
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)).bfloat16()

    class Pipeline:
        def __init__(self) -> None:
            models = dict.fromkeys(DENOISERS)
            self.components = {name: wan(i) for i, name in enumerate(models)}
            self.components["text_encoder"] = encoder
            self.components["tokenizer"] = object()

    pipeline = Pipeline()
    with pytest.raises(LoraqError, match=r"no component tokenizer\. It has transformer, transf"):
        loraq.quantize_(pipeline, RECIPE, components="tokenizer", progress=False)
    assert list(
        loraq.quantize_(pipeline, RECIPE, components=["transformer_2"], progress=False)
    ) == ["transformer_2"]
    assert not quantized_layers(pipeline.components["transformer"])
    reports = loraq.quantize_(pipeline, RECIPE, components="all", progress=False)
    assert list(reports) == [*DENOISERS, "text_encoder"]
    assert len(quantized_layers(encoder)) == 28


def test_a_lora_is_absorbed_by_one_of_them(written, made, tmp_path):
    layer = "blocks.0.attn1.to_q"
    lora = {f"transformer.{layer}.lora_A.weight": torch.ones(2, 32),
            f"transformer.{layer}.lora_B.weight": torch.ones(32, 2)}  # fmt: skip
    save_file(lora, tmp_path / "lora.safetensors")
    given = (made, tmp_path / "lora.safetensors", written)
    with pytest.raises(CheckpointError, match="has 2 models: transformer"):
        loraq.absorb_lora(*given, target=tmp_path / "out", progress=False)
    arguments = [*given[:2], tmp_path / "out", "--source", written, "--component", "transformer_2"]
    succeeds("absorb-lora", *arguments)
    before, after = files_of(made), files_of(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {
        f"transformer_2/{name}" for name in ("loraq.json", "diffusion_pytorch_model.safetensors")
    }
    found = inspect_folder(tmp_path / "out")
    assert "absorbed" in found.manifests["transformer_2"].layers[layer].record
    weights = written / "transformer_2" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "fp16").mkdir()
    shutil.copy(weights, tmp_path / "fp16" / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(weights.with_name("config.json"), tmp_path / "fp16")
    save_file(
        {name: tensor + 1 for name, tensor in load_file(weights).items()},
        tmp_path / "fp16" / "diffusion_pytorch_model.safetensors",
    )
    loraq.absorb_lora(
        *given[:2], tmp_path / "fp16", target=tmp_path / "again", component="transformer_2",
        variant="fp16", progress=False,
    )  # fmt: skip
    assert files_of(tmp_path / "again") == after
