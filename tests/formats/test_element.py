"""Scalar formats against independent code: ml_dtypes, torch (floats), gfloat (integers too)."""

import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import FormatInfo, decode_ndarray, round_ndarray
from gfloat.formats import (
    format_info_ocp_e2m1,
    format_info_ocp_e2m3,
    format_info_ocp_e3m2,
    format_info_ocp_e4m3,
    format_info_ocp_e5m2,
    format_info_ocp_int8,
)
from gfloat.types import Domain

from loraq.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2, ElementFormat, integer, mx_integer

FLOATS = [E2M1, E2M3, E3M2, E4M3, E5M2]
INTEGERS = [
    integer(4),
    integer(5),
    integer(6),
    integer(8),
    mx_integer(4),
    mx_integer(6),
    mx_integer(8),
]
ELEMENTS = FLOATS + INTEGERS

ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}

# Codes that no finite value is rounded to: NaN, infinities, and the most negative integer.
NEVER_PRODUCED = {
    "e4m3": [0x7F, 0xFF],
    "e5m2": [0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFD, 0xFE, 0xFF],
    "int4": [0x8],
    "int5": [0x10],
    "int6": [0x20],
    "int8": [0x80],
    "mxint4": [0x8],
    "mxint6": [0x20],
    "mxint8": [0x80],
}

each_element = pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
each_float = pytest.mark.parametrize("element", FLOATS, ids=lambda e: e.name)
each_integer = pytest.mark.parametrize("element", INTEGERS, ids=lambda e: e.name)


def _integer_info(bits: int, fraction_bits: int) -> FormatInfo:
    """What gfloat calls a two's complement format; with (8, 6) it is its `ocp_int8`."""
    return FormatInfo(
        name=f"int{bits}",
        k=bits,
        precision=bits,
        bias=2 - bits + fraction_bits,
        has_nz=False,
        domain=Domain.Finite,
        num_high_nans=0,
        has_subnormals=True,
        is_signed=True,
        is_twos_complement=True,
    )


GFLOAT = {
    "e2m1": format_info_ocp_e2m1,
    "e2m3": format_info_ocp_e2m3,
    "e3m2": format_info_ocp_e3m2,
    "e4m3": format_info_ocp_e4m3,
    "e5m2": format_info_ocp_e5m2,
    "mxint8": format_info_ocp_int8,
    **{f"int{bits}": _integer_info(bits, 0) for bits in (4, 5, 6, 8)},
    **{f"mxint{bits}": _integer_info(bits, bits - 2) for bits in (4, 6)},
}


def difficult_values(element: ElementFormat) -> torch.Tensor:
    """Where rounding can go wrong: grid, midpoints, neighbours,
    under- and overflow, random bits.
    """
    grid = np.unique(decode_ndarray(GFLOAT[element.name], np.arange(2**element.bits)))
    grid = grid[np.isfinite(grid)]
    midpoints = (grid[1:] + grid[:-1]) / 2
    beyond = np.array([1.0, 1.0625, 1.125, 1.25, 1.5, 2.0, 1e4, 1e20]) * element.max
    special = np.concatenate([grid, midpoints, beyond, -beyond]).astype(np.float32)
    special = np.concatenate(
        [special, np.nextafter(special, np.float32(np.inf)), np.nextafter(special, -special)]
    )
    denormal = np.array(
        [0.0, 1e-45, 1e-40, 1.1754942e-38, 1.17549435e-38, 3.4028235e38], dtype=np.float32
    )
    rng = np.random.default_rng(0)
    dense = rng.uniform(-1.3 * element.max, 1.3 * element.max, 20_000).astype(np.float32)
    small = dense * np.exp2(rng.uniform(-30, 0, dense.size)).astype(np.float32)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([special, denormal, -denormal, dense, small, bits[np.isfinite(bits)]])
    return torch.from_numpy(values)


def bits_of(x: torch.Tensor | np.ndarray) -> np.ndarray:
    """Bits of fp32 values, so that -0 and 0 differ; all NaN are one."""
    values = np.asarray(x.numpy() if isinstance(x, torch.Tensor) else x).astype(np.float32)
    values[np.isnan(values)] = np.nan
    return values.view(np.uint32)


@each_element
def test_every_code_has_the_value_gfloat_gives_it(element):
    expected = decode_ndarray(GFLOAT[element.name], np.arange(2**element.bits))
    np.testing.assert_array_equal(bits_of(element.grid()), bits_of(expected))


@each_float
def test_every_code_has_the_value_ml_dtypes_gives_it(element):
    codes = np.arange(2**element.bits, dtype=np.uint8)
    expected = codes.view(ML_DTYPES[element.name]).astype(np.float32)
    np.testing.assert_array_equal(bits_of(element.grid()), bits_of(expected))


@pytest.mark.parametrize(
    ("element", "dtype"),
    [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)],
    ids=["e4m3", "e5m2"],
)
def test_every_code_has_the_value_torch_gives_it(element, dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(bits_of(element.grid()), bits_of(codes.view(dtype).float()))


@each_element
def test_decode_reads_the_grid_in_any_shape(element, device):
    codes = torch.arange(2**element.bits, dtype=torch.uint8, device=device)
    np.testing.assert_array_equal(bits_of(element.decode(codes).cpu()), bits_of(element.grid()))
    shuffled = codes.view(4, -1).T
    np.testing.assert_array_equal(
        bits_of(element.decode(shuffled).cpu()), bits_of(element.grid().view(4, -1).T)
    )


@each_element
def test_encoding_a_decoded_code_gives_the_code_back(element, device):
    codes = torch.tensor(
        [c for c in range(2**element.bits) if c not in NEVER_PRODUCED.get(element.name, [])],
        dtype=torch.uint8,
    ).to(device)
    values = element.decode(codes)
    assert values.isfinite().all()
    assert values.abs().max() == element.max
    assert torch.equal(element.encode(values), codes)
    np.testing.assert_array_equal(bits_of(element.round(values).cpu()), bits_of(values.cpu()))


@each_element
def test_exceptional_codes_are_not_numbers_or_one_step_too_far_and_are_never_produced(element):
    exceptional = torch.tensor(NEVER_PRODUCED.get(element.name, []), dtype=torch.uint8)
    values = element.decode(exceptional)
    if element.is_float:
        assert not values.isfinite().any()
    else:
        assert values.tolist() == [-element.max - 2.0**-element.mantissa_bits]
    assert not torch.isin(element.encode(difficult_values(element)), exceptional).any()


@each_element
def test_rounding_agrees_with_gfloat(element):
    x = difficult_values(element)
    expected = round_ndarray(
        GFLOAT[element.name], x.double().clamp(-element.max, element.max).numpy(), sat=True
    )
    np.testing.assert_array_equal(bits_of(element.round(x)), bits_of(expected))
    np.testing.assert_array_equal(bits_of(element.decode(element.encode(x))), bits_of(expected))


@each_float
def test_rounding_saturates_as_gfloat_does(element):
    # Only the floats: gfloat's integers have the most negative code, which loraq leaves out.
    x = difficult_values(element)
    expected = round_ndarray(GFLOAT[element.name], x.double().numpy(), sat=True)
    np.testing.assert_array_equal(bits_of(element.round(x)), bits_of(expected))


@each_float
def test_rounding_and_codes_agree_with_ml_dtypes(element):
    # The input is cut at the maximum because ml_dtypes overflows to NaN or infinity where the
    # format has them.
    x = difficult_values(element)
    expected = x.clamp(-element.max, element.max).numpy().astype(ML_DTYPES[element.name])
    np.testing.assert_array_equal(bits_of(element.round(x)), bits_of(expected.astype(np.float32)))
    np.testing.assert_array_equal(element.encode(x).numpy(), expected.view(np.uint8))


@pytest.mark.parametrize(
    ("element", "dtype"),
    [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)],
    ids=["e4m3", "e5m2"],
)
def test_rounding_and_codes_agree_with_torch(element, dtype):
    x = difficult_values(element)
    expected = x.clamp(-element.max, element.max).to(dtype)
    np.testing.assert_array_equal(bits_of(element.round(x)), bits_of(expected.float()))
    assert torch.equal(element.encode(x), expected.view(torch.uint8))


@each_integer
def test_integer_codes_are_two_s_complement(element):
    x = difficult_values(element)
    steps = np.rint(x.double().numpy() * 2.0**element.mantissa_bits)
    limit = 2 ** (element.bits - 1) - 1
    expected = np.clip(steps, -limit, limit).astype(np.int64) % 2**element.bits
    np.testing.assert_array_equal(element.encode(x).numpy(), expected)


@each_element
def test_rounding_is_the_same_on_every_device(element, device):
    x = difficult_values(element)
    np.testing.assert_array_equal(
        bits_of(element.round(x.to(device)).cpu()), bits_of(element.round(x))
    )
    assert torch.equal(element.encode(x.to(device)).cpu(), element.encode(x))


@pytest.mark.parametrize(
    ("element", "x", "expected"),
    [
        (E2M1, [5.0, 2.5, 3.5, 0.25, 0.75, 7.0, 1e9], [4.0, 2.0, 4.0, 0.0, 1.0, 6.0, 6.0]),
        (E2M3, [7.25, 7.75, 0.0625, 0.1875], [7.0, 7.5, 0.0, 0.25]),
        (E3M2, [26.0, 27.0, 0.03125, 0.09375], [24.0, 28.0, 0.0, 0.125]),
        (
            E4M3,
            [17.0, 19.0, 464.0, 480.0, 2.0**-10, 3 * 2.0**-10],
            [16.0, 20.0, 448.0, 448.0, 0.0, 2.0**-8],
        ),
        (E5M2, [9.0, 11.0, 61440.0, 2.0**-17, 3 * 2.0**-17], [8.0, 12.0, 57344.0, 0.0, 2.0**-15]),
        (integer(4), [0.5, 1.5, 2.5, 7.5, -7.5, -8.0], [0.0, 2.0, 2.0, 7.0, -7.0, -7.0]),
        (
            mx_integer(8),
            [1 / 128, 3 / 128, 1.99, 2.0, -2.0],
            [0.0, 1 / 32, 127 / 64, 127 / 64, -127 / 64],
        ),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_ties_go_to_the_even_neighbour(element, x, expected):
    assert element.round(torch.tensor(x)).tolist() == expected


@each_float
def test_a_negative_zero_and_a_negative_underflow_keep_their_sign(element):
    x = torch.tensor([-0.0, -1e-20, -1e-42, 0.0, 1e-42])
    sign_bit = 2 ** (element.bits - 1)
    assert element.encode(x).tolist() == [sign_bit, sign_bit, sign_bit, 0, 0]
    assert element.round(x).signbit().tolist() == [True, True, True, False, False]


@each_integer
def test_integers_have_one_zero(element):
    x = torch.tensor([-0.0, -1e-20, -1e-42, 0.0, -0.4 * 2.0**-element.mantissa_bits])
    assert element.encode(x).tolist() == [0] * 5
    assert not element.round(x).signbit().any()


@each_element
def test_an_infinity_saturates_and_nan_stays(element):
    rounded = element.round(torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38]))
    assert rounded[[0, 1, 3, 4]].tolist() == [element.max, -element.max, element.max, -element.max]
    assert rounded[2].isnan()


@each_element
def test_rounding_leaves_its_input_alone(element):
    x = difficult_values(element)
    before = x.clone()
    element.round(x)
    element.encode(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("element", "max_exponent", "overflow_midpoint"),
    [
        (E2M1, 2, 7.0),
        (E2M3, 2, 7.75),
        (E3M2, 4, 30.0),
        (E4M3, 8, 464.0),
        (E5M2, 15, 61440.0),
        (mx_integer(4), 0, 1.875),
        (mx_integer(6), 0, 1.96875),
        (mx_integer(8), 0, 1.9921875),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_the_top_of_the_grid_is_where_the_specification_puts_it(
    element, max_exponent, overflow_midpoint
):
    assert element.max_exponent == max_exponent
    assert element.overflow_midpoint == overflow_midpoint
    assert float(element.grid()[element.grid().isfinite()].max()) == element.max
