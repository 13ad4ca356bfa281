"""Bits and permutations: every layout is a permutation, and is the published index formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraq.exports import comfy, nunchaku
from loraq.exports.codes import (
    Tiling,
    e2m1_values,
    high_first,
    join_low_first,
    offset_codes,
    signed_values,
    split_high_first,
    split_low_first,
)
from loraq.exports.ggml import Q4_0, Q5_0, Q8_0
from loraq.formats.element import E2M1, integer
from loraq.formats.packing import pack
from tests.exports.proofs import nunchaku_kernels as formulas

BYTES = torch.arange(256, dtype=torch.uint8).view(1, -1)


def test_nibbles_are_those_of_our_packing():
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64) % 16
    packed = pack(codes, 4)
    assert torch.equal(split_low_first(packed), codes.int())
    assert torch.equal(join_low_first(codes), packed)
    assert torch.equal(split_high_first(high_first(packed)), codes.int())


def test_offset_codes_are_signed_ones_plus_8():
    wanted = signed_values(split_low_first(BYTES)) + 8
    assert torch.equal(split_low_first(offset_codes(BYTES)).float(), wanted)


def test_values_of_codes_are_those_of_the_elements():
    codes = torch.arange(16, dtype=torch.int32)
    assert torch.equal(e2m1_values(codes), E2M1.grid())
    assert torch.equal(signed_values(codes), integer(4).grid())


@given(st.permutations(range(4)), st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_gather_is_the_inverse_of_lay(order, sizes):
    values = torch.arange(torch.Size(sizes).numel())
    tiling = Tiling(tuple(sizes), tuple(order))
    laid = tiling.lay(values)
    assert torch.equal(laid.sort().values, values)
    assert torch.equal(tiling.gather(laid), values)


@pytest.mark.parametrize(("n", "k", "rank"), [(128, 128, 16), (256, 384, 48)])
def test_nunchakus_layouts_are_the_published_index_formulas(n, k, rank):
    positions = [
        (nunchaku.vector_tiling(n), formulas.of_vector(n, 1)),
        (nunchaku.vector_tiling(n, k // 64), formulas.of_vector(n, k // 64)),
        (nunchaku.micro_tiling(n, k // 16), formulas.of_micro(n, k // 16)),
        (nunchaku.down_tiling(rank, k), formulas.of_down(rank, k)),
        (nunchaku.up_tiling(n, rank), formulas.of_up(n, rank)),
    ]
    for tiling, position in positions:
        values = torch.arange(position.numel())
        assert torch.equal(tiling.lay(values)[position.flatten()], values)


@pytest.mark.parametrize(("n", "k"), [(128, 128), (256, 192)])
def test_nunchakus_codes_are_the_published_index_formula(n, k, rng):
    codes = torch.randint(0, 16, (n, k), generator=rng, dtype=torch.uint8)
    laid = join_low_first(nunchaku.codes_tiling(n, k).lay(codes)).view(torch.int8)
    assert torch.equal(formulas.codes(laid, n, k), codes.long())


def test_awq_is_the_published_index_formula(rng):
    codes = torch.randint(0, 16, (8, 128), generator=rng, dtype=torch.uint8)
    laid = join_low_first(nunchaku.awq_tiling(8, 128).lay(codes)).view(torch.int32).view(2, 64)
    ones, zeros = torch.ones(2, 8), torch.zeros(2, 8)
    found = formulas.Kernels().gemv_awq(torch.eye(128), laid, ones, zeros, 128, 8, 128, 64)
    assert torch.equal(found.mT, codes.float())


def test_comfys_block_scales_are_in_the_published_order_of_cublas():
    n, groups = 256, 12
    r, c = torch.arange(n)[:, None], torch.arange(groups)[None]
    tile = r // 128 * (groups // 4) + c // 4
    position = tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    values = torch.arange(n * groups)
    laid = comfy.scale_tiling(n, groups).lay(values)
    assert torch.equal(laid[position.flatten()], values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_global_scale_is_two_16_bit_numbers(dtype):
    scales = torch.logspace(-3, 0, 301)
    for scale in scales:
        whole, rows = nunchaku.split_scale(scale, dtype)
        assert abs(whole.double() * rows.double() / scale.double() - 1) < 3e-4
        assert whole.dtype == rows.dtype == dtype
    whole, rows = nunchaku.split_scale(torch.tensor(2.0**-9), dtype)
    assert (whole.item(), rows.item()) == (2.0**-9, 1.0)


@pytest.mark.parametrize(("kind", "bits"), [(Q4_0, 4), (Q5_0, 5), (Q8_0, 8)])
def test_ggmls_blocks_are_read_back(kind, bits, rng):
    least, most = -(1 << bits - 1), (1 << bits - 1) - 1
    codes = torch.randint(least, most + 1, (3, 96), generator=rng, dtype=torch.int32)
    codes[0, :2] = torch.tensor([least, most])
    scale = torch.tensor([[0.5, -2.0, 0.0]] * 3)
    raw = kind.encode(codes, scale)
    assert raw.shape == (3, kind.row_bytes(96))
    assert torch.equal(kind.decode(raw), codes * scale.repeat_interleave(32, 1))


def test_a_block_of_q4_0_byte_by_byte():
    codes = torch.tensor([[*range(-8, 8), *[0] * 15, 7]], dtype=torch.int32)
    raw = Q4_0.encode(codes, torch.tensor([[1.0]]))[0].tolist()
    assert raw == [0x00, 0x3C, *(0x80 + i for i in range(15)), 0xFF]


def test_a_block_of_q5_0_has_its_upper_bits_in_front():
    codes = torch.full((1, 32), -16, dtype=torch.int32)
    codes[0, 9], codes[0, 31] = 0, 1
    raw = Q5_0.encode(codes, torch.tensor([[1.0]]))[0].tolist()
    assert raw[2:6] == [0x00, 0x02, 0x00, 0x80]
    assert raw[6:] == [*[0] * 15, 0x10]
