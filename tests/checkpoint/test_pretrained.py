"""`save_pretrained` of a quantized model writes what `save` writes, and refuses the rest."""

import copy
import pickle

import pytest
import torch
from torch import nn

import loraq
from loraq.checkpoint.pretrained import _parse_size
from loraq.errors import CheckpointError


class Pretrained(nn.Sequential):
    """Has a method of this name, as models of diffusers do; it writes floats only."""

    def save_pretrained(self, save_directory):
        raise AssertionError("this would write weights without their manifest")


@pytest.fixture
def model() -> Pretrained:
    torch.manual_seed(0)
    model = Pretrained(nn.Linear(64, 32), nn.Linear(32, 8))
    loraq.quantize_(model, "mxfp4", progress=False)
    return model


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_writes_what_save_writes(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    loraq.save(model, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_saving_again_replaces_all_shards(model, tmp_path):
    model.save_pretrained(str(tmp_path / "a"), max_shard_size="1KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    model.save_pretrained(
        tmp_path / "a", safe_serialization=True, variant=None, max_shard_size="10GB"
    )
    assert sorted(contents(tmp_path / "a")) == ["loraq.json", "model.safetensors"]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_saves_itself_and_not_its_original(model, tmp_path, duplicate):
    other = duplicate(model)
    with torch.no_grad():
        other[1].bias.fill_(7.0)
    other.save_pretrained(tmp_path / "a")
    loraq.save(other, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_module_without_the_method_gets_none():
    model = nn.Sequential(nn.Linear(32, 8))
    loraq.quantize_(model, "mxfp4", progress=False)
    assert not hasattr(model, "save_pretrained")


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"safe_serialization": False}, "safe_serialization=False"),
        ({"variant": "a/b"}, "variant"),
        ({"use_flashpack": True}, "use_flashpack"),
        ({"push_to_hub": True}, "push_to_hub"),
        ({"max_shard_size": "5 parsecs"}, "5 parsecs"),
        ({"max_shard_size": 0}, "max_shard_size is 0"),
    ],
)
def test_options_that_this_format_does_not_have(model, tmp_path, option, match):
    with pytest.raises(CheckpointError, match=match):
        model.save_pretrained(tmp_path / "a", **option)
    assert not (tmp_path / "a").exists()


def test_the_other_files_of_a_folder_stay(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    before = contents(tmp_path / "a")
    (tmp_path / "a" / "thesis.tex").write_text("the work of years")
    model.save_pretrained(tmp_path / "a")
    assert contents(tmp_path / "a") == before | {"thesis.tex": b"the work of years"}


def test_a_pipeline_is_not_replaced_by_one_of_its_models(model, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "Pipeline"}')
    with pytest.raises(CheckpointError, match="it is a pipeline"):
        model.save_pretrained(tmp_path)
    assert list(contents(tmp_path)) == ["model_index.json"]


def test_only_the_main_process_writes(model, tmp_path):
    model.save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("size", "nbytes"), [("5GB", 5 * 10**9), ("200 MB", 2 * 10**8), ("1KiB", 1024), (77, 77)]
)
def test_sizes(size, nbytes):
    assert _parse_size(size) == nbytes
