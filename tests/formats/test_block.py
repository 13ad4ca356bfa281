"""Promises that every format makes: shapes, bytes, symmetries, edges."""

import math

import pytest
import torch

from benchmarks.worlds.matrices import (
    dit_like,
    gaussian,
    heavy_tailed,
    huge,
    low_rank,
    outlier_columns,
    tiny,
    zeros,
)
from loraq.errors import FormatError
from loraq.formats import FORMATS, BlockFormat, CastFormat, Format, QTensor, block, get_format
from loraq.formats.packing import unpack

BLOCK_FORMATS = [name for name, fmt in FORMATS.items() if isinstance(fmt, BlockFormat)] + [
    "int4_b128",
    "int8_b64",
]
CAST_FORMATS = ["bf16", "fp16"]
ALL_FORMATS = BLOCK_FORMATS + CAST_FORMATS
SHAPES = [(33,), (1, 1), (1, 31), (3, 33), (2, 3, 85), (5, 7, 64), (3, 2240)]


def rules_of(name: str) -> list[str | None]:
    fmt = get_format(name)
    if isinstance(fmt, CastFormat):
        return [None]
    return (
        ["floor", "midmax", "fitted", "search"]
        if fmt.scale_format.is_power_of_two
        else ["absmax", "fitted", "search"]
    )


WITH_RULES = [(name, rule) for name in ALL_FORMATS for rule in rules_of(name)]
each_format = pytest.mark.parametrize("name", ALL_FORMATS)
each_block_format = pytest.mark.parametrize("name", BLOCK_FORMATS)
each_rule = pytest.mark.parametrize(("name", "rule"), WITH_RULES)
each_block_rule = pytest.mark.parametrize(
    ("name", "rule"), [case for case in WITH_RULES if case[1]]
)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal values, and equal signs of zeros."""
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def stored(q: QTensor) -> list[torch.Tensor]:
    return [part for part in (q.packed, q.scale, q.global_scale) if part is not None]


def total_scale(q: QTensor) -> torch.Tensor:
    """Scale of every value of a matrix, the global one multiplied in."""
    assert isinstance(q.format, BlockFormat)
    scale = q.format.scale_format.decode(q.scale)
    if q.global_scale is not None:
        scale = scale * q.global_scale.view(torch.float32)
    return scale.repeat_interleave(q.format.block_size or q.shape[-1], -1)[..., : q.shape[-1]]


# --- storage --------------------------------------------------------------------------------------


@each_rule
def test_round_gives_what_quantize_stores(name, rule, rng):
    fmt, wrong = get_format(name), {}
    for shape in SHAPES:
        x = torch.randn(shape, generator=rng)
        q = fmt.quantize(x, rule)
        shapes = {
            field: tuple(getattr(q, field).shape)
            for field in ("packed", "scale", "global_scale")
            if getattr(q, field) is not None
        }
        n_bytes = sum(part.numel() for part in stored(q))
        promises = {
            "shape": q.shape == shape,
            "format": q.format is fmt,
            "bits": same_bits(q.dequantize(), fmt.round(x, rule)),
            "bytes": q.nbytes == fmt.nbytes(shape) == n_bytes,
            "plain bytes": all(
                part.dtype == torch.uint8 and part.is_contiguous() for part in stored(q)
            ),
            "storage": fmt.storage(shape) == shapes,
        }
        if broken := [promise for promise, kept in promises.items() if not kept]:
            wrong[shape] = broken
    assert not wrong


@pytest.mark.parametrize(
    ("name", "shape", "n_bytes"),
    [
        ("int4", (10, 128), 10 * (64 + 2 * 2)),
        ("int4", (3, 65), 3 * (33 + 2 * 2)),
        ("int5", (1, 64), 40 + 2),
        ("int8", (4, 100), 4 * (100 + 4)),
        ("int8_b64", (4, 100), 4 * (100 + 2 * 2)),
        ("mxint4", (2, 64), 2 * (32 + 2)),
        ("mxfp4", (7,), 4 + 1),
        ("mxfp6_e2m3", (5, 33), 5 * (25 + 2)),
        ("mxfp8_e5m2", (2, 3, 32), 6 * 33),
        ("nvfp4", (2, 32), 2 * (16 + 2) + 4),
        ("nvfp4", (3, 2, 32), 6 * (16 + 2) + 3 * 4),
        ("fp8_e4m3", (2, 10), 2 * 14),
        ("bf16", (3, 5), 30),
    ],
)
def test_bytes_are_those_counted_by_hand(name, shape, n_bytes):
    assert get_format(name).nbytes(shape) == n_bytes


@each_rule
def test_every_input_dtype_and_layout_gives_the_same_numbers(name, rule, rng):
    fmt = get_format(name)
    x = torch.randn(65, 6, generator=rng).bfloat16().T
    expected = fmt.round(x.float().contiguous(), rule)
    assert same_bits(fmt.round(x, rule), expected)
    assert same_bits(fmt.round(x.double(), rule), expected)
    assert same_bits(fmt.quantize(x, rule).dequantize(), expected)


@each_format
def test_the_result_can_be_written_into_a_given_tensor(name, rng):
    fmt = get_format(name)
    x = torch.randn(5, 70, generator=rng)
    out = torch.full((5, 70), torch.nan)
    assert fmt.round(x, out=out) is out
    assert same_bits(out, fmt.round(x))


@each_rule
def test_rounding_in_chunks_changes_nothing(name, rule, monkeypatch):
    fmt = get_format(name)
    x = heavy_tailed(23, 96)
    whole, whole_q = fmt.round(x, rule), fmt.quantize(x, rule)
    monkeypatch.setattr(block, "_CHUNK_VALUES", 5 * 96)
    assert same_bits(fmt.round(x, rule), whole)
    q = fmt.quantize(x, rule)
    assert all(torch.equal(a, b) for a, b in zip(stored(q), stored(whole_q), strict=True))
    assert same_bits(q.dequantize(), whole)


@pytest.mark.parametrize(
    ("name", "rule"),
    [case for case in WITH_RULES if case[1] in (None, "floor", "absmax", "midmax")],
)
def test_every_device_gives_the_same_bytes(name, rule, device):
    # Without the rules that compare sums, because a device may add in another order.
    fmt = get_format(name)
    x = dit_like(40, 192)
    there, here = fmt.quantize(x.to(device), rule), fmt.quantize(x, rule)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(stored(there), stored(here), strict=True))
    assert same_bits(there.dequantize().cpu(), here.dequantize())
    assert same_bits(fmt.round(x.to(device), rule).cpu(), fmt.round(x, rule))


@each_format
def test_every_format_keeps_the_protocol(name):
    fmt = get_format(name)
    assert isinstance(fmt, Format)
    assert fmt.name == name
    n = 64 * 1024
    assert fmt.nbytes((1, n)) * 8 / n == pytest.approx(fmt.bits_per_value, rel=1e-3)


# --- accuracy -------------------------------------------------------------------------------------


def is_signed(name, rule):
    """Whether the scales of a rule may be negative, so that the lowest integer is useful."""
    return name.startswith(("int4", "int5", "int6")) and rule in ("fitted", "search")


@each_block_rule
def test_the_error_is_at_most_half_a_step_inside_the_range(name, rule):
    fmt = get_format(name)
    x = heavy_tailed(24, 256)
    q = fmt.quantize(x, rule)
    scale = total_scale(q).double()
    lowest = -fmt.element.max - 1 if is_signed(name, rule) else -fmt.element.max
    grid = fmt.element.grid()
    grid = grid[grid.isfinite() & (grid <= fmt.element.max) & (grid >= lowest)].unique().double()
    scaled = x.double() / scale
    inside = (scaled <= fmt.element.max) & (scaled >= lowest)
    assert 0.95 < inside.double().mean() <= 1
    above = torch.searchsorted(grid, scaled.clamp(lowest, fmt.element.max)).clamp(1, len(grid) - 1)
    half_step = (grid[above] - grid[above - 1]) / 2
    error = (q.dequantize().double() / scale - scaled).abs()
    slack = 2.0**-23 * scaled.abs()  # one rounding of the division
    assert (error <= half_step + slack)[inside].all()
    beyond = (q.dequantize().double() / scale)[~inside]
    end = torch.where(scaled[~inside] > 0, fmt.element.max, lowest)
    torch.testing.assert_close(beyond, end.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("int4", 0.12), ("mxfp4", 0.13), ("nvfp4", 0.11), ("mxint8", 0.01), ("fp8_e4m3", 0.03)],
)
def test_errors_of_a_low_rank_matrix_have_the_usual_size(name, limit):
    x = low_rank(64, 256, rank=4)
    assert limit / 2 < relative_difference(get_format(name).round(x), x) < limit


def test_int4_example_by_hand():
    x = torch.zeros(1, 64)
    x[0, :6] = torch.tensor([7.0, -7.0, 2.5, 1.5, 0.49, -3.2])
    q = get_format("int4").quantize(x)
    assert q.dequantize()[0, :6].tolist() == [7.0, -7.0, 2.0, 2.0, 0.0, -3.0]
    assert q.packed[0, :3].tolist() == [0x97, 0x22, 0xD0]  # 7 and -7, 2 and 2, 0 and -3
    assert q.scale.tolist() == [[0x80, 0x3F]]


def test_mxfp4_example_by_hand():
    x = torch.zeros(2, 32)
    x[0, :6] = torch.tensor([5.0, -0.1, 7.0, 0.75, -6.0, 0.25])
    x[1] = x[0] / 8
    q = get_format("mxfp4").quantize(x)
    assert q.scale.tolist() == [[127], [124]]
    assert q.dequantize()[0, :6].tolist() == [4.0, 0.0, 6.0, 1.0, -6.0, 0.0]
    assert torch.equal(q.dequantize()[1] * 8, q.dequantize()[0])
    assert q.packed[0, :3].tolist() == [0x86, 0x27, 0x0F]


def test_nvfp4_example_by_hand():
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1], x[0, 16], x[0, 17] = 2688.0, 1200.0, -12.0, 5.0
    q = get_format("nvfp4").quantize(x)
    assert q.global_scale.view(torch.float32).tolist() == [1.0]
    assert q.scale.tolist() == [[0x7E, 0x40]]  # 448 and 2
    assert q.dequantize()[0, [0, 1, 16, 17]].tolist() == [2688.0, 1344.0, -12.0, 4.0]


# --- symmetries -----------------------------------------------------------------------------------

#: Rules under which a second quantization moves values: they leave out the scale that reproduces
#: the codes.
NOT_REPEATABLE = [("nvfp4", "fitted"), ("int8_b64", "search")]
#: Formats with fp32 scales: maximum / 127 and back may differ in the last bits.
REPEATABLE_TO_THE_LAST_BIT = ["int8", "fp8_e4m3"]


@each_rule
def test_quantizing_twice_changes_nothing(name, rule):
    if (name, rule) in NOT_REPEATABLE or is_signed(name, rule):
        pytest.skip("the rule does not propose the scale that it chose")
    fmt = get_format(name)
    for x in (gaussian(24, 320), heavy_tailed(24, 320), outlier_columns(24, 320)):
        once = fmt.round(x, rule)
        if name in REPEATABLE_TO_THE_LAST_BIT:
            torch.testing.assert_close(fmt.round(once, rule), once, rtol=1e-6, atol=0)
        else:
            assert same_bits(fmt.round(once, rule), once)


@each_rule
def test_scaling_by_a_power_of_two_commutes(name, rule):
    if name == "fp16":
        pytest.skip("fp16 has too few exponents")
    fmt = get_format(name)
    x = heavy_tailed(12, 160)
    rounded = fmt.round(x, rule)
    wrong = [
        exponent
        for exponent in (-20, -1, 13)
        if not same_bits(fmt.round(x * 2.0**exponent, rule), rounded * 2.0**exponent)
    ]
    assert not wrong


@each_rule
def test_formats_are_symmetric(name, rule):
    fmt = get_format(name)
    x = heavy_tailed(12, 160)
    assert torch.equal(fmt.round(-x, rule), -fmt.round(x, rule))


@each_block_rule
def test_permuting_whole_blocks_commutes(name, rule, rng):
    fmt = get_format(name)
    size = fmt.block_size or 64
    x = heavy_tailed(6, size * 10)
    if fmt.block_size is None:
        order = torch.randperm(x.shape[1], generator=rng)
        # A whole row is one block: any order of its values is fine. But sums in another order make
        # another fp32 scale.
        assert (
            relative_difference(fmt.round(x[:, order], rule), fmt.round(x, rule)[:, order]) < 1e-4
        )
        return
    order = torch.randperm(10, generator=rng).repeat_interleave(size) * size + torch.arange(
        size
    ).repeat(10)
    assert same_bits(fmt.round(x[:, order], rule), fmt.round(x, rule)[:, order])


@each_rule
def test_for_rows_makes_rows_independent(name, rule):
    fmt = get_format(name).for_rows()
    x = heavy_tailed(9, 96) * torch.logspace(-3, 3, 9).view(-1, 1)
    whole = fmt.quantize(x, rule)
    for i in range(9):
        alone = fmt.quantize(x[i : i + 1], rule)
        for a, b in zip(stored(alone), stored(whole), strict=True):
            assert torch.equal(a, b[i : i + 1] if b.dim() == 2 else b[4 * i : 4 * i + 4])
        assert same_bits(fmt.round(x[i], rule), fmt.round(x, rule)[i])
    assert whole.nbytes == fmt.nbytes((9, 96))
    assert same_bits(whole.dequantize(), fmt.round(x, rule))


def test_only_nvfp4_shares_a_scale_between_rows():
    x = gaussian(2, 64) * torch.tensor([[1.0], [1e6]])
    for name in ALL_FORMATS:
        fmt = get_format(name)
        independent = torch.equal(fmt.round(x[:1]), fmt.round(x)[:1])
        assert independent == (name != "nvfp4")
        assert (fmt.for_rows() is fmt) == (fmt.bits != 4)


def test_every_matrix_of_a_batch_has_its_own_global_scale():
    x = torch.stack([gaussian(5, 64, seed) * 1000.0**seed for seed in range(3)])
    fmt = get_format("nvfp4")
    q = fmt.quantize(x)
    assert q.global_scale.numel() == 4 * 3
    for i in range(3):
        assert same_bits(q.dequantize()[i], fmt.round(x[i]))


# --- edges ----------------------------------------------------------------------------------------


@each_rule
def test_zeros_stay_zeros(name, rule):
    fmt = get_format(name)
    x = gaussian(4, 128)
    x[1] = 0
    x[2, :64] = 0
    for y in (zeros(4, 128), x):
        q = fmt.quantize(y, rule)
        assert torch.equal(q.dequantize()[y == 0], torch.zeros(int((y == 0).sum())))
        assert same_bits(q.dequantize(), fmt.round(y, rule))


@each_rule
def test_a_negative_zero_is_kept_by_floats_and_is_plain_zero_for_integers(name, rule):
    fmt = get_format(name)
    x = torch.tensor([[-0.0, 1.0, -1e-12, 0.0] * 16])
    rounded = fmt.round(x, rule)
    is_float = isinstance(fmt, CastFormat) or fmt.element.is_float
    if is_signed(name, rule):  # a negative scale turns the sign of a zero too
        assert rounded[0, [0, 2, 3]].tolist() == [0, 0, 0]
    else:
        assert rounded[0, :4].signbit().tolist() == [is_float, False, is_float, False]
    assert same_bits(fmt.quantize(x, rule).dequantize(), rounded)


@each_rule
def test_tiny_values_are_kept_or_become_zero_but_never_more(name, rule):
    fmt = get_format(name)
    for x in (tiny(4, 64), gaussian(4, 64) * 1e-38, gaussian(4, 64) * 1e-43):
        rounded = fmt.round(x, rule)
        assert same_bits(fmt.quantize(x, rule).dequantize(), rounded)
        assert rounded.isfinite().all()
        assert rounded.abs().max() <= 1.5 * x.abs().max()


@pytest.mark.parametrize("name", [name for name in BLOCK_FORMATS if name != "nvfp4"])
def test_values_of_size_1e_minus_30_are_quantized_as_well_as_others(name):
    # NVFP4 is the exception: below 2^-100 its global scale is 1 and everything becomes zero.
    fmt = get_format(name)
    x = tiny(8, 128)
    ordinary = gaussian(8, 128)
    expected = relative_difference(fmt.round(ordinary), ordinary)
    assert relative_difference(fmt.round(x), x) == pytest.approx(expected, rel=0.05)
    assert not FORMATS["nvfp4"].round(x).any()


@each_block_rule
def test_huge_values_stay_finite_and_are_not_lost(name, rule):
    fmt = get_format(name)
    for x in (huge(4, 128), gaussian(4, 128).clamp(-1, 1) * 3.4e38):
        rounded = fmt.round(x, rule)
        assert same_bits(fmt.quantize(x, rule).dequantize(), rounded)
        assert rounded.isfinite().all()
        assert relative_difference(rounded, x) < 0.3


@each_rule
def test_a_value_that_is_not_finite_is_refused_with_its_place(name, rule):
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(2, 3, 70)
        x[1, 2, 65] = bad
        message = (
            rf"Cannot quantize to '{name}': the value at \(1, 2, 65\) is {bad}, "
            "and 1 of 420 values"
        )
        with pytest.raises(FormatError, match=message):
            get_format(name).quantize(x, rule)


@each_rule
def test_round_keeps_nan_and_saturates_infinities(name, rule):
    fmt = get_format(name).for_rows()
    x = gaussian(3, 256)
    x[0, 200] = torch.nan
    x[1, 100] = -torch.inf
    rounded = fmt.round(x, rule)
    assert rounded[0, 200].isnan()
    assert int(rounded.isnan().sum()) == 1
    assert -torch.inf < rounded[1, 100] < (-65503 if name == "fp16" else -1e38)
    assert same_bits(rounded[2], fmt.round(x[2], rule))


@pytest.mark.parametrize(
    "name", ["int4", "int5", "int6", "int8", "int8_b64", "mxint4", "mxint6", "mxint8"]
)
def test_the_most_negative_integer_is_stored_only_where_scales_are_signed(name):
    fmt = get_format(name)
    # With signed scales a block of one sign takes the longer half of the range.
    for sign in (
        -1,
        1,
    ):
        x = sign * heavy_tailed(64, 256).abs()
        for rule in rules_of(name):
            q = fmt.quantize(x, rule)
            most_negative = 2 ** (fmt.bits - 1)
            codes = unpack(q.packed, 256, fmt.bits)
            assert (codes == most_negative).any() == is_signed(name, rule)
            if is_signed(name, rule):
                assert (total_scale(q).sign() == -sign).all()
            assert (
                codes == (most_negative + 1 if sign < 0 else most_negative - 1)
            ).any() or is_signed(name, rule)
            assert fmt.quantize(x, rule).nbytes == fmt.nbytes((64, 256))


def test_bf16_and_fp16_are_casts_that_saturate():
    x = torch.tensor([1.0, 1 + 2.0**-8, -70000.0, 3.4e38, 2.0**-25, 65519.0])
    assert get_format("bf16").round(x).tolist() == [
        1.0,
        1.0,
        -70144.0,
        3.3895313892515355e38,
        2.0**-25,
        65536.0,
    ]
    assert get_format("fp16").round(x).tolist() == [
        1.0,
        1 + 2.0**-8,
        -65504.0,
        65504.0,
        0.0,
        65504.0,
    ]
    x = heavy_tailed(16, 33)
    assert same_bits(get_format("bf16").round(x), x.bfloat16().float())
    assert same_bits(get_format("fp16").round(x), x.half().float())
    assert torch.equal(get_format("bf16").quantize(x).packed, x.bfloat16().view(torch.uint8))


@each_block_format
def test_a_short_last_block_is_as_good_as_a_block_of_its_own(name):
    fmt = get_format(name)
    if fmt.block_size is None:
        pytest.skip("the row is the block")
    x = gaussian(5, fmt.block_size + 7)
    tail = x[:, fmt.block_size :]
    expected = fmt.round(torch.nn.functional.pad(tail, (fmt.block_size, 0)))[:, fmt.block_size :]
    if name != "nvfp4":
        assert same_bits(fmt.round(x)[:, fmt.block_size :], expected)
        assert same_bits(fmt.round(x)[:, fmt.block_size :], fmt.round(tail))
    assert fmt.n_blocks(x.shape[-1]) == 2
    assert math.prod(fmt.storage((5, x.shape[-1]))["scale"]) == 5 * 2 * fmt.scale_format.n_bytes
