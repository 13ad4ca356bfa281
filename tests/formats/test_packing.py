"""Codes to bytes and back; the expected bytes were worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraq.formats.packing import pack, packed_width, unpack

BITS = (4, 5, 6, 8)

codes_of_any_shape = st.builds(
    lambda bits, leading, n, seed: (
        bits,
        torch.randint(
            2**bits, (*leading, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        ),
    ),
    st.sampled_from(BITS),
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 70),
    st.integers(0, 2**31),
)


@given(codes_of_any_shape)
def test_unpacking_gives_the_codes_back(case):
    bits, codes = case
    packed = pack(codes, bits)
    assert packed.shape == (*codes.shape[:-1], packed_width(codes.shape[-1], bits))
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, codes.shape[-1], bits), codes)


@given(codes_of_any_shape)
def test_a_row_is_one_little_endian_number_and_its_unused_bits_are_zero(case):
    bits, codes = case
    n = codes.shape[-1]
    for row, packed in zip(
        codes.view(-1, n), pack(codes, bits).view(-1, packed_width(n, bits)), strict=True
    ):
        expected = sum(int(code) << (bits * i) for i, code in enumerate(row))
        assert int.from_bytes(bytes(packed.tolist()), "little") == expected


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (4, [0x1, 0x2, 0xF], [0x21, 0x0F]),
        (4, [0xA, 0xB, 0xC, 0xD], [0xBA, 0xDC]),
        (5, [1, 2, 3, 4, 5, 6, 7, 8], [0x41, 0x0C, 0x52, 0xCC, 0x41]),
        (5, [31, 0, 31], [0x1F, 0x7C]),
        (6, [1, 2, 3, 4], [0x81, 0x30, 0x10]),
        (6, [63, 0, 63, 0], [0x3F, 0xF0, 0x03]),
        (6, [33], [0x21]),
        (8, [1, 255], [0x01, 0xFF]),
    ],
)
def test_bytes_are_those_written_by_hand(bits, codes, expected, device):
    packed = pack(torch.tensor(codes, dtype=torch.uint8, device=device), bits)
    assert packed.tolist() == expected
    assert unpack(packed, len(codes), bits).tolist() == codes


@pytest.mark.parametrize("bits", BITS)
def test_the_first_value_is_in_the_low_bits(bits):
    codes = torch.zeros(16, dtype=torch.uint8)
    codes[0] = 2**bits - 1
    packed = pack(codes, bits)
    assert int(packed[0]) == 2**bits - 1
    assert not packed[1:].any()


@pytest.mark.parametrize(
    ("n", "bits", "expected"),
    [
        (1, 4, 1),
        (2, 4, 1),
        (3, 4, 2),
        (1, 5, 1),
        (8, 5, 5),
        (9, 5, 6),
        (2, 6, 2),
        (4, 6, 3),
        (85, 6, 64),
        (7, 8, 7),
    ],
)
def test_a_row_takes_as_many_bytes_as_its_bits_need(n, bits, expected):
    assert packed_width(n, bits) == expected


@pytest.mark.parametrize("bits", BITS)
def test_a_row_that_is_not_contiguous_packs_the_same(bits, rng):
    codes = torch.randint(2**bits, (37, 5), dtype=torch.uint8, generator=rng)
    assert torch.equal(pack(codes.T, bits), pack(codes.T.contiguous(), bits))
    packed = pack(codes.T, bits)
    strided = torch.stack([packed, packed], -1)[..., 0]
    assert torch.equal(unpack(strided, 37, bits), codes.T)
