"""Every transformer class of the installed diffusers: quantized, run, saved, loaded.

The classes are discovered, so that a diffusers with a new one fails here until `small_models` can make it small.
"""

import math

import pytest
import torch
from torch import nn

import loraq
from loraq.layers import quantized_layers
from loraq.pipeline.quantize import plan_model
from loraq.recipe import families
from small_models import OWN, run, small_model

pytest.importorskip("diffusers")

from loraq.integrations.diffusers import transformer_classes

CLASSES = transformer_classes()
each_class = pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)

#: Classes that are worth the slower method; the others take the same way through the code with a quick one.
WITH_LORAQ = ("FluxTransformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel", "WanTransformer3DModel")


@each_class
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated", "ignore:In CPU autocast")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_class_is_quantized_and_comes_back_bit_for_bit(kind, tmp_path):
    model = small_model(kind)
    exact = run(model)
    recipe = loraq.Recipe.from_dict(
        {"scheme": "mxfp4-w8a8-r4"} | ({"effort": "fast"} if kind.__name__ in WITH_LORAQ else {"method": "lqer"})
    )
    loraq.quantize_(model, recipe, progress=False)
    outputs = run(model)
    assert all(output.isfinite().all() for output in outputs)
    assert [output.shape for output in outputs] == [output.shape for output in exact]
    assert not all(torch.equal(a, b) for a, b in zip(outputs, exact, strict=True))
    loraq.save(model, tmp_path / "saved")
    loaded = loraq.load(tmp_path / "saved")
    assert type(loaded) is kind
    assert list(quantized_layers(loaded)) == list(quantized_layers(model))
    assert all(torch.equal(a, b) for a, b in zip(run(loaded), outputs, strict=True))
