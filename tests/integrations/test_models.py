"""`quantize_` and `quantize` on what people hold: models, wrapped models, whole pipelines."""

import copy
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small.pixart import small_pixart, velocity
from test_diffusers import RECIPE, files_of
from test_quantizer import same
from torch import nn

import loraq
from loraq.devices import find_device_to_run
from loraq.errors import KernelError, LoraqError, RecipeError
from loraq.layers import quantized_layers
from loraq.recipe import Recipe

diffusers = pytest.importorskip("diffusers")
import loraq.diffusers  # noqa: E402

PixArt = diffusers.PixArtTransformer2DModel


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """A float model; tests only read it."""
    return small_pixart()


@pytest.fixture(scope="module")
def made(source, tmp_path_factory) -> tuple[nn.Module, Path]:
    """The same model after `quantize_`, and the folder that it was saved to; only read."""
    model, folder = copy.deepcopy(source), tmp_path_factory.mktemp("saved") / "transformer"
    loraq.quantize_(model, RECIPE, progress=False)
    model.save_pretrained(folder)
    return model, folder


def pipeline_of(**models: nn.Module | None) -> object:
    nothing = {"tokenizer": None, "text_encoder": None, "vae": None}
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtSigmaPipeline(**nothing | {"scheduler": scheduler} | models)


# --- a model --------------------------------------------------------------------------------------


def test_the_back_end_is_asked_for_and_an_unknown_one_refused_before_work(source):
    copied = loraq.quantize(source, RECIPE, backend="resident", progress=False)
    assert {layer.backend for layer in quantized_layers(copied).values()} == {"resident"}
    model = copy.deepcopy(source)
    with pytest.raises(KernelError, match="Unknown back end 'fast'"):
        loraq.quantize_(model, RECIPE, backend="fast", progress=False)
    assert not quantized_layers(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_dtype_is_that_of_what_stays_float_once_all_is_quantized(source, made, dtype):
    model = loraq.quantize(source, RECIPE, dtype=dtype, progress=False)
    assert same(model, loraq.load(made[1], dtype=dtype))
    assert velocity(model).dtype == dtype
    layers = quantized_layers(model).values()
    assert [layer.weight_dtype for layer in layers] == [
        layer.weight_dtype for layer in quantized_layers(loraq.load(made[1], dtype=dtype)).values()
    ]


def test_a_dtype_of_no_floats_is_refused_before_work(source):
    model = copy.deepcopy(source)
    with pytest.raises(LoraqError, match=r"dtype is torch\.int8"):
        loraq.quantize_(model, RECIPE, dtype=torch.int8, progress=False)
    assert not quantized_layers(model)


def test_a_copy_is_quantized_and_the_model_stays_as_it_is(source, made):
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    copied = loraq.quantize(source, RECIPE, progress=False)
    assert same(copied, made[0])
    assert not quantized_layers(source)
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())
    storages = [{p.data_ptr() for p in model.parameters()} for model in (source, copied)]
    assert not storages[0] & storages[1]
    assert copied.save_pretrained.args == (copied,)
    assert not getattr(source, "is_quantized", False)


def test_the_recipe_has_a_default():
    model = nn.Sequential(nn.Linear(32, 32))
    report = loraq.quantize_(model, effort="fast", progress=False)
    assert report.recipe == replace(Recipe.named("default"), effort="fast")


def test_what_is_changed_most_often_is_an_argument(source):
    model = loraq.quantize(
        source,
        "mxfp4+w8a8",
        effort="fast",
        rank=4,
        keep="float",
        modules_to_not_convert=["ff", "transformer_blocks.0.attn1"],
        progress=False,
    )
    layers = quantized_layers(model)
    assert sorted(layers) == [
        "transformer_blocks.0.attn2.to_out.0",
        "transformer_blocks.0.attn2.to_q",
        *(f"transformer_blocks.1.attn1.to_{part}" for part in ("k", "out.0", "q", "v")),
        "transformer_blocks.1.attn2.to_out.0",
        "transformer_blocks.1.attn2.to_q",
    ]
    assert {layer.scheme.branch.rank for layer in layers.values()} == {4}
    assert model.config.quantization_config.recipe.effort == "fast"


def test_a_wrapped_model_gets_what_the_model_itself_gets(source, made):
    inner = copy.deepcopy(source)
    loraq.quantize_(nn.DataParallel(inner), RECIPE, progress=False)
    assert same(inner, made[0])
    assert inner.is_quantized
    holder = nn.ModuleDict({"net": copy.deepcopy(source)})
    report = loraq.quantize_(holder, RECIPE, progress=False)
    assert [layer.name for layer in report.layers] == [f"net.{n}" for n in quantized_layers(inner)]
    assert holder["net"].is_quantized


# --- its state ------------------------------------------------------------------------------------


def test_the_state_is_the_same_however_a_model_came_to_be_quantized(source, made, tmp_path):
    source.save_pretrained(tmp_path / "float")
    ways = {
        "quantize_": made[0],
        "quantize": loraq.quantize(source, RECIPE, progress=False),
        "load": loraq.load(made[1]),
        # Without a dtype, diffusers makes what stays float fp32.
        "from_pretrained": PixArt.from_pretrained(made[1], torch_dtype=torch.bfloat16),
        "while loading": PixArt.from_pretrained(
            tmp_path / "float",
            quantization_config=loraq.diffusers.LoraqConfig(RECIPE),
            torch_dtype=torch.bfloat16,
        ),
    }
    for way, model in ways.items():
        assert model.is_quantized, way
        assert model.quantization_method.value == "loraq", way
        assert model.config.quantization_config.recipe == RECIPE, way
        assert model.hf_quantizer.quantization_config.recipe == RECIPE, way
        for cast in (model.half, model.float, lambda model=model: model.to(torch.bfloat16)):
            with pytest.raises(ValueError, match="quantized model"):
                cast()
        model.save_pretrained(tmp_path / way)
        assert "config.json" in files_of(tmp_path / way), way
        assert same(loraq.load(tmp_path / way), made[0]), way
        assert same(copy.deepcopy(model), model), way


def test_loading_says_what_memory_it_takes(made, caplog):
    with caplog.at_level("INFO", "loraq"):
        model = loraq.load(made[1])
        PixArt.from_pretrained(made[1])
    said = [record.message for record in caplog.records if " takes " in record.message]
    assert len(said) == 2
    widest = max(math.prod(layer.packed_shape) for layer in quantized_layers(model).values())
    assert said[0].startswith(
        f"{type(model).__name__} takes {model.get_memory_footprint() / 1e6:.1f} MB, and up to "
        f"{3 * widest / 1e6:.1f} MB while a layer is decoded"
    )
    assert "`loraq inspect --memory`" in said[0]


def test_the_footprint_counts_what_back_ends_keep(made):
    model = loraq.load(made[1], backend="resident")
    stored = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert model.get_memory_footprint() == stored
    velocity(model)
    kept = sum(layer.kept_nbytes for layer in quantized_layers(model).values())
    assert kept > 0
    assert model.get_memory_footprint() == stored + kept
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert model.get_memory_footprint(return_buffers=False) == stored + kept - buffers


# --- a pipeline -----------------------------------------------------------------------------------


def test_every_denoiser_of_a_pipeline_is_quantized_and_the_rest_is_named(
    source, made, tmp_path, caplog
):
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    pipeline = pipeline_of(transformer=copy.deepcopy(source), vae=vae)
    reports = loraq.quantize_(pipeline, RECIPE, progress=False)
    assert list(reports) == ["transformer"]
    assert same(pipeline.transformer, made[0])
    assert "Quantized transformer of PixArtSigmaPipeline. Left as they were: vae (Auto" in (
        caplog.text
    )
    pipeline.save_pretrained(tmp_path / "saved")
    for component in ("transformer", "vae"):
        assert (tmp_path / "saved" / component / "config.json").is_file()
    again = PixArt.from_pretrained(
        tmp_path / "saved", subfolder="transformer", torch_dtype=torch.bfloat16
    )
    assert same(again, made[0])


def test_two_denoisers_are_both_quantized(source):
    class Two:
        def __init__(self) -> None:
            names = ("transformer", "transformer_2")
            self.components = {name: copy.deepcopy(source) for name in names}

    two = Two()
    with pytest.raises(LoraqError, match="2 are quantized: transformer, transformer_2"):
        loraq.quantize_(two, RECIPE, stats={}, progress=False)
    assert not any(map(quantized_layers, two.components.values()))
    assert list(loraq.quantize_(two, RECIPE, progress=False)) == list(two.components)
    assert all(model.is_quantized for model in two.components.values())


@pytest.mark.parametrize(
    ("quantize", "what", "match"),
    [
        (loraq.quantize_, "folder", r"a str\. Give a module or a pipeline"),
        (loraq.quantize, "folder", r"a str\. Use `quantize_`"),
        (loraq.quantize_, lambda: pipeline_of(transformer=None), "has no transformer and no U-Net"),
        (loraq.quantize, lambda: pipeline_of(transformer=None), "a PixArtSigmaPipeline. Use"),
    ],
)
def test_what_is_no_model(quantize, what, match):
    with pytest.raises(LoraqError, match=match):
        quantize(what() if callable(what) else what)


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_dtype_of_what_stays_float(made, dtype):
    model = loraq.load(made[1], device="cpu", dtype=dtype)
    assert same(model, PixArt.from_pretrained(made[1], dtype=dtype))
    assert velocity(model).dtype == dtype


def test_the_best_device_is_taken_for_auto(made):
    best = find_device_to_run("auto")
    model = loraq.load(made[1], device="auto")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {best.type}


def test_a_repository_of_the_hub_is_loaded_by_its_name(made, monkeypatch):
    asked = []

    def fetch(repository: str, *_: object) -> Path:
        asked.append(repository)
        return made[1]

    monkeypatch.setattr("loraq.integrations.hub._fetch", fetch)
    assert same(loraq.load("someone/model-x"), made[0])
    assert asked == ["someone/model-x"]


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"dtype": "bf16"}, "'dtype' of `load` is 'bf16'"),
        ({"device": "nowhere"}, "device is 'nowhere'"),
        ({"device": "hpu:99"}, "device is 'hpu:99'"),
        ({"device": "all"}, "device is 'all'"),
    ],
)
def test_a_dtype_or_device_that_cannot_be(made, option, match):
    with pytest.raises(LoraqError, match=match):
        loraq.load(made[1], **option)


def test_without_diffusers_the_import_says_what_to_install():
    script = (
        "import sys\nsys.modules['diffusers'] = None\nimport loraq\n"
        "try:\n    import loraq.diffusers\n"
        "except ImportError as error:\n    print(isinstance(error, loraq.LoraqError), error)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert said.stdout.startswith("True diffusers cannot be imported")
    assert 'pip install "loraq[diffusers]"' in said.stdout


# --- the arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "options", "match"),
    [
        ("mxfp4-a16", {"rank": 8}, "rank=8: the recipe has no branch"),
        ("mxfp4-a16", {"budget": 5}, "budget=5: the recipe has no branch"),
        ("mxfp4+w8a8-r8", {"budget": 5}, "budget=5: the rank is 8 already"),
        ("mxfp4+w8a8", {"budget": 5, "rank": 8}, "budget=5: the rank is 8 already"),
        ("mxfp4+w8a8", {"budget": "much"}, "Cannot read the budget 'much'"),
        ("mxfp4+w8a8", {"effort": "most"}, "Unknown effort 'most'"),
        (replace(Recipe.named("mxfp4"), method="rtn"), {"effort": "fast"}, "has no levels"),
    ],
)
def test_arguments_that_contradict_the_recipe(recipe, options, match):
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(RecipeError, match=match):
        loraq.quantize_(model, recipe, progress=False, **options)
    assert not quantized_layers(model)


@pytest.mark.parametrize(
    "option", [{"rank": 0}, {"rank": True}, {"effort": 1}, {"modules_to_not_convert": "ff"}]
)
def test_arguments_of_another_type(option):
    with pytest.raises(LoraqError, match=f"'{next(iter(option))}' of `quantize_` is"):
        loraq.quantize_(nn.Sequential(nn.Linear(32, 32)), progress=False, **option)
