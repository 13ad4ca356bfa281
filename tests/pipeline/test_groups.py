"""Groups of layers that fit in memory: all layers, each once, none too large."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraq.errors import CalibrationError
from loraq.pipeline.collect import counting_bytes, group_layers


def test_a_layer_takes_its_moments_and_its_calls_in_fp64():
    """Of calls there are sixteen groups, and the one that is joined to them."""
    assert counting_bytes(100, second_moment=True) == 8 * (100 + 17) * 100
    assert counting_bytes(100, second_moment=False) == 8 * 18 * 100


def test_without_a_limit_there_is_one_run_in_the_order_of_the_model():
    assert group_layers({"b": 8, "a": 16}, None) == [["b", "a"]]


def test_the_widest_stand_first_and_small_ones_fill_what_is_left():
    widths = {"small": 10, "wide": 100, "also wide": 100, "tiny": 1}
    alone = counting_bytes(100, second_moment=True) + 4 * 100 * 100
    limit = alone + counting_bytes(10, second_moment=True)
    assert group_layers(widths, limit) == [["wide", "small"], ["also wide", "tiny"]]
    assert group_layers(widths, 2 * alone) == [["wide", "also wide", "small", "tiny"]]
    assert group_layers(widths, alone, second_moment=False) == [
        ["wide", "also wide", "small", "tiny"]
    ]


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=30),
    st.integers(12 * 300**2 + 8 * 17 * 300, 3_000_000),
    st.booleans(),
)
def test_every_layer_is_in_one_group_and_no_group_takes_more(sizes, limit, full):
    widths = {f"layer.{i}": width for i, width in enumerate(sizes)}
    groups = group_layers(widths, limit, second_moment=full)
    assert sorted(name for group in groups for name in group) == sorted(widths)
    for group in groups:
        taken = sum(counting_bytes(widths[name], second_moment=full) for name in group)
        assert taken + (4 * widths[group[0]] ** 2 if full else 0) <= limit


def test_a_layer_that_alone_takes_more_is_named_with_what_it_takes():
    with pytest.raises(
        CalibrationError, match=r"layer 'wide' with its 1000 inputs takes 0\.0121 GB, and 0\.01 GB"
    ):
        group_layers({"small": 10, "wide": 1000}, 10_000_000)
    assert group_layers({"wide": 1000}, 10_000_000, second_moment=False) == [["wide"]]
