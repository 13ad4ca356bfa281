"""A quantized tensor times a power of two: the same codes under other scales, where those exist."""

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from loraq.errors import FormatError
from loraq.formats.block import BlockFormat, QTensor
from loraq.formats.scales import view_bytes

#: Rows are multiplied by 2^±30 at most.
MOST_ROW_EXPONENT = 30


def power_of_two(exponent: int | Int[Tensor, " rows"]) -> float | Tensor:
    """Return 2^exponent, exactly: a number, or a column of doubles, one for each row."""
    if isinstance(exponent, int):
        return 2.0**exponent
    shifted = exponent.long() + MOST_ROW_EXPONENT
    return (
        torch.ones_like(shifted).bitwise_left_shift(shifted).double()[:, None]
        * 2.0**-MOST_ROW_EXPONENT
    )


def times_power_of_two(q: QTensor, exponent: int | Int[Tensor, " rows"]) -> QTensor:
    """Return a quantized tensor times 2^exponent.

    The product is exact unless scales become too small to be stored: then it is rounded anew, which
    stores zeros in the blocks that are lost.

    Args:
        q: the tensor.
        exponent: of all of it, or of each row, in ±`MOST_ROW_EXPONENT`; only the first if a scale
            stands above those of blocks.

    Raises:
        FormatError: a value leaves the range of fp32, or of the 16-bit format.
    """
    if isinstance(exponent, int) and not exponent:
        return q
    power = power_of_two(exponent)
    product, limit = _shift(q, exponent, power), torch.finfo(torch.float32).max
    is_exact, largest = True, 0.0
    for (rows, values), (_, shifted) in zip(q.decode_rows(), product.decode_rows(), strict=True):
        exact = values.double() * (power if isinstance(power, float) else power[rows])
        largest = max(largest, exact.abs().max().item())
        is_exact = is_exact and torch.equal(shifted.double(), exact)
    if largest > limit:
        raise FormatError(
            f"'{q.format.name}' cannot hold {largest:.3g}: a decoded value may be "
            f"{limit:.3g} at most. Scale the weight down, or keep this layer in floats."
        )
    if is_exact:
        return product
    return q.format.quantize((q.dequantize().double() * power).float(), "search")


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
