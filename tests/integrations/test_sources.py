"""Sources as people have them: variants, files of other programs, FP8, pickles, mixed dtypes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small.pixart import small_pixart, velocity
from torch import nn

import loraq
from loraq.cli import main
from loraq.errors import CheckpointError
from loraq.integrations.checkpoints import plan_checkpoint, quantize_checkpoint
from loraq.recipe import Recipe

diffusers = pytest.importorskip("diffusers")
from click.testing import CliRunner  # noqa: E402

from loraq.diffusers import LoraqConfig  # noqa: E402

PixArt = diffusers.PixArtTransformer2DModel
RECIPE = replace(Recipe.named("int8-a16"), method="rtn")
WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_pixart(torch.float32)


@pytest.fixture
def source(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def quantize(source: Path, target: Path, **options):
    return quantize_checkpoint(source, target, RECIPE, progress=False, **options)


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def same(a: Path, b: Path) -> bool:
    """Whether two quantized folders hold the same numbers, whatever the dtype of the floats."""
    ours, theirs = (loraq.load(folder).state_dict() for folder in (a, b))
    return all(torch.equal(ours[name], theirs[name].to(ours[name].dtype)) for name in ours)


# --- variants -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_a_variant_is_read_as_diffusers_reads_it(model, tmp_path, sharded, beside):
    folder, size = tmp_path / "source", {"max_shard_size": "60KB"} if sharded else {}
    if beside:
        other = small_pixart(torch.float32)
        with torch.no_grad():
            other.proj_out.weight.zero_()
        other.save_pretrained(folder, **size)
    model.save_pretrained(folder, variant="fp16", **size)
    model.save_pretrained(tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "expected")
    report = quantize(folder, tmp_path / "out", variant="fp16")
    assert same(tmp_path / "out", tmp_path / "expected")
    assert bool(report.plan.notes) is beside
    loaded = PixArt.from_pretrained(folder, variant="fp16", quantization_config=LoraqConfig(RECIPE))
    assert torch.equal(velocity(loaded), velocity(loraq.load(tmp_path / "expected")))


def test_the_plain_weights_are_taken_and_the_user_is_told(model, source, tmp_path):
    model.save_pretrained(source, variant="fp16")
    asked = [str(source), str(tmp_path / "out"), "--recipe", "int8-a16", "--method", "rtn"]
    said = CliRunner().invoke(main, ["quantize", *asked])
    assert said.exit_code == 0
    note = "Note: The weights of no variant are used; the folder also holds those of variant 'fp16'"
    assert note in said.stderr
    assert note in CliRunner().invoke(main, ["plan", str(source)]).stderr
    chosen = CliRunner().invoke(main, ["plan", str(source), "--variant", "fp16"]).stderr
    assert "variant 'fp16' are used" in chosen


def test_a_variant_that_is_not_there_and_variants_without_a_plain_one(model, tmp_path):
    for variant in ("ema", "fp16"):
        model.save_pretrained(tmp_path / "source", variant=variant)
    for act in (plan_checkpoint, lambda *a, **k: quantize_checkpoint(a[0], tmp_path / "q", *a[1:])):
        with pytest.raises(CheckpointError, match="variants ema, fp16 and no plain weights"):
            act(tmp_path / "source", RECIPE)
    with pytest.raises(CheckpointError, match=r"no weights of the variant 'fp8', but of variant"):
        quantize(tmp_path / "source", tmp_path / "out", variant="fp8")


# --- what lies beside -----------------------------------------------------------------------------


def test_files_of_other_programs_beside_the_weights(source, tmp_path):
    quantize(source, tmp_path / "expected")
    for name in (f"._{WEIGHTS}", "._config.json", ".DS_Store", f"._{WEIGHTS}.index.json"):
        (source / name).write_bytes(b"\0\5\x16\7" + bytes(100))
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, source / "pytorch_lora_weights.safetensors")
    quantize(source, tmp_path / "out")
    for name in (f"._{WEIGHTS}", ".DS_Store"):
        (tmp_path / "out" / name).write_bytes(b"\0\5\x16\7" + bytes(100))
    assert same(tmp_path / "out", tmp_path / "expected")


def test_pickles_are_refused_alike_before_any_work(model, source, tmp_path):
    (source / WEIGHTS).unlink()
    torch.save(model.state_dict(), source / "diffusion_pytorch_model.bin")
    match = r"pickles can run code of their own: diffusion_pytorch_model\.bin\. Load it with"
    with pytest.raises(CheckpointError, match=match):
        plan_checkpoint(source, RECIPE)
    with pytest.raises(CheckpointError, match=match):
        quantize(source, tmp_path / "out")
    # The advice works.
    PixArt.from_pretrained(source, use_safetensors=False).save_pretrained(tmp_path / "again")
    quantize(tmp_path / "again", tmp_path / "out")


def test_a_float_model_that_was_saved_over_a_quantized_one(model, source, tmp_path):
    quantize(source, tmp_path / "q")
    model.save_pretrained(tmp_path / "q")
    with pytest.raises(CheckpointError, match=r"float model beside the 'loraq\.json'.*Delete"):
        loraq.load(tmp_path / "q")
    assert torch.equal(velocity(PixArt.from_pretrained(tmp_path / "q")), velocity(model))
    quantize(tmp_path / "q", tmp_path / "again")
    loaded = PixArt.from_pretrained(tmp_path / "q", quantization_config=LoraqConfig(RECIPE))
    assert torch.equal(velocity(loaded), velocity(loraq.load(tmp_path / "again")))


# --- FP8 ------------------------------------------------------------------------------------------


def to_fp8(source: Path, spelling: str, scale_dtype: torch.dtype, rows: bool, kind) -> dict:
    """Store the matrices of the blocks in FP8; return what each then stands for."""
    meant = {}

    def change(tensors):
        for name in [name for name in tensors if "transformer_blocks" in name]:
            if not name.endswith(".weight") or tensors[name].dim() != 2:
                continue
            weight = tensors[name]
            peak = weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()
            scale = (peak / 200).to(scale_dtype)
            if not spelling:
                scale = torch.ones(())
            coded = (weight / scale.float()).to(kind)
            tensors[name] = coded
            meant[name] = coded.double() * scale.double()
            if spelling:
                tensors[f"{name.removesuffix('weight')}{spelling}"] = scale
                tensors[f"{name.removesuffix('weight')}input_scale"] = torch.ones(())
        if spelling == "scale_weight":
            tensors["scaled_fp8"] = torch.empty(0, dtype=kind)

    edit_weights(source, change)
    return meant


@pytest.mark.parametrize(
    ("kind", "spelling", "scale_dtype", "rows"),
    [
        (torch.float8_e4m3fn, "", torch.float32, False),
        (torch.float8_e5m2, "", torch.float32, False),
        (torch.float8_e4m3fn, "weight_scale", torch.float32, True),
        (torch.float8_e4m3fn, "weight_scale", torch.bfloat16, False),
        (torch.float8_e5m2, "scale_weight", torch.bfloat16, True),
        (torch.float8_e4m3fn, "scale_weight", torch.float32, False),
    ],
)
def test_fp8_weights_are_what_they_stand_for(source, tmp_path, kind, spelling, scale_dtype, rows):
    decoded = Path(shutil.copytree(source, tmp_path / "decoded"))
    meant = to_fp8(source, spelling, scale_dtype, rows, kind)
    edit_weights(decoded, lambda tensors: tensors.update({n: t.float() for n, t in meant.items()}))
    report = quantize(source, tmp_path / "out")
    quantize(decoded, tmp_path / "expected")
    assert same(tmp_path / "out", tmp_path / "expected")
    assert f"{len(meant)} FP8 tensors" in " ".join(report.plan.notes)
    assert report.plan.notes == plan_checkpoint(source, RECIPE).notes
    # A file without a configuration is read the same way.
    quantize(source / WEIGHTS, tmp_path / "generic")
    config = PixArt.load_config(source)
    loraq.load_into(PixArt.from_config(config), tmp_path / "generic")


def test_fp8_while_loading_is_read_or_refused(source, tmp_path):
    plain = Path(shutil.copytree(source, tmp_path / "plain"))
    to_fp8(plain, "", torch.float32, False, torch.float8_e4m3fn)
    quantize(plain, tmp_path / "q")
    loaded = PixArt.from_pretrained(plain, quantization_config=LoraqConfig(RECIPE))
    assert torch.equal(velocity(loaded), velocity(loraq.load(tmp_path / "q")))
    to_fp8(source, "weight_scale", torch.float32, False, torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="scales, which diffusers does not apply"):
        PixArt.from_pretrained(source, quantization_config=LoraqConfig(RECIPE))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_scale"), "1 FP8 weights have no scale"),
        (
            lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(2, 16)}),
            r"of shape \(2, 16\) for a weight of shape \(32, 32\)",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(1, 32)}),
            r"of shape \(1, 32\) for a weight",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_scale": torch.ones((), dtype=torch.uint8)}),
            "is U8 of shape",
        ),
        (lambda t: t.update({f"{LAYER}.scale_weight": torch.ones(())}), "has the scales"),
        (
            lambda t: t.update({f"{LAYER}.weight_scale": torch.tensor(float("nan"))}),
            f"'{LAYER}.weight' cannot be used",
        ),
    ],
)
def test_scales_that_cannot_be_right(source, tmp_path, change, match):
    to_fp8(source, "weight_scale", torch.float32, False, torch.float8_e4m3fn)
    edit_weights(source, change)
    with pytest.raises(CheckpointError, match=match):
        quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", ["table", "embed", "attn2", "bias"])
def test_a_file_that_mixes_dtypes_gives_a_model_that_runs(model, source, tmp_path, wide):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(torch.float32 if wide in name else torch.bfloat16)

    edit_weights(source, change)
    quantize(source, tmp_path / "q")
    expected = velocity(PixArt.from_pretrained(source).eval())
    loaded, ours = PixArt.from_pretrained(tmp_path / "q").eval(), loraq.load(tmp_path / "q")
    assert torch.allclose(velocity(loaded), expected, rtol=0, atol=0.05)
    assert torch.equal(velocity(ours), velocity(loaded))
    while_loading = PixArt.from_pretrained(source, quantization_config=LoraqConfig(RECIPE))
    assert torch.equal(velocity(while_loading), velocity(loaded))
    narrow = PixArt.from_pretrained(tmp_path / "q", dtype=torch.bfloat16)
    assert velocity(narrow).dtype == torch.bfloat16


def test_without_a_dtype_diffusers_loads_fp32(tmp_path):
    small_pixart().save_pretrained(tmp_path / "source")  # bf16
    quantize(tmp_path / "source", tmp_path / "q")
    assert {p.dtype for p in PixArt.from_pretrained(tmp_path / "source").parameters()} == {
        torch.float32
    }
    loaded = PixArt.from_pretrained(tmp_path / "q")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32, torch.uint8}
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]


# --- guards ---------------------------------------------------------------------------------------


def test_an_index_of_a_variant_that_is_a_link_out_of_the_folder_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "source", variant="fp16", max_shard_size="60KB")
    index = tmp_path / "source" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.rename(tmp_path / "elsewhere.json")
    index.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"index\.fp16\.json' \(a link out of it"):
        quantize(tmp_path / "source", tmp_path / "out")


def test_a_quantized_folder_reads_no_weights_that_its_manifest_does_not_list(source, tmp_path):
    quantize(source, tmp_path / "q")
    (tmp_path / "q" / WEIGHTS).rename(tmp_path / "q" / "other.safetensors")
    shutil.copy(tmp_path / "q" / "other.safetensors", tmp_path / "q" / WEIGHTS)
    manifest = tmp_path / "q" / "loraq.json"
    manifest.write_text(manifest.read_text().replace(WEIGHTS, "other.safetensors"))
    with pytest.raises(CheckpointError, match=rf"does not list: {WEIGHTS}"):
        loraq.load(tmp_path / "q")
