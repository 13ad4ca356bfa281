"""Native names: diffusers' own converters of original files turn them back."""

import pytest
import torch
from accelerate import init_empty_weights

from loraq.errors import ExportError
from loraq.exports.native import Rows, find_native_names, list_classes
from loraq.targets import limits_of

pytest.importorskip("diffusers")

#: Configurations of one block of each kind; the converter of FLUX takes its own width for granted.
CONFIGS = {
    "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
    "QwenImageTransformer2DModel": {"num_layers": 2},
    "WanTransformer3DModel": {"num_layers": 2, "added_kv_proj_dim": 5120, "image_dim": 1280},
    "ZImageTransformer2DModel": {"n_layers": 2, "n_refiner_layers": 1},
}


def row_numbers(name):
    """Return the number of each row, no two of them the same, by tensor."""
    import diffusers

    with init_empty_weights():
        model = getattr(diffusers, name)(**CONFIGS[name])
    rows, first = {}, 0
    for key, tensor in model.state_dict().items():
        rows[key] = torch.arange(first, first + len(tensor))
        first += len(tensor)
    return rows


def test_every_class_of_the_table_is_compared():
    assert set(list_classes()) == set(CONFIGS) == set(limits_of("comfy").classes)


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_turns_native_names_back(name):
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    rows = row_numbers(name)
    native = {
        key: torch.cat([part.of(rows[part.name]) for part in parts])
        for key, parts in find_native_names(name, rows).items()
    }
    assert sum(map(len, native.values())) == sum(map(len, rows.values()))
    convert = SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
    back = convert(checkpoint=dict(native), config=CONFIGS[name])
    assert back.keys() == rows.keys()
    assert all(torch.equal(back[key], rows[key]) for key in rows)


def test_rows_are_put_together_from_top_to_bottom():
    names = [f"transformer_blocks.3.attn.to_{part}.bias" for part in "vqk"]
    found = find_native_names("FluxTransformer2DModel", names)
    wanted = tuple(Rows(f"transformer_blocks.3.attn.to_{part}.bias") for part in "qkv")
    assert found == {"double_blocks.3.img_attn.qkv.bias": wanted}


def test_a_tensor_without_a_native_name_is_refused():
    with pytest.raises(ExportError, match=r"of 1 tensors of Flux.* are not known: mystery\.weight"):
        find_native_names("FluxTransformer2DModel", ["x_embedder.weight", "mystery.weight"])


def test_a_part_that_is_missing_is_named():
    names = ["transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_v.weight"]
    with pytest.raises(
        ExportError, match=r"qkv\.weight' is put together from 3 .* and 2 are there"
    ):
        find_native_names("FluxTransformer2DModel", names)
