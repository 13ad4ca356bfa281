"""A quantized tensor times a power of two: the same codes under other scales, where those exist."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loraq.errors import FormatError
from loraq.formats.block import BlockFormat, QTensor
from loraq.formats.scales import view_bytes

#: Rows are multiplied by 2^±30 at most.
MOST_ROW_EXPONENT = 30


def powers_of_two(exponents: Int[Tensor, " rows"]) -> Float[Tensor, "rows 1"]:
    """Return 2^exponent of each row exactly, in double precision."""
    shifted = exponents.long() + MOST_ROW_EXPONENT
    return (
        torch.ones_like(shifted).bitwise_left_shift(shifted).double()[:, None]
        * 2.0**-MOST_ROW_EXPONENT
    )


def times_power_of_two(q: QTensor, exponent: int | Int[Tensor, " rows"]) -> QTensor:
    """Return a quantized tensor times 2^exponent.

    The product is exact unless scales become too small to be stored: then it is rounded anew, which
    stores zeros in the blocks that are lost; if rows have exponents of their own, only those rows.

    Args:
        q: the tensor.
        exponent: of all of it, or of each row, in ±`MOST_ROW_EXPONENT`; only the first if a scale
            stands above those of blocks.

    Raises:
        FormatError: a value leaves the range of fp32, or of the 16-bit format.
    """
    if isinstance(exponent, int) and not exponent:
        return q
    power = 2.0**exponent if isinstance(exponent, int) else powers_of_two(exponent)
    product, limit = _shift(q, exponent, power), torch.finfo(torch.float32).max
    inexact, largest = torch.zeros(len(q.packed), dtype=torch.bool, device=q.packed.device), 0.0
    for (rows, values), (_, shifted) in zip(q.decode_rows(), product.decode_rows(), strict=True):
        exact = values.double() * (power if isinstance(power, float) else power[rows])
        largest = max(largest, exact.abs().max().item())
        inexact[rows] = (shifted.double() != exact).any(1)
    if largest > limit:
        raise FormatError(
            f"'{q.format.name}' cannot hold {largest:.3g}: a decoded value may be "
            f"{limit:.3g} at most. Scale the weight down, or keep this layer in floats."
        )
    if not inexact.any():
        return product
    anew = q.format.quantize((q.dequantize().double() * power).float(), "search")
    return anew if isinstance(exponent, int) else _take_rows(product, anew, inexact)


def _take_rows(q: QTensor, other: QTensor, rows: Tensor) -> QTensor:
    """Return a quantized matrix with some rows of another one, under no common scale."""

    def take(ours: Tensor, theirs: Tensor) -> Tensor:
        return torch.where(rows[:, None], theirs.view(len(rows), -1), ours.view(len(rows), -1))

    packed = take(q.packed, other.packed).view(q.packed.shape)
    if q.scale is None or other.scale is None:
        return replace(q, packed=packed)
    return replace(q, packed=packed, scale=take(q.scale, other.scale).view(q.scale.shape))


def _shift(q: QTensor, exponent: int | Int[Tensor, " rows"], power: float | Tensor) -> QTensor:
    """Return the same codes with scales times 2^exponent, as far as these can be stored."""
    if not isinstance(q.format, BlockFormat):
        return q.format.quantize((q.dequantize().double() * power).float())
    if q.global_scale is not None:
        assert isinstance(power, float), "one scale stands above all rows"
        above = _times(view_bytes(q.global_scale, torch.float32), power)
        return replace(q, global_scale=above.view(torch.uint8))
    assert q.scale is not None, "a block format always stores scales"
    storage = q.format.scale_format
    if storage.is_power_of_two:
        step = exponent if isinstance(exponent, int) else exponent[:, None]
        return replace(q, scale=(q.scale.int() + step).clamp_(0, 254).to(torch.uint8))
    scale = _times(storage.decode(q.scale.view(len(q.scale), -1)), power)
    return replace(q, scale=storage.encode(scale).view(q.scale.shape))


def _times(scale: Tensor, power: float | Tensor) -> Tensor:
    limit = torch.finfo(torch.float32).max
    return (scale.double() * power).clamp_(-limit, limit).float()
