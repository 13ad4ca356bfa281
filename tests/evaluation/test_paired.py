"""`loraq evaluate` from end to end on a small pipeline and its quantized form.

The weights of metrics are random (`metric_networks`): the published ones cannot be had here. Their
own tests hold each network to the library that it is of.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import loraq
from loraq.cli import main
from loraq.errors import LoraqError
from loraq.evaluation.prompts import Prompt
from tests.evaluation.metric_networks import (
    random_alexnet,
    random_clip,
    random_dinov2,
    random_inception,
)
from tests.folders import files_of

diffusers = pytest.importorskip("diffusers")
numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from small import pixart  # noqa: E402

from loraq.evaluation.drawn import Artist  # noqa: E402
from loraq.evaluation.paired import _mean, evaluate  # noqa: E402
from loraq.integrations.drawing import draw_seeded  # noqa: E402

#: Warnings of diffusers' own scheduler about numpy, not ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword"
)

CALL = {"num_inference_steps": 2, **pixart.CALL}
PROMPTS = (Prompt("b", "a red fox"), Prompt("a", "a tower"), Prompt("c", "cherries"))
FAST = {"lpips": False, "call": CALL, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    from tiny_pipelines import tiny_pixart_sigma

    return tiny_pixart_sigma(tmp_path_factory.mktemp("pipelines") / "float")


@pytest.fixture(scope="module")
def quantized(source) -> Path:
    """A whole pipeline."""
    target = source.parent / "quantized"
    recipe = loraq.Recipe.from_dict({"scheme": "mxfp4", "method": "rtn"})
    loraq.quantize_checkpoint(source, target, recipe, progress=False)
    return target


@pytest.fixture(scope="module")
def drawn(source, quantized) -> Path:
    images = source.parent / "images"
    evaluate(source, quantized, PROMPTS, images, **FAST)
    return images


@pytest.fixture
def no_loading(monkeypatch):
    def loaded(*_arguments: object, **_options: object) -> None:
        pytest.fail("the pipeline was loaded")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", loaded)


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(numpy.array(Image.open(path))).double() / 255


# --- what is drawn --------------------------------------------------------------------------------


def test_images_are_those_of_the_pipeline_with_the_seed_of_the_name(source, quantized, drawn):
    found = evaluate(source, quantized, PROMPTS, drawn, **FAST)
    for folder, paths in ((source, found.images_a), (quantized, found.images_b)):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(97)
        image = pipeline("a tower", generator=generator, **CALL).images[0]
        assert numpy.array_equal(numpy.array(image), numpy.array(Image.open(paths[1])))
    assert [path.name[0] for path in found.images_a] == ["b", "a", "c"]
    assert [path.name for path in found.images_a] == [path.name for path in found.images_b]


@pytest.mark.usefixtures("no_loading")
def test_what_is_there_is_not_drawn_again(source, quantized, drawn):
    before = files_of(drawn)
    first, again = (evaluate(source, quantized, PROMPTS, drawn, **FAST) for _ in range(2))
    assert files_of(drawn) == before
    assert first == again


def test_a_run_that_was_stopped_goes_on_with_the_same_images(
    source, quantized, drawn, tmp_path, monkeypatch
):
    from loraq.evaluation import drawn as module

    whole, encode = module._encode, []

    def stop(image: object) -> bytes:
        encode.append(image)
        if len(encode) == 2:
            raise KeyboardInterrupt
        return whole(image)

    monkeypatch.setattr(module, "_encode", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(source, quantized, PROMPTS, tmp_path / "i", **FAST)
    assert len(list((tmp_path / "i").rglob("*.png"))) == 1
    seen = []
    monkeypatch.setattr(module, "_encode", whole)
    evaluate(
        source,
        quantized,
        PROMPTS,
        tmp_path / "i",
        **{**FAST, "progress": lambda *x: seen.append(x)},
    )
    assert seen[0][:2] == (0, 2)
    assert files_of(tmp_path / "i") == files_of(drawn)


@pytest.mark.slow
def test_other_settings_prompts_or_weights_never_meet_old_images(source, quantized, tmp_path):
    images = tmp_path / "images"

    def folders(a: Path, b: Path, prompts: tuple = PROMPTS[:1], **changes: object) -> tuple:
        found = evaluate(a, b, prompts, images, **{**FAST, **changes})
        return tuple(paths[0] for paths in (found.images_a, found.images_b))

    first = folders(source, quantized)
    steps = folders(source, quantized, call={**CALL, "num_inference_steps": 1})
    dtype = folders(source, quantized, dtype=torch.bfloat16)
    simulated = folders(source, quantized, simulate=True)
    text = folders(source, quantized, (Prompt("b", "another"),))
    other = Path(shutil.copytree(source, tmp_path / "float"))
    model = diffusers.PixArtTransformer2DModel.from_pretrained(other / "transformer")
    with torch.no_grad():
        model.proj_out.bias += 1  # as a fine-tune is: names and sizes of all files are the same
    model.save_pretrained(other / "transformer")
    tuned = folders(other, quantized)
    places = [*first, *steps, *dtype, *simulated, *text, tuned[0]]
    assert len({str(path) for path in places}) == len(places)
    assert tuned[1] == first[1]  # what did not change serves again
    assert pixels(tuned[0]).sub(pixels(first[0])).abs().max() > 0.01
    assert pixels(simulated[1]).sub(pixels(first[1])).abs().max() > 0
    said = json.loads((first[1].parent / "settings.json").read_text())
    assert said["source"] == str(quantized)
    assert said["call"] == CALL
    assert set(said["versions"]) == {"torch", "diffusers", "transformers", "loraq"}


def test_a_model_alone_takes_the_place_of_as_own(source, quantized, drawn, tmp_path):
    alone = Path(shutil.copytree(quantized / "transformer", tmp_path / "my-model"))
    found = evaluate(source, alone, PROMPTS, tmp_path / "i", **FAST)
    whole = evaluate(source, quantized, PROMPTS, drawn, **FAST)
    assert found.images_b[0].parent.name.startswith("my-model-")
    for one, other in zip(found.images_b, whole.images_b, strict=True):
        assert one.read_bytes() == other.read_bytes()
    config = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps(config | {"_class_name": "Other"}))
    with pytest.raises(LoraqError, match=r"class 'Other' alone, and '.*float' has 0 of that class"):
        evaluate(source, alone, PROMPTS, tmp_path / "i", **FAST)


# --- what is measured -----------------------------------------------------------------------------


def test_figures_are_means_over_the_pairs(source, quantized, drawn, tmp_path, monkeypatch):
    from skimage.metrics import structural_similarity

    monkeypatch.setattr("loraq.evaluation.weights.cached_folder", lambda *_: None)
    random_alexnet(monkeypatch, tmp_path)
    random_clip(tmp_path)
    found = evaluate(
        source,
        quantized,
        PROMPTS,
        drawn,
        **{**FAST, "lpips": True, "clip": True, "weights": tmp_path},
    )
    names = ["PSNR", "SSIM", "LPIPS", "CLIP score of A", "CLIP score of B"]
    assert [figure.name for figure in found.figures] == names
    pairs = [(pixels(a), pixels(b)) for a, b in zip(found.images_a, found.images_b, strict=True)]
    psnr = torch.stack([-10 * (a - b).square().mean().log10() for a, b in pairs])
    assert found.figure("PSNR").value == pytest.approx(psnr.mean().item(), rel=1e-6)
    assert found.figure("PSNR").low >= psnr.min() - 1e-6
    assert found.figure("PSNR").high <= psnr.max() + 1e-6
    ssim = [
        structural_similarity(
            a.numpy(), b.numpy(), channel_axis=2, data_range=1.0, gaussian_weights=True,
            sigma=1.5, use_sample_covariance=False,
        )
        for a, b in pairs
    ]  # fmt: skip
    # Its mean leaves out the border that the tables' mean has.
    assert found.figure("SSIM").value == pytest.approx(sum(ssim) / 3, abs=5e-3)
    assert 0 < found.figure("LPIPS").value < 1


def test_frechet_distances_are_of_all_images_and_have_no_interval(
    source, quantized, drawn, tmp_path, monkeypatch
):
    random_inception(monkeypatch, tmp_path)
    random_dinov2(tmp_path)
    asked = {**FAST, "fid": True, "weights": tmp_path}
    figures = evaluate(source, quantized, PROMPTS, drawn, **asked).figures[2:]
    assert [figure.name for figure in figures] == ["FID", "FD DINOv2"]
    for figure in figures:
        assert 0 < figure.value < 1e3
        assert figure.low is None


def test_equal_images_are_perfect(source, drawn):
    found = evaluate(source, source, PROMPTS, drawn, **FAST)
    assert found.images_a == found.images_b
    assert found.figure("PSNR").value == float("inf")
    assert found.figure("PSNR").low is None
    assert found.figure("SSIM").value == pytest.approx(1)


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(100):
        figure = _mean("x", torch.randn(50, generator=generator))
        hits += figure.low <= 0 <= figure.high
    assert 88 <= hits <= 99
    assert _mean("x", torch.full((5,), 2.0)) == _mean("x", torch.full((5,), 2.0))


# --- the command ----------------------------------------------------------------------------------


def settings(source: Path, b: Path, images: Path, prompts: Path) -> list[str]:
    pairs = [f"--set={name}={json.dumps(value)}" for name, value in CALL.items()]
    words = ["evaluate", source, b, "--prompts", prompts, "--images", images, "--device", "cpu"]
    return [str(word) for word in words] + pairs


def test_the_command_prints_a_table_or_one_document(source, quantized, tmp_path):
    (tmp_path / "p.txt").write_text("a red fox\na tower\n")
    words = [*settings(source, quantized, tmp_path / "i", tmp_path / "p.txt"), "--no-lpips"]
    shown = CliRunner().invoke(main, words)
    assert shown.exit_code == 0, shown.stderr
    assert re.search(r"^PSNR +\d+\.\d{4} +\d+\.\d{4} … \d+\.\d{4}$", shown.stdout, re.MULTILINE)
    assert "2 images of each." in shown.stdout
    assert "evaluate: image 2 of 2" in shown.stderr
    document = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert document["images"] == 2
    assert f"{document['figures']['PSNR']['value']:.4f}" in shown.stdout
    assert len(list(Path(document["images_b"]).glob("*.png"))) == 2


@pytest.mark.usefixtures("no_loading")
def test_what_cannot_work_is_known_before_an_image_is_drawn(
    source, quantized, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "p.txt").write_text("a red fox\n")
    words = settings(source, quantized, tmp_path / "i", tmp_path / "p.txt")
    for more, message in (
        ([], r"alexnet-owt-7be5be79\.safetensors.*https://download\.pytorch\.org"),
        (["--no-lpips", "--set", "hight=3"], "Unknown argument .* 'hight'"),
        (["--no-lpips", "--set", "generator=3"], "generator cannot be given"),
        (["--no-lpips", "--count", "2"], "holds 1 prompts, and 2 are required"),
        (["--no-lpips", "--device", "abacus"], "Unknown device 'abacus'"),
        (["--no-lpips", "--images", str(source / "i")], "lies inside"),
    ):
        result = CliRunner().invoke(main, [*words, *more])
        assert result.exit_code == 1
        assert re.search(message, result.stderr)
        assert len(result.stderr.splitlines()) == 1
    result = CliRunner().invoke(
        main, [words[0], str(source / "transformer"), *words[2:], "--no-lpips"]
    )
    assert "is a model alone" in result.stderr
    assert not (tmp_path / "i").exists()


def test_drawing_leaves_the_random_numbers_of_the_process_alone():
    class Pipeline:
        device = torch.device("cpu")

        def __call__(self, generator: torch.Generator) -> torch.Tensor:
            return torch.rand(2) + torch.rand(2, generator=generator)

    before = torch.get_rng_state()
    first = draw_seeded(Pipeline(), 5, {})
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draw_seeded(Pipeline(), 5, {}), first)


def test_a_template_of_prompts_decides_pixels_too(source, tmp_path):
    before = Artist(source).sha256()
    other = Path(shutil.copytree(source, tmp_path / "other"))
    assert Artist(other).sha256() == before
    (other / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    assert Artist(other).sha256() != before


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        (
            PROMPTS[:1],
            {"fid": True},
            "number of prompts is 1, and at least 2 is required: the spread",
        ),
        ((), {}, "number of prompts is 0, and at least 1 is required"),
        (
            PROMPTS,
            {"call": {"sigmas": torch.ones(2)}},
            "'sigmas' of `call` is of Tensor and cannot",
        ),
        (PROMPTS, {"call": {"eta": float("nan")}}, "'eta' of `call` is of float and cannot be"),
    ],
)
def test_what_a_caller_asks_for_in_vain_is_told_first(
    source, quantized, tmp_path, prompts, changes, message
):
    with pytest.raises(LoraqError, match=message):
        evaluate(source, quantized, prompts, tmp_path / "i", **{**FAST, **changes})
    assert not (tmp_path / "i").exists()


def test_a_pipeline_that_fails_says_on_which_prompt(source, quantized, tmp_path):
    with pytest.raises(
        LoraqError, match=r"PixArtSigmaPipeline fails on the prompt 'b' \(.*33.*--set"
    ):
        evaluate(source, quantized, PROMPTS, tmp_path, **{**FAST, "call": {**CALL, "height": 33}})


def test_a_damaged_image_is_named(source, quantized, tmp_path):
    found = evaluate(source, quantized, PROMPTS[:1], tmp_path, **FAST)
    raw = found.images_b[0].read_bytes()
    found.images_b[0].write_bytes(raw[: len(raw) // 2])
    with pytest.raises(LoraqError, match=r"Cannot read '.*png': .*Delete it"):
        evaluate(source, quantized, PROMPTS[:1], tmp_path, **FAST)
    found.images_b[0].unlink()
    evaluate(source, quantized, PROMPTS[:1], tmp_path, **FAST)
    assert found.images_b[0].read_bytes() == raw
