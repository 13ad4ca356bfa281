"""After `import loraq.transformers`, transformers' own `from_pretrained`
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
from safetensors.torch import load_file, save_file
from small.encoders import DECODER, SETTINGS
from torch import nn

import loraq
from loraq.checkpoint.manifest import FILE_NAME
from loraq.errors import CheckpointError, LayerError, LoraqError, MissingLibraryError
from loraq.layers import quantized_layers
from loraq.nn import QuantizedLinear

transformers = pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel  # noqa: E402

from loraq.integrations.hf_quantizer import LoraqHfQuantizer  # noqa: E402
from loraq.integrations.loading import require_supported  # noqa: E402
from loraq.integrations.transformers import SUPPORTED, transformers_model  # noqa: E402
from loraq.transformers import LoraqConfig  # noqa: E402

RECIPE = loraq.Recipe.from_dict({"scheme": "mxfp4-a8", "method": "rtn"})
IDS = torch.arange(3, 15)[None]
WO = "encoder.block.0.layer.1.DenseReluDense.wo"


def t5(dtype: torch.dtype = torch.float32) -> T5EncoderModel:
    torch.manual_seed(0)
    return nn.Module.to(T5EncoderModel(T5Config(**SETTINGS["T5EncoderModel"])).eval(), dtype)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**DECODER)).eval()


def encode(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).last_hidden_state


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype
        for name in ours
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "text_encoder"
    t5().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory) -> Path:
    """A quantized folder; tests only read it."""
    folder = tmp_path_factory.mktemp("quantized") / "text_encoder"
    loraq.quantize_checkpoint(source, folder, RECIPE, progress=False)
    return folder


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def change_config(folder: Path, change: dict, *, drop: tuple[str, ...] = ()) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


# --- loading --------------------------------------------------------------------------------------


def test_all_ways_in_give_the_same_model(source, folder):
    expected = t5()
    loraq.quantize_(expected, RECIPE, progress=False)
    for model in (
        loraq.load(folder),
        T5EncoderModel.from_pretrained(folder),
        T5EncoderModel.from_pretrained(source, quantization_config=LoraqConfig(RECIPE)),
        loraq.quantize(t5(), RECIPE, progress=False),
    ):
        assert same(model, expected)
        assert not model.training
        assert model.shared.weight is model.encoder.embed_tokens.weight
        assert isinstance(model.get_submodule(WO), QuantizedLinear)
        torch.testing.assert_close(encode(model), encode(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_those_of_the_float_model(source, folder, dtype):
    """T5 keeps `wo` in fp32 beside fp16, asks the layer for its dtype, and casts what goes in."""
    seen: dict[str, list[torch.dtype]] = {}

    def watch(label: str, model: nn.Module) -> torch.Tensor:
        for name in (WO, "encoder.block.1.layer.0.SelfAttention.q"):
            model.get_submodule(name).register_forward_hook(
                lambda _, x, y: seen.setdefault(label, []).extend((x[0].dtype, y.dtype))
            )
        seen.setdefault(label, []).append(model.get_submodule(WO).weight.dtype)
        return encode(model)

    exact = watch("float", T5EncoderModel.from_pretrained(source, dtype=dtype))
    got = {
        "transformers": T5EncoderModel.from_pretrained(folder, dtype=dtype),
        "loraq": loraq.load(folder, dtype=dtype),
        "on the fly": T5EncoderModel.from_pretrained(
            source, dtype=dtype, quantization_config=LoraqConfig(RECIPE)
        ),
    }
    for label, model in got.items():
        output = watch(label, model)
        assert output.dtype == exact.dtype
        assert (output - exact).norm() < 0.3 * exact.norm()
        assert seen[label] == seen["float"], label
        assert model.dtype == dtype
        assert model.shared.weight is model.encoder.embed_tokens.weight


def test_shards_are_loaded_and_quantized(folder, tmp_path):
    model = t5(torch.bfloat16)
    model.save_pretrained(tmp_path / "float", max_shard_size="20KB")
    loaded = T5EncoderModel.from_pretrained(
        tmp_path / "float", quantization_config=LoraqConfig(RECIPE), dtype=torch.bfloat16
    )
    loraq.quantize_(model, RECIPE, progress=False)
    assert same(loaded, model)
    loaded.save_pretrained(tmp_path / "q", max_shard_size="20KB")
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 2
    assert same(T5EncoderModel.from_pretrained(tmp_path / "q", dtype="auto"), model)


def test_what_is_stored_wins_over_what_is_passed_and_a_warning_names_both(folder):
    with pytest.warns(UserWarning, match="quantized already.*not used: LoraqConfig with seed=5"):
        model = T5EncoderModel.from_pretrained(
            folder, quantization_config=LoraqConfig(replace(RECIPE, seed=5))
        )
    assert model.config.quantization_config.recipe == RECIPE
    T5EncoderModel.from_pretrained(folder, quantization_config=LoraqConfig(RECIPE))


def test_a_configuration_without_a_recipe_says_how_a_folder_runs_and_in_which_dtype(folder, source):
    # Warnings are errors here.
    config = LoraqConfig(backend="resident", dtype=torch.float16)
    model = T5EncoderModel.from_pretrained(folder, quantization_config=config)
    assert {layer.backend for layer in quantized_layers(model).values()} == {"resident"}
    assert model.config.quantization_config.recipe == RECIPE
    assert same(model, T5EncoderModel.from_pretrained(folder, dtype=torch.float16))
    made, plain = LoraqConfig(RECIPE, dtype=torch.float16), LoraqConfig(RECIPE)
    assert same(
        T5EncoderModel.from_pretrained(source, quantization_config=made),
        T5EncoderModel.from_pretrained(source, quantization_config=plain, dtype=torch.float16),
    )


def test_a_damaged_or_foreign_folder_is_refused(copied):
    weights = load_file(copied / "model.safetensors")
    save_file(
        weights | {"shared.weight": weights["shared.weight"] + 1}, copied / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"hash differs|bytes"):
        T5EncoderModel.from_pretrained(copied)
    (copied / FILE_NAME).unlink()
    with pytest.raises(CheckpointError, match="is not a loraq checkpoint"):
        T5EncoderModel.from_pretrained(copied)


def test_packed_weights_are_never_taken_for_floats(copied):
    change_config(copied, {}, drop=("quantization_config",))
    with pytest.raises(CheckpointError, match=r"its 'config.json' does not say so"):
        T5EncoderModel.from_pretrained(copied)


def test_another_configuration_is_refused(copied):
    change_config(copied, {"num_layers": 1})
    with pytest.raises(CheckpointError, match=r"was changed after|bytes, .* are expected"):
        T5EncoderModel.from_pretrained(copied)
    with pytest.raises(CheckpointError):
        loraq.load(copied)


def test_a_float_model_from_the_configuration_of_a_quantized_one_is_a_float_one(folder, tmp_path):
    model = T5EncoderModel(transformers.AutoConfig.from_pretrained(folder))
    model.save_pretrained(tmp_path / "float")
    loaded = T5EncoderModel.from_pretrained(tmp_path / "float")
    assert same(loaded, model)
    assert not loaded.is_quantized
    assert not hasattr(loaded, "hf_quantizer")
    loaded.float()


def test_a_folder_that_is_quantized_is_not_quantized_again(folder, tmp_path):
    with pytest.raises(CheckpointError, match="quantized already"):
        loraq.quantize_checkpoint(folder, tmp_path / "q", RECIPE, progress=False)


# --- while loading --------------------------------------------------------------------------------


def test_a_weight_that_is_not_finite_is_named(source, tmp_path):
    shutil.copytree(source, tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights[f"{WO}.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    with pytest.raises(LayerError, match=rf"Layer '{WO}' cannot be quantized"):
        T5EncoderModel.from_pretrained(tmp_path / "nan", quantization_config=LoraqConfig(RECIPE))


def test_a_missing_weight_and_one_of_another_shape_are_named(source, tmp_path):
    shutil.copytree(source, tmp_path / "less")
    weights = load_file(tmp_path / "less" / "model.safetensors")
    kept = weights.pop(f"{WO}.weight")
    file = tmp_path / "less" / "model.safetensors"
    config = LoraqConfig(RECIPE)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"no weights for these layers: {WO}"):
        T5EncoderModel.from_pretrained(tmp_path / "less", quantization_config=config)
    save_file(weights | {f"{WO}.weight": kept[:32].clone()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"'{WO}.weight' has shape \(32, 96\)"):
        T5EncoderModel.from_pretrained(tmp_path / "less", quantization_config=config)


def test_what_would_fail_late_is_refused_at_once(source):
    for recipe, match in (
        (replace(RECIPE, allocation="greedy"), "uniform"),
        (loraq.Recipe.from_dict({"scheme": "mxfp4-a8", "method": "gptq"}), "statistics"),
        (replace(RECIPE, rules=(loraq.Rule("*", skip=True),)), "Nothing to quantize"),
    ):
        with pytest.raises(LoraqError, match=match):
            T5EncoderModel.from_pretrained(source, quantization_config=LoraqConfig(recipe))


def test_stacked_experts_are_quantized_from_files_that_hold_them_one_by_one(tmp_path):
    config = transformers.Qwen3MoeConfig(
        **DECODER, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "float")  # one by one, as the published models
    quantized = {job.name.rpartition(".")[2] for job in loraq.plan_model(model, RECIPE).quantized}
    assert {"gate_up_proj", "down_proj"} <= quantized
    loraq.quantize_checkpoint(tmp_path / "float", tmp_path / "q", RECIPE, progress=False)
    loraq.quantize_(model, RECIPE, progress=False)
    loraq.save(model, tmp_path / "m")
    for file in (tmp_path / "m").iterdir():
        assert file.read_bytes() == (tmp_path / "q" / file.name).read_bytes()
    for loaded in (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q"),
        type(model).from_pretrained(tmp_path / "float", quantization_config=LoraqConfig(RECIPE)),
    ):
        assert same(loaded, model)


# --- afterwards -----------------------------------------------------------------------------------


def test_a_model_says_what_it_is_however_it_came_to_be_quantized(folder):
    float_ = t5()
    in_memory = t5()
    loraq.quantize_(in_memory, RECIPE, progress=False)
    for model in (in_memory, loraq.load(folder), T5EncoderModel.from_pretrained(folder)):
        assert model.is_quantized
        assert isinstance(model.hf_quantizer, LoraqHfQuantizer)
        assert model.config.quantization_config.recipe == RECIPE
        assert model.quantization_method == "loraq"
        with pytest.raises(ValueError, match="not supported for quantized model"):
            model.half()
        assert model.num_parameters() == float_.num_parameters()
        assert model.get_memory_footprint() < float_.get_memory_footprint()
        before = encode(model)
        assert model.dequantize() is model
        assert not quantized_layers(model)
        assert not model.is_quantized
        assert not hasattr(model.config, "quantization_config")
        torch.testing.assert_close(encode(model), before, rtol=1e-4, atol=1e-4)
        model.half().float()


def test_a_dequantized_model_saves_itself_as_a_float_one(folder, tmp_path):
    model = T5EncoderModel.from_pretrained(folder)
    model.dequantize()
    model.save_pretrained(tmp_path / "float")
    assert not (tmp_path / "float" / FILE_NAME).exists()
    assert same(T5EncoderModel.from_pretrained(tmp_path / "float"), model)


def test_save_pretrained_takes_what_transformers_passes(folder, tmp_path):
    model = T5EncoderModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "a", save_original_format=True, variant="fp16", token=None)
    assert same(T5EncoderModel.from_pretrained(tmp_path / "a", variant="fp16"), model)
    with pytest.raises(CheckpointError, match="state_dict"):
        model.save_pretrained(tmp_path / "b", state_dict=model.state_dict())
    assert not (tmp_path / "b").exists()


def test_a_language_model_generates_the_same_tokens(tmp_path):
    model = llama()
    model.generation_config.max_new_tokens = 7
    loraq.quantize_(model, RECIPE, progress=False)
    assert type(model.lm_head) is nn.Linear
    written = model.generate(IDS, do_sample=False)
    model.save_pretrained(tmp_path / "q")
    for load in (
        loraq.load,
        LlamaForCausalLM.from_pretrained,
        transformers.AutoModelForCausalLM.from_pretrained,
    ):
        loaded = load(tmp_path / "q")
        assert loaded.generation_config.max_new_tokens == 7
        assert loaded.generate(IDS, do_sample=False).tolist() == written.tolist()
    body = transformers.AutoModel.from_pretrained(tmp_path / "q")
    torch.testing.assert_close(encode(body), encode(model.model), rtol=1e-5, atol=1e-5)
    body.save_pretrained(tmp_path / "body")
    with pytest.raises(CheckpointError, match=r"does not fit LlamaForCausalLM.*lm_head"):
        LlamaForCausalLM.from_pretrained(tmp_path / "body")


def test_what_shares_its_weight_with_a_table_stays(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=True)).eval()
    everything = replace(RECIPE, rules=(loraq.Rule("*", skip=False),))
    plan = loraq.plan_model(model, everything)
    assert [(kept.name, kept.reason) for kept in plan.kept] == [
        ("lm_head", "shares its weight with 'model.embed_tokens.weight'")
    ]
    model.save_pretrained(tmp_path / "float")
    loraq.quantize_checkpoint(tmp_path / "float", tmp_path / "q", everything, progress=False)
    for loaded in (loraq.load(tmp_path / "q"), LlamaForCausalLM.from_pretrained(tmp_path / "q")):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    on_the_fly = LlamaForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=LoraqConfig(everything)
    )
    assert same(on_the_fly, loaded)


# --- what is installed ----------------------------------------------------------------------------


def test_without_transformers_a_folder_of_it_names_what_to_install(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingLibraryError, match="pip install"):
        transformers_model(config, folder / "config.json", folder)


def test_the_installed_version_is_supported_and_others_are_named():
    require_supported("transformers", transformers.__version__, SUPPORTED)
    with pytest.raises(LoraqError, match=r"transformers 4.57.1 is installed; loraq.transformers"):
        require_supported("transformers", "4.57.1", SUPPORTED)


def test_an_unsupported_version_does_not_keep_diffusers_from_being_served(tmp_path):
    pytest.importorskip("diffusers")
    from small.pixart import small_pixart

    model = small_pixart(torch.float32)
    loraq.quantize_(model, RECIPE, progress=False)
    loraq.save(model, tmp_path / "out")
    program = """
import sys, diffusers, transformers
transformers.__version__ = "4.57.1"
import loraq.diffusers
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
loaded = diffusers.PixArtTransformer2DModel.from_pretrained(sys.argv[1])
print("loraq" in AUTO_QUANTIZER_MAPPING, len(loraq.layers.quantized_layers(loaded)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", str(len(quantized_layers(model)))]
    assert "Text encoders of transformers are not served: transformers 4.57.1 is" in done.stderr


def test_a_pipeline_is_quantized_while_it_loads_by_both_libraries(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from small.pixart import small_pixart

    import loraq.diffusers

    small_pixart(torch.float32).save_pretrained(tmp_path / "transformer")
    t5().save_pretrained(tmp_path / "text_encoder")
    diffusers.DPMSolverMultistepScheduler().save_pretrained(tmp_path / "scheduler")
    index = {
        "_class_name": "PixArtSigmaPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": [None, None],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    names, config = ["transformer", "text_encoder"], LoraqConfig(RECIPE)
    for asked in (
        diffusers.PipelineQuantizationConfig(
            quant_backend="loraq",
            quant_kwargs={"recipe": RECIPE.to_dict()},
            components_to_quantize=names,
        ),
        diffusers.PipelineQuantizationConfig(quant_mapping=dict.fromkeys(names, config)),
    ):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            tmp_path, tokenizer=None, vae=None, quantization_config=asked
        )
        for name in names:
            assert quantized_layers(getattr(pipeline, name))
    pipeline.save_pretrained(tmp_path / "saved")
    again = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "saved", tokenizer=None, vae=None
    )
    for name in names:
        assert same(getattr(again, name), getattr(pipeline, name))
        assert isinstance(
            getattr(again, name).config.quantization_config, loraq.diffusers.LoraqConfig
        )
    copied = copy.deepcopy(again.text_encoder)
    assert torch.equal(encode(copied), encode(again.text_encoder))


def test_the_default_dtype_of_the_process_changes_nothing(folder):
    expected = loraq.load(folder)
    torch.set_default_dtype(torch.float64)
    try:
        loaded = loraq.load(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(loaded, expected)
    assert torch.equal(encode(loaded), encode(expected))
