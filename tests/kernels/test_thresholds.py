"""Both sides of every threshold of the row back ends: a limit that moves changes a result here."""

import pytest
import torch

from loraq.errors import KernelError
from loraq.formats import get_format
from loraq.kernels.fp8_row import encode_tokens, fold
from loraq.kernels.int8_matrix import encode_rows, rows_of
from loraq.kernels.int8_row import Int8Row
from loraq.packed import PackedWeight
from loraq.scheme import Scheme

LARGEST = torch.finfo(torch.float32).max
JUST_BELOW, JUST_ABOVE = 1 - 2.0**-20, 1 + 2.0**-20


def encode_in_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = encode_tokens(x, get_format("fp8_e4m3"))
    return codes.float(), scale.view(-1)


def encode_in_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = encode_rows(x)
    return codes.float(), scale


each_encoder = pytest.mark.parametrize(
    ("encode", "top"), [(encode_in_fp8, 448.0), (encode_in_int8, 127.0)], ids=["fp8", "int8"]
)


@each_encoder
def test_a_token_whose_scale_would_be_subnormal_is_zero(encode, top):
    limit = top * 2.0**-126
    x = torch.tensor([[limit * JUST_BELOW, 0.0], [limit * JUST_ABOVE, 0.0], [2 * limit, 0.0]])
    codes, scale = encode(x)
    assert scale[0] == 0
    assert scale[1] == pytest.approx(2.0**-126, rel=1e-5)
    assert scale[2] == pytest.approx(2.0**-125, rel=1e-5)
    assert codes[1:, 0].tolist() == [top, top]


@each_encoder
def test_the_largest_value_lands_on_the_top_code_and_what_is_larger_than_a_limit_saturates(
    encode, top
):
    fit = 0.9899 * LARGEST
    x = torch.tensor([[fit, -fit], [LARGEST, -LARGEST], [torch.inf, -torch.inf], [3.0, -3.0]])
    codes, scale = encode(x)
    assert codes.tolist() == 4 * [[top, -top]]
    assert scale[0].item() == pytest.approx(fit / top, rel=1e-6)
    assert scale[1].item() == scale[2].item() == pytest.approx(0.99 * LARGEST / top, rel=1e-6)


def test_fp8_rows_fold_exactly_up_to_the_ends_of_their_scales():
    largest, least = 1.75 * 2.0**126, 2.0**-126
    rows = torch.tensor([[largest], [448 * least], [224 * least], [least]])
    codes, scale = fold(rows)
    assert torch.equal(codes.float() * scale, rows)
    assert scale.log2().view(-1).tolist() == [118, -126, -126, -126]
    # The top binade of fp32 saturates.
    codes, scale = fold(torch.tensor([[2 * largest]]))
    assert (codes.float() * scale).item() == largest


@pytest.mark.parametrize(("mantissa", "exponent"), [(1.75, 0), (1.7500001, 1)])
def test_fp8_rows_go_to_the_next_scale_above_448(mantissa, exponent):
    _, scale = fold(torch.tensor([[mantissa * 2.0**8]]))
    assert scale.item() == 2.0**exponent


@pytest.mark.parametrize("power", [-120, -40, 0])
def test_int8_rows_are_exact_up_to_127_steps(power):
    step = 2.0**power
    stored = get_format("bf16").quantize(torch.tensor([[127.0, 1.0], [128.0, 1.0]]) * step)
    rows, error = rows_of(stored)
    assert rows.codes.tolist() == [[127, 1], [127, 1]]  # 128 steps are not: the scale grows
    assert rows.scale[0] == step
    assert rows.scale[1].item() == pytest.approx(step * 128 / 127)
    assert 0 < error < 1e-3


def test_int8_rows_never_have_a_subnormal_scale():
    values = torch.tensor([[127.0, 1.0], [64.0, 1.0], [1.0, 1.0]]) * 2.0**-126
    rows, error = rows_of(get_format("bf16").quantize(values))
    assert rows.scale.tolist() == 3 * [2.0**-126]
    assert error == 0


INT8 = Scheme("bf16", "int8")


def lose(share: float) -> PackedWeight:
    """A weight that loses a share of its norm: quarters of a step beside a value of 127 steps."""
    n_lost = round((share * 127 / 0.25) ** 2)
    row = torch.cat([torch.tensor([127.0]), torch.full((n_lost,), 0.25)])
    return PackedWeight(INT8, get_format("bf16").quantize(row[None]))


def test_int8_row_encodes_a_weight_anew_up_to_3_percent_of_its_norm():
    Int8Row().prepare(lose(0.0298), INT8, torch.float32)
    with pytest.raises(KernelError, match=r"by 0\.030\d of its norm, and at most 0\.03 is allowed"):
        Int8Row().prepare(lose(0.0302), INT8, torch.float32)
