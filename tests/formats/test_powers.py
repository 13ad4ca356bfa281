"""Rows of a packed matrix times powers of two: the same codes, and exactly the values."""

import pytest
import torch

from benchmarks.worlds.matrices import heavy_tailed
from loraq.errors import FormatError
from loraq.formats import get_format
from loraq.formats.powers import MOST_ROW_EXPONENT, powers_of_two, times_power_of_two

EXPONENTS = torch.tensor([-30, -6, -1, 0, 1, 6, 30, 2])


def test_powers_of_two_are_exact():
    exponents = torch.arange(-MOST_ROW_EXPONENT, MOST_ROW_EXPONENT + 1)
    column = powers_of_two(exponents)
    assert column.shape == (61, 1)
    assert column[:, 0].tolist() == [2.0**k for k in exponents.tolist()]


@pytest.mark.parametrize(
    "name", ["int4", "int4_b64", "int5_b256", "mxfp4", "mxint8", "int8", "int8_b128", "bf16"]
)
def test_each_row_times_its_power_is_exact(name):
    q = get_format(name).quantize(heavy_tailed(8, 80, 1))
    product = times_power_of_two(q, EXPONENTS)
    exact = q.dequantize().double() * powers_of_two(EXPONENTS)
    assert torch.equal(product.dequantize().double(), exact)
    if name != "bf16":
        assert torch.equal(product.packed, q.packed)
    assert torch.equal(times_power_of_two(product, -EXPONENTS).dequantize(), q.dequantize())


def test_a_row_that_leaves_fp32_is_refused():
    q = get_format("mxfp4").quantize(heavy_tailed(8, 80, 1) * 2.0**110)
    with pytest.raises(FormatError, match="'mxfp4' cannot hold"):
        times_power_of_two(q, EXPONENTS)


def test_only_rows_that_a_scale_cannot_hold_are_rounded_anew():
    x = heavy_tailed(3, 80, 1)
    x[1] *= 2.0**-124
    q = get_format("int4").quantize(x, "absmax")  # scales that "search" would not take
    product = times_power_of_two(q, torch.tensor([-2, -30, 3]))
    for row, power in ((0, 0.25), (2, 8.0)):
        assert torch.equal(product.packed[row], q.packed[row])
        assert torch.equal(product.dequantize()[row], q.dequantize()[row] * power)
    assert not product.dequantize()[1].any()
