"""What is asked of one layer: `Scheme` and `Branch`."""

from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from loraq.errors import FormatError, SchemeError
from loraq.formats import get_format
from loraq.scheme import Branch, Scheme


def test_a_scheme_is_plain_data_that_compares_and_hashes():
    one, same = (Scheme("mxfp4", "mxfp4", Branch(64, "mxint8", "mxint8")) for _ in range(2))
    assert one == same
    assert len({one, same, Scheme("mxfp4"), replace(one, activation="bf16")}) == 3
    assert asdict(one)["branch"] == {
        "rank": 64,
        "weight": "mxint8",
        "activation": "mxint8",
        "intermediate": None,
    }
    with pytest.raises(FrozenInstanceError):
        one.weight = "int4"


def test_what_is_left_out_stays_in_16_bits():
    assert Scheme("int4").activation == "bf16"
    assert Scheme("int4").branch is None
    assert Branch(32) == Branch(32, "bf16", "bf16", None)


def test_the_intermediate_takes_the_format_of_the_input_unless_it_has_its_own():
    assert Branch(8, "bf16", "mxint8").intermediate_format == get_format("mxint8")
    assert Branch(8, "bf16", "mxint8", "bf16").intermediate_format == get_format("bf16")


def test_activation_formats_share_no_scale_between_tokens():
    scheme = Scheme("nvfp4", "nvfp4", Branch(8, "mxint8", "nvfp4"))
    assert scheme.activation_format == get_format("nvfp4").for_rows()
    assert scheme.activation_format != scheme.weight_format
    assert scheme.branch is not None
    assert (
        scheme.branch.activation_format
        == scheme.branch.intermediate_format
        == get_format("nvfp4").for_rows()
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scheme("mxfp5"),
        lambda: Scheme("int4", "mxfp5"),
        lambda: Branch(8, "mxfp5"),
        lambda: Branch(8, "bf16", "mxfp5"),
        lambda: Branch(8, "bf16", "bf16", "mxfp5"),
    ],
)
def test_an_unknown_format_is_found_when_the_scheme_is_made(make):
    with pytest.raises(FormatError, match="'mxfp5'"):
        make()


def test_a_rank_may_be_left_open_for_a_budget():
    assert Branch().rank == Branch(0).rank == 0
    with pytest.raises(SchemeError, match="no rank yet"):
        Scheme("int4", branch=Branch()).check((64, 64))


def test_a_negative_rank_is_an_error():
    with pytest.raises(SchemeError, match="rank is -1"):
        Branch(-1)


@pytest.mark.parametrize("shape", [(64,), (2, 64, 64), (0, 64), (64, 0), ()], ids=str)
def test_only_a_matrix_with_values_can_be_stored(shape):
    with pytest.raises(SchemeError, match="matrix"):
        Scheme("int4").check(shape)


def test_a_rank_above_the_smaller_side_is_named_with_the_largest_possible_one():
    scheme = Scheme("int4", branch=Branch(33))
    scheme.check((33, 100))
    with pytest.raises(SchemeError, match=r"rank 33 .*\(100, 32\).*at most 32"):
        scheme.check((100, 32))


def test_bytes_are_counted_by_hand():
    # int4: two values a byte and a bf16 scale for 64; mxint8: a byte a value and a scale byte for
    # 32.
    assert Scheme("int4").nbytes((10, 128)) == 10 * (64 + 2 * 2)
    branch = Branch(40, "mxint8")
    assert branch.nbytes((10, 128)) == 10 * (40 + 2) + 40 * (128 + 4)
    assert Scheme("int4", branch=branch).nbytes((10, 128)) == 10 * (64 + 2 * 2) + branch.nbytes(
        (10, 128)
    )
    assert Branch(32).nbytes((1152, 4608)) == 2 * 32 * (1152 + 4608)
    # nvfp4: a scale byte for 16 values and one fp32 scale for the matrix.
    assert Scheme("nvfp4").nbytes((8, 64)) == 8 * (32 + 4) + 4
