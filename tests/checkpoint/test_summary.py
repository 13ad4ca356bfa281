"""What a folder amounts to is what is in it, also where a stranger wrote its notes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import loraq
from loraq.checkpoint.inspect import count_stored
from loraq.checkpoint.summary import Summary, describe
from loraq.errors import CheckpointError
from loraq.scheme import Branch, Scheme


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A module of two layers without a configuration."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("summary") / "q"
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 64))
    recipe = {"scheme": "int4-a16", "method": "rtn"}
    loraq.quantize_(model, loraq.Recipe.from_dict(recipe), progress=False)
    loraq.save(model, place)
    return place


def test_it_is_what_the_folder_holds(folder):
    summary = Summary.read(folder)
    assert (summary.parameters, summary.nbytes) == count_stored(folder, summary.manifest)
    assert summary.parameters == 2 * 64 * 32 + 64
    assert summary.effective_bits == 8 * summary.nbytes / summary.parameters
    assert summary.bits_per_weight == pytest.approx(4.25, abs=0.3)
    assert summary.scratch == 3 * 64 * 32
    assert list(summary.made) == ["0", "1"]
    assert summary.mean_error == sum(summary.made_errors) / 2
    assert summary.class_name == ""


@pytest.mark.parametrize(
    ("config", "name"),
    [({"_class_name": "A"}, "A"), ({"architectures": ["B"]}, "B"), ({"architectures": []}, "")],
)
def test_the_class_is_that_of_either_library(folder, config, name):
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    try:
        assert Summary.read(folder).class_name == name
    finally:
        path.unlink()


def test_a_folder_that_is_not_quantized_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a loraq checkpoint"):
        Summary.read(tmp_path)


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (Scheme("int4"), "int4"),
        (Scheme("mxfp4", "mxint8"), "mxfp4, activations mxint8"),
        (Scheme("int4", branch=Branch(8, "mxint8")), "int4 + rank 8 in mxint8"),
        (
            Scheme("int4", "int8", Branch(8, "mxint8")),
            "int4 + rank 8 in mxint8, activations int8, of the branch bf16",
        ),
    ],
)
def test_a_scheme_in_a_few_words(scheme, text):
    assert describe(scheme) == text
