"""`dense`: whole models by diffusers."""

import pytest
import torch

import loraq
from loraq.integrations.diffusers import _quiet_diffusers
from tests.exports.models import MODELS, distance, exact_output, output, save_quantized


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_is_the_exact_weight_only_forward(tmp_path, name):
    model = save_quantized(name, "mxfp4-a4+w8a8-r16-h32", tmp_path / "quantized")
    loraq.export(
        *(tmp_path / "quantized", tmp_path / "out"),
        **{"to": "dense", "dtype": "float32", "progress": False},
    )
    with _quiet_diffusers() as diffusers:
        kind = getattr(diffusers, MODELS[name].class_name)
        loaded = kind.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    found = output(loaded, name)
    assert distance(found, exact_output(model, name)) < 1e-6
    assert distance(exact_output(model, name, branch=False), found) > 1e-2
