"""A pipeline draws its own samples: from noise to a file of statistics to a quantized pipeline;
and what is refused.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import loraq
import loraq.diffusers
from loraq.checkpoint.stats_file import load_stats
from loraq.cli import main
from loraq.errors import CalibrationError, CheckpointError, DeviceError, LoraqError
from loraq.integrations.pipelines import collect_pipeline_stats, read_prompts
from loraq.pipeline.collect import counting_bytes
from loraq.stats import N_CALL_GROUPS

diffusers = pytest.importorskip("diffusers")

from small.pixart import CALL  # noqa: E402

#: Warnings of diffusers' own scheduler about numpy, not ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword"
)

FAST = {"recipe": "int4-a16+w6a8-r8", "samples": 2, "steps": 2, "call": CALL, "progress": False}
GPTQ = loraq.Recipe.from_dict({"scheme": "int4-a16+w6a8-r8", "method": "gptq"})
#: Tokens of one image in one step: 8×8 patches, with and without guidance.
TOKENS = 2 * 8 * 8


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    from tiny_pipelines import tiny_pixart_sigma

    return tiny_pixart_sigma(tmp_path_factory.mktemp("pipelines") / "float")


@pytest.fixture(scope="module")
def once(source) -> Path:
    target = source.parent / "once.safetensors"
    collect_pipeline_stats(source, target, **FAST)
    return target


def quantized(source: Path, target: Path, stats: Path | None) -> torch.nn.Module:
    recipe = replace(loraq.Recipe.named(FAST["recipe"]), effort="fast")
    loraq.quantize_checkpoint(source, target, recipe, stats=stats, progress=False)
    return diffusers.DiffusionPipeline.from_pretrained(target).transformer


# --- what it does ---------------------------------------------------------------------------------


def test_it_counts_what_the_layers_see_when_the_pipeline_runs(source, once):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    name = "transformer_blocks.1.ff.net.2"
    pipeline.transformer.get_submodule(name).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    for i in range(2):
        pipeline("", num_inference_steps=2, generator=torch.Generator().manual_seed(i), **CALL)
    x = torch.cat([inputs.flatten(0, -2) for inputs in seen])
    found = load_stats(once)[name]
    assert found.tokens == len(x) == 2 * 2 * TOKENS
    assert torch.allclose(found.second_moment, x.mT @ x / len(x), rtol=1e-4, atol=1e-6)


def test_every_layer_of_the_plan_is_there_and_no_other(source, once):
    planned = loraq.plan_model(
        diffusers.DiffusionPipeline.from_pretrained(source).transformer, FAST["recipe"]
    )
    using = (layer.name for layer in planned.quantized if not layer.is_kept)
    assert sorted(load_stats(once)) == sorted(using)


def test_the_report_says_what_was_made(source, once, tmp_path):
    target = tmp_path / "s.safetensors"
    report = collect_pipeline_stats(source, target, **FAST)
    assert report.nbytes == target.stat().st_size
    assert (report.target, report.samples, report.passes) == (target, 2, 1)
    assert list(report.layers) == list(load_stats(target))
    assert report.seconds > 0


def test_a_variant_and_a_component_are_what_is_asked_for(source, once, tmp_path):
    other = Path(shutil.copytree(source, tmp_path / "pipeline"))
    for file in other.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    index = json.loads((other / "model_index.json").read_text())
    index["transformer_2"] = ["diffusers", "PixArtTransformer2DModel"]
    (other / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(other / "transformer", other / "transformer_2")
    target = tmp_path / "s.safetensors"
    with pytest.raises(CheckpointError, match=r"has 2 models: transformer .*`--component`"):
        collect_pipeline_stats(other, target, variant="fp16", **FAST)
    with pytest.raises(CheckpointError, match="has no model 'transformer_3'"):
        collect_pipeline_stats(other, target, component="transformer_3", **FAST)
    with pytest.raises(CheckpointError, match="no weights of the variant 'ema'"):
        collect_pipeline_stats(other, target, component="transformer", variant="ema", **FAST)
    collect_pipeline_stats(other, target, component="transformer", variant="fp16", **FAST)
    assert target.read_bytes() == once.read_bytes()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_any_number_of_runs(source, once, tmp_path):
    # All at once; the widest layer alone.
    widest = counting_bytes(512, second_moment=True) + 4 * 512**2
    for i, memory in enumerate((8_000_000_000, widest)):
        target = tmp_path / f"{i}.safetensors"
        report = collect_pipeline_stats(source, target, memory_bytes=memory, **FAST)
        assert (report.passes == 1) is (i == 0)
        assert load_stats(target).keys() == load_stats(once).keys()
        assert target.read_bytes() == once.read_bytes()
    collect_pipeline_stats(source, tmp_path / "other.safetensors", **FAST, seed=1)
    assert (tmp_path / "other.safetensors").read_bytes() != once.read_bytes()


@pytest.mark.slow
def test_it_quantizes_with_less_error_on_what_the_pipeline_does(source, once, tmp_path):
    exact = diffusers.DiffusionPipeline.from_pretrained(source).transformer
    rng = torch.Generator().manual_seed(7)
    inputs = {
        "hidden_states": torch.randn(4, 4, 16, 16, generator=rng),
        "encoder_hidden_states": torch.zeros(4, 8, 64),
        "timestep": torch.tensor([900, 600, 300, 50]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    with torch.no_grad():
        wanted = exact(**inputs)[0]
        errors = {
            stats: (
                quantized(source, tmp_path / str(bool(stats)), stats)(**inputs)[0] - wanted
            ).norm()
            / wanted.norm()
            for stats in (None, once)
        }
    assert errors[once] < errors[None]


@pytest.mark.slow
def test_mean_squares_are_those_of_the_full_moments_in_a_small_file(source, once, tmp_path):
    target = tmp_path / "diagonal.safetensors"
    collect_pipeline_stats(source, target, second_moment=False, **FAST)
    full, diagonal = load_stats(once), load_stats(target)
    per_channel = 4 * (1 + N_CALL_GROUPS)
    nbytes = sum(per_channel * stats.width + 8 for stats in full.values())
    assert nbytes < target.stat().st_size < nbytes + 400 * len(full)  # the header
    for name, stats in full.items():
        assert not diagonal[name].is_full
        assert torch.allclose(diagonal[name].mean_square, stats.mean_square, rtol=1e-4)


@pytest.mark.slow
def test_a_limit_of_tokens_is_spread_over_images_and_steps(source, tmp_path):
    target = tmp_path / "s.safetensors"
    collect_pipeline_stats(source, target, max_tokens=40, **FAST)
    assert {stats.tokens for stats in load_stats(target).values()} == {40}


@pytest.mark.slow
def test_prompts_are_used_in_turn(source, once, tmp_path):
    some = dict(FAST, samples=None)
    report = collect_pipeline_stats(
        source, tmp_path / "p.safetensors", prompts=["a red fox", "", "a kite"], **some
    )
    assert report.samples == 3
    collect_pipeline_stats(source, tmp_path / "e.safetensors", prompts=[""], **FAST)
    assert (tmp_path / "e.safetensors").read_bytes() == once.read_bytes()
    text = "transformer_blocks.0.attn2.to_out.0"  # what it attends to is the prompt
    fox, empty = load_stats(tmp_path / "p.safetensors")[text], load_stats(once)[text]
    assert not torch.allclose(fox.second_moment, empty.second_moment, rtol=0.01)


@pytest.mark.slow
def test_a_pipeline_runs_in_the_dtype_of_its_transformer_or_another(source, tmp_path):
    lines: list[str] = []
    options = dict(FAST, samples=1, steps=1, progress=lambda done, total, what: lines.append(what))
    collect_pipeline_stats(source, tmp_path / "a.safetensors", **options)
    collect_pipeline_stats(source, tmp_path / "b.safetensors", dtype=torch.bfloat16, **options)
    assert [line for line in lines if line.startswith("drawing")] == [
        "drawing on cpu in torch.float32",
        "drawing on cpu in torch.bfloat16",
    ]


def test_sensitivities_are_those_of_the_bare_model_under_gradient_checkpointing(
    source, tmp_path, monkeypatch
):
    target, kind, switched = tmp_path / "stats.safetensors", diffusers.ModelMixin, []
    switch = kind.enable_gradient_checkpointing
    monkeypatch.setattr(
        kind, "enable_gradient_checkpointing", lambda model: switched.append(switch(model))
    )
    collect_pipeline_stats(source, target, sensitivity=True, **FAST)
    assert len(switched) == 1
    found = load_stats(target)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)

    def run() -> None:
        for i in range(2):
            generator = torch.Generator().manual_seed(i)
            pipeline("", num_inference_steps=2, generator=generator, output_type="latent", **CALL)

    assert not pipeline.transformer.is_gradient_checkpointing
    bare = loraq.collect_stats(pipeline.transformer, run, list(found), sensitivity=True)
    for name, stats in bare.items():
        assert stats.output_sensitivity.std() > 0.01
        for part in ("second_moment", "output_sensitivity"):
            assert torch.allclose(getattr(found[name], part), getattr(stats, part), rtol=1e-4)
    quantize = {"recipe": replace(loraq.Recipe.named(FAST["recipe"]), effort="fast")}
    done = loraq.quantize_checkpoint(
        source, tmp_path / "out", **quantize, stats=target, progress=False
    )
    assert all(0 < layer.relative_error < 0.2 for layer in done.layers)


@pytest.mark.slow
def test_the_command_does_the_same_and_quantize_takes_its_file(source, once, tmp_path):
    target = tmp_path / "stats.safetensors"
    settings = [f"--set={name}={json.dumps(value)}" for name, value in CALL.items()]
    recipe = ["--recipe", FAST["recipe"]]
    weighed = ["--sensitivity", "--samples", "1", "--steps", "1", *recipe, *settings]
    other = tmp_path / "weighed.safetensors"
    result = CliRunner().invoke(main, ["stats", str(source), str(other), *weighed])
    assert result.exit_code == 0, result.stderr
    assert all(s.output_sensitivity is not None for s in load_stats(other).values())
    asked = ["--samples", "2", "--steps", "2", "--memory", "3300KB"]
    result = CliRunner().invoke(
        main, ["stats", str(source), str(target), *recipe, *asked, *settings, "--json"]
    )
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["nbytes"] == target.stat().st_size
    assert said["passes"] > 1
    assert target.read_bytes() == once.read_bytes()
    assert f"image 1 of {2 * said['passes']}" in result.stderr
    assert f"runs of 2 images: {said['passes']}" in result.stderr
    quantize = [
        "quantize",
        str(source),
        str(tmp_path / "out"),
        "--stats",
        str(target),
        *recipe,
        "--effort",
        "fast",
    ]
    result = CliRunner().invoke(main, quantize)
    assert result.exit_code == 0, result.stderr
    inspected = CliRunner().invoke(main, ["inspect", str(tmp_path / "out")])
    assert "16 of them were made with activation statistics" in inspected.stdout
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    array = pipeline("", num_inference_steps=1, output_type="np", **CALL).images
    assert torch.from_numpy(array).isfinite().all()


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def no_loading(monkeypatch):
    """Whatever is refused must be refused before the pipeline is loaded."""

    def loaded(*_arguments: object, **_options: object) -> None:
        pytest.fail("the pipeline was loaded")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", loaded)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 0}, CalibrationError, "samples is 0. It must be at least 1"),
        ({"steps": 0}, CalibrationError, "steps is 0"),
        ({"max_tokens": 0}, CalibrationError, "max_tokens is 0"),
        (
            {"max_tokens": 3},
            CalibrationError,
            r"max_tokens is 3, and 2 images of 2 steps call .* 4 times\. At least 4",
        ),
        ({"call": {"generator": 3}}, LoraqError, r"generator cannot be given: .*`--seed`"),
        (
            {"call": {"hight": 512}},
            LoraqError,
            "Unknown argument of PixArtSigmaPipeline 'hight'.*'height'",
        ),
        (
            {"memory_bytes": 10**6},
            CalibrationError,
            r"512 inputs takes 0\.00322 GB, and 0\.001 GB are allowed",
        ),
        ({"device": "abacus"}, DeviceError, "Unknown device 'abacus'"),
        (
            {"recipe": "int5-a16"},
            CalibrationError,
            "No layer uses the statistics: none has a branch",
        ),
        (
            {"recipe": GPTQ, "second_moment": False},
            CalibrationError,
            "Mean squares are not enough: method 'gptq'",
        ),
        ({"recipe": "int4_b7+w9"}, LoraqError, "Recipe name"),
    ],
)
def test_what_cannot_work_is_known_before_anything_is_loaded(
    source, tmp_path, options, error, message
):
    with pytest.raises(error, match=message):
        collect_pipeline_stats(source, tmp_path / "s.safetensors", **{**FAST, **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_loading")
def test_a_target_that_is_there_is_kept(source, once):
    before = once.read_bytes()
    with pytest.raises(CheckpointError, match="the file exists"):
        collect_pipeline_stats(source, once, **FAST)
    assert once.read_bytes() == before


@pytest.mark.usefixtures("no_loading")
def test_a_target_inside_the_source_would_change_it(source):
    with pytest.raises(CheckpointError, match="lies inside"):
        collect_pipeline_stats(source, source / "transformer" / "s.safetensors", **FAST)


@pytest.mark.usefixtures("no_loading")
def test_a_disk_that_is_too_small(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: usage)
    with pytest.raises(
        CheckpointError, match=r"0\.0001 GB free and the statistics take 0\.00\d+ GB"
    ):
        collect_pipeline_stats(source, tmp_path / "s.safetensors", **FAST)


@pytest.mark.usefixtures("no_loading")
def test_sources_that_draw_nothing(source, tmp_path):
    target = tmp_path / "s.safetensors"
    with pytest.raises(CheckpointError, match=r"model alone.*collect_stats\(model, run, layers\)"):
        collect_pipeline_stats(source / "transformer", target, **FAST)
    with pytest.raises(CheckpointError, match="not a pipeline's folder"):
        collect_pipeline_stats(tmp_path, target, **FAST)
    other = Path(shutil.copytree(source, tmp_path / "other"))
    index = json.loads((other / "model_index.json").read_text())
    for name, message in {
        "DiTPipeline": "DiTPipeline cannot be run on a prompt alone: it needs class_labels",
        "MyPipeline": "names the pipeline 'MyPipeline', which diffusers .* does not have",
        "UNet2DModel": "names the pipeline 'UNet2DModel'",
    }.items():
        (other / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
        with pytest.raises(LoraqError, match=message):
            collect_pipeline_stats(other, target, **{**FAST, "call": {}})


@pytest.mark.usefixtures("no_loading")
def test_a_quantized_source(source, tmp_path):
    recipe = loraq.Recipe.from_dict({"scheme": "int4", "method": "rtn"})
    loraq.quantize_checkpoint(source, tmp_path / "q", recipe, progress=False)
    with pytest.raises(CheckpointError, match="quantized already"):
        collect_pipeline_stats(tmp_path / "q", tmp_path / "s.safetensors", **FAST)


@pytest.mark.slow
def test_weights_that_are_no_safetensors_are_not_read(source, tmp_path):
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (other / "vae" / "diffusion_pytorch_model.safetensors").rename(
        other / "vae" / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(
        CheckpointError, match=r"cannot load the pipeline.*diffusion_pytorch_model\.safetensors"
    ):
        collect_pipeline_stats(other, tmp_path / "s.safetensors", **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.slow
def test_a_pipeline_that_fails_says_on_what_and_leaves_nothing(source, tmp_path):
    call = dict(CALL, height=33)
    with pytest.raises(
        CalibrationError, match=r"PixArtSigmaPipeline fails on image 1 \(.*33.*--set"
    ):
        collect_pipeline_stats(source, tmp_path / "s.safetensors", **{**FAST, "call": call})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_layers_that_are_never_called_are_named(source, tmp_path, monkeypatch):
    block = diffusers.models.attention.FeedForward
    monkeypatch.setattr(block, "forward", lambda self, x, *args, **kwargs: x)
    with pytest.raises(
        CalibrationError, match=r"4 of 16 layers were never called: transformer_blocks\.0\.ff"
    ):
        collect_pipeline_stats(source, tmp_path / "s.safetensors", **FAST)
    assert not list(tmp_path.iterdir())


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_are_the_lines_that_are_not_blank(tmp_path):
    (tmp_path / "p.txt").write_text("a red fox\n\n  a kite ü  \n")
    assert read_prompts(tmp_path / "p.txt") == ["a red fox", "a kite ü"]


def test_a_file_without_prompts(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(CalibrationError, match=r"holds no prompt\. One prompt a line is required"):
        read_prompts(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("none.txt", "binary.txt"):
        with pytest.raises(CalibrationError, match=f"Cannot read the prompts '.*{name}'"):
            read_prompts(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_or_an_endless_file_of_prompts_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "endless").open("wb") as file:
        file.truncate(10**12)
    for name in ("pipe", "endless"):
        with pytest.raises(CalibrationError, match="Cannot read the prompts"):
            read_prompts(tmp_path / name)
