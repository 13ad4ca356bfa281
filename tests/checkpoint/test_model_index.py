"""What a pipeline names, and which of it is meant; without diffusers."""

import json
from pathlib import Path

import pytest

from loraq.checkpoint.model_index import (
    choose_components,
    choose_model,
    choose_names,
    list_apart,
    read_components,
)
from loraq.errors import CheckpointError

PACKED = {"quantization_config": {"quant_method": "loraq"}}
OTHERS = {"quantization_config": {"quant_method": "bitsandbytes"}}


def pipeline(root: Path, **components: tuple[str, dict[str, object]]) -> Path:
    """Make a pipeline of components with a class and a configuration."""
    index: dict[str, object] = {"_class_name": "Pipeline", "flag": True, "none": [None, None]}
    for name, (class_name, config) in components.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
        library = "transformers" if "encoder" in name else "diffusers"
        index[name] = [library, class_name]
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def names(chosen: tuple[list, list]) -> tuple[list[str], list[str]]:
    return tuple([part.name for part in parts] for parts in chosen)


def test_components_are_what_the_index_names_in_its_order(tmp_path):
    root = pipeline(tmp_path, vae=("VAE", {}), unet=("UNet", {}), text_encoder=("T5", {}))
    assert list(read_components(root)) == ["vae", "unet", "text_encoder"]
    assert str(read_components(root)["unet"]) == "unet (UNet)"


@pytest.mark.parametrize("name", ["../secret", "a/b", "..", "", "a\x1bb"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({name: ["diffusers", "X"]}))
    with pytest.raises(CheckpointError, match="which is no folder's name"):
        read_components(tmp_path)


@pytest.mark.parametrize("entry", [1, [], ["diffusers"], [None, "X"], {"a": 1}, "x", [["a"], "X"]])
def test_what_is_no_component_is_a_setting(tmp_path, entry):
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": entry}))
    assert read_components(tmp_path) == {}
    with pytest.raises(CheckpointError, match="has no transformer and no U-Net"):
        choose_components(tmp_path, None)


def test_denoisers_by_default_and_text_encoders_too_for_all(tmp_path):
    root = pipeline(
        tmp_path, text_encoder=("T5", {}), vae=("VAE", {}), transformer_2=("X", {}), unet=("X", {})
    )
    assert names(choose_components(root, None)) == (["transformer_2", "unet"], [])
    everything = ["text_encoder", "transformer_2", "unet"]
    assert names(choose_components(root, "all")) == (everything, [])
    assert names(choose_components(root, "unet, vae")) == (["vae", "unet"], [])
    assert names(choose_components(root, ["unet", "unet"])) == (["unet"], [])
    with pytest.raises(CheckpointError, match="no component all"):
        choose_components(root, ["all", "vae"])


@pytest.mark.parametrize("config", [PACKED, OTHERS])
def test_what_is_quantized_already_is_left_unless_it_is_all_or_named(tmp_path, config):
    root = pipeline(tmp_path, transformer=("X", config), transformer_2=("X", {}))
    assert names(choose_components(root, None)) == (["transformer_2"], ["transformer"])
    for asked in ("transformer", "transformer,transformer_2"):
        with pytest.raises(CheckpointError, match=r"quantized already \(transformer\)\. Start"):
            choose_components(root, asked)
    (root / "transformer_2" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"already \(transformer, transformer_2\)"):
        choose_components(root, None)


def test_a_manifest_beside_a_float_configuration_belongs_to_nothing(tmp_path):
    root = pipeline(tmp_path, transformer=("X", {"_class_name": "X"}), unet=("X", {}))
    for name in ("transformer", "unet"):
        (root / name / "loraq.json").write_text("{}")
    assert names(choose_components(root, None)) == (["transformer"], ["unet"])


def test_one_model_is_the_only_denoiser_or_the_one_that_is_named(tmp_path):
    root = pipeline(tmp_path, text_encoder=("T5", PACKED), transformer=("X", {}), vae=("V", {}))
    assert choose_model(root, None).name == "transformer"
    assert choose_model(root, None, quantized=True).name == "text_encoder"
    assert choose_model(root, "vae").name == "vae"
    (root / "transformer" / "config.json").write_text(json.dumps(PACKED))
    assert choose_model(root, None, quantized=True).name == "transformer"
    with pytest.raises(CheckpointError, match=r"has no model 'none'\. It has text_encoder \(T5\)"):
        choose_model(root, "none")


def test_of_several_models_none_is_guessed(tmp_path):
    root = pipeline(tmp_path, transformer=("X", {}), transformer_2=("Y", PACKED))
    with pytest.raises(CheckpointError, match=r"2 models: transformer \(X\), transformer_2 \(Y\)"):
        choose_model(root, None)
    assert choose_model(root, None, quantized=True).name == "transformer_2"


def test_names_are_chosen_without_folders():
    kinds = {"vae": ("diffusers", "V"), "prior": ("mine", "PriorTransformer")}
    assert choose_names(kinds, None) == ["prior"]
    with pytest.raises(CheckpointError, match="of vae"):
        choose_names({"vae": ("diffusers", "V")}, None)


def test_what_lies_beside_a_pipeline(tmp_path):
    root = pipeline(tmp_path, unet=("X", {}), vae=("V", {}))
    (root / "old").mkdir()
    for name in ("LICENSE", "model.safetensors", "model.ckpt"):
        (root / name).touch()
    patterns = ("*.safetensors*", "*.ckpt")
    found = list_apart(root, read_components(root), patterns)
    assert found == ["model.ckpt", "model.safetensors", "old"]
