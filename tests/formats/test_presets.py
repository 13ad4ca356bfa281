"""Names of formats and the errors for names that do not exist."""

from dataclasses import replace

import pytest
import torch

from loraq.errors import FormatError
from loraq.formats import FORMATS, get_format
from loraq.formats.scales import view_bytes

BITS_PER_VALUE = {
    "int4": 4.25,
    "int5": 5.25,
    "int6": 6.25,
    "int8": 8.0,
    "mxint4": 4.25,
    "mxint6": 6.25,
    "mxint8": 8.25,
    "mxfp4": 4.25,
    "mxfp6_e2m3": 6.25,
    "mxfp6_e3m2": 6.25,
    "mxfp8_e4m3": 8.25,
    "mxfp8_e5m2": 8.25,
    "nvfp4": 4.5,
    "fp8_e4m3": 8.0,
    "bf16": 16.0,
    "fp16": 16.0,
}


def test_the_list_of_names_is_frozen():
    assert set(FORMATS) == set(BITS_PER_VALUE)


@pytest.mark.parametrize(("name", "bits"), BITS_PER_VALUE.items())
def test_a_name_gives_its_format_and_its_bits(name, bits):
    fmt = get_format(name)
    assert fmt is FORMATS[name]
    assert fmt.name == name
    assert fmt.bits_per_value == bits
    assert fmt.bits == int(bits)


@pytest.mark.parametrize(
    ("name", "block_size", "bits"),
    [
        ("int4_b32", 32, 4.5),
        ("int4_b128", 128, 4.125),
        ("int5_b16", 16, 6.0),
        ("int6_b64", 64, 6.25),
        ("int8_b64", 64, 8.25),
    ],
)
def test_a_suffix_sets_the_block_size_of_an_integer(name, block_size, bits):
    fmt = get_format(name)
    assert (fmt.name, fmt.block_size, fmt.bits_per_value) == (name, block_size, bits)
    assert fmt.scale_format.name == "bf16"
    assert fmt.element == FORMATS[name.split("_")[0]].element


def test_a_suffix_gives_equal_formats_every_time():
    assert get_format("int4_b128") == get_format("int4_b128")
    assert hash(get_format("int4_b128")) == hash(get_format("int4_b128"))


def test_a_format_object_is_returned_as_it_is():
    fmt = get_format("nvfp4").for_rows()
    assert get_format(fmt) is fmt


@pytest.mark.parametrize("name", ["mxfp5", "", "INT4", "int4_b", "int4_bx", "b64", "int7_b64"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(
        FormatError,
        match=rf"Unknown number format '{name}'\..*Known: bf16, fp16, fp8_e4m3, int4, int5",
    ):
        get_format(name)


def test_a_misspelled_name_gets_the_closest_one_proposed():
    with pytest.raises(FormatError, match="Did you mean 'mxfp4'"):
        get_format("mxpf4")


@pytest.mark.parametrize(
    "name", ["mxfp4_b16", "mxint8_b64", "nvfp4_b32", "fp8_e4m3_b128", "bf16_b64"]
)
def test_formats_with_a_fixed_block_size_refuse_a_suffix(name):
    base = name.rsplit("_b", 1)[0]
    with pytest.raises(
        FormatError, match=rf"Format '{base}' has a fixed block size.*int4, int5, int6 and int8"
    ):
        get_format(name)


@pytest.mark.parametrize(("size", "proposed"), [(0, 8), (4, 8), (12, 8), (63, 56), (100, 96)])
def test_an_impossible_block_size_gets_a_possible_one_proposed(size, proposed):
    with pytest.raises(
        FormatError, match=rf"Block size {size} of 'int4_b{size}'.*Use 'int4_b{proposed}'"
    ):
        get_format(f"int4_b{size}")


IMPORTED = {"int4_columns": 0, "nvfp4_rows": 6, "nvfp4_columns": 1, "nvfp4_rows_columns": 6}


@pytest.mark.parametrize(("name", "n_above"), IMPORTED.items())
def test_imported_weights_have_scales_of_rows_and_columns(name, n_above, rng):
    """They stand together above the block scales, those of rows first."""
    fmt, x = get_format(name), torch.randn(6, 80, generator=rng)
    q = fmt.quantize(x)
    assert {part: tuple(tensor.shape) for part, tensor in q.tensors.items()} == fmt.storage((6, 80))
    assert torch.equal(q.dequantize(), fmt.round(x))
    above = view_bytes(q.global_scale, torch.float32).clone()
    is_of_columns = name.endswith("columns")
    assert len(above) == n_above + 80 * is_of_columns
    columns = torch.rand(80, generator=rng) + 0.5
    if is_of_columns:
        assert (above[n_above:] == 1).all()
        above[n_above:] = columns
        scaled = replace(q, global_scale=above.view(torch.uint8))
        assert torch.equal(scaled.dequantize(), q.dequantize() * columns)
    assert name not in FORMATS
