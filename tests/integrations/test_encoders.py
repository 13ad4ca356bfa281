"""Every class of transformers that a pipeline of the installed diffusers names.

The classes are found by annotations and none is left out, so a diffusers that names a new one fails
here until `small` can build it.
"""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import loraq
from loraq.layers import linear_layers, quantized_layers

transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from small.encoders import SETTINGS, run, small_encoder  # noqa: E402

import loraq.diffusers  # noqa: E402
from benchmarks.encoders import NOTHING, encoder_classes  # noqa: E402

CLASSES = encoder_classes()
RECIPE = loraq.Recipe.from_dict({"scheme": "mxfp4-a8", "method": "rtn"})
#: Classes of the pipelines that are used most; the others take the same way through the code.
QUICK = (
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection",
    "Gemma2Model",
    "Gemma3ForConditionalGeneration",
    "LlamaForCausalLM",
    "Mistral3ForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3ForCausalLM",
    "T5EncoderModel",
    "T5GemmaEncoder",
    "UMT5EncoderModel",
)
each_class = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in sorted(CLASSES.keys() - NOTHING.keys())
    ],
)

#: Classes that `AutoModel` makes something else of, which has parts that the folder has not.
NO_AUTO = {
    "T5EncoderModel": "T5Model has a decoder",
    "UMT5EncoderModel": "UMT5Model has a decoder",
    "T5GemmaEncoderModel": "T5GemmaModel has a decoder",
    "T5GemmaEncoder": "a part of a model has no automatic class",
    "ClapTextModelWithProjection": "a part of a model has no automatic class",
    "BlipForConditionalGeneration": "BlipModel has another text model",
    "DPTForDepthEstimation": "DPTModel has a pooler",
}
#: Those that transformers lets us refuse.
REFUSED = [name for name, reason in NO_AUTO.items() if "automatic" not in reason]


@cache
def _float_model(name: str) -> nn.Module:
    return small_encoder(CLASSES[name])


def float_model(name: str) -> nn.Module:
    return copy.deepcopy(_float_model(name))


def all_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same parameters and buffers, bit for bit."""
    ours = dict(a.named_parameters()) | dict(a.named_buffers())
    theirs = dict(b.named_parameters()) | dict(b.named_buffers())
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
        for name in ours
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_class_that_pipelines_name_is_known():
    assert CLASSES.keys() == SETTINGS.keys() | NOTHING.keys()
    assert len(CLASSES) > 35


@each_class
def test_a_class_is_quantized_from_files_as_in_memory_and_comes_back_bit_for_bit(name, tmp_path):
    model = float_model(name)
    exact = run(model)
    model.save_pretrained(tmp_path / "float")
    loraq.quantize_checkpoint(tmp_path / "float", tmp_path / "q", RECIPE, progress=False)
    loraq.quantize_(model, RECIPE, progress=False)
    outputs = run(model)
    assert [output.dim() for output in outputs] == [output.dim() for output in exact]
    assert not all_equal(outputs, exact)
    model.save_pretrained(tmp_path / "saved")
    assert files_of(tmp_path / "saved") == files_of(tmp_path / "q")
    loaders = [loraq.load, CLASSES[name].from_pretrained]
    loaders += [] if name in NO_AUTO else [transformers.AutoModel.from_pretrained]
    for load in loaders:
        loaded = load(tmp_path / "q")
        if type(loaded) is CLASSES[name]:
            assert same_tensors(loaded, model)
            # The file is mapped into memory, and sums depend on how numbers are aligned there.
            for ours, theirs in zip(run(loaded), outputs, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert quantized_layers(loaded)
        assert not any(p.is_meta for p in loaded.parameters())


@each_class
def test_only_what_multiplies_tokens_is_quantized_and_activations_stay(name):
    model = float_model(name)
    layers = linear_layers(model)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    plan = loraq.plan_model(model, "mxfp4-a8+w8a8-r4")
    assert not {id(layers[job.name].weight) for job in plan.quantized} & tables
    assert {job.scheme.activation for job in plan.quantized} == {"bf16"}
    assert {job.scheme.rotation for job in plan.quantized} == {0}
    for layer in plan.kept:
        assert layer.reason, layer.name
    # The blocks of the model are quantized whole.
    blocks = ("layers.", "layer.", "block.", "blocks.")
    kept = [kept.name for kept in plan.kept if any(b in kept.name for b in blocks)]
    assert all("neck" in name or "audio" in name for name in kept), kept


@pytest.mark.parametrize("name", REFUSED)
def test_an_automatic_class_that_wants_more_than_the_folder_has_is_refused(name, tmp_path):
    model = float_model(name)
    loraq.quantize_(model, RECIPE, progress=False)
    loraq.save(model, tmp_path / "q")
    with pytest.raises((loraq.LoraqError, ValueError), match=r"does not fit|only support"):
        transformers.AutoModel.from_pretrained(tmp_path / "q")
