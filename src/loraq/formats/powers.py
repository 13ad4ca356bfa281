"""A quantized tensor times a power of two: the same codes under other scales, where those exist."""

from dataclasses import replace

import torch
from torch import Tensor

from loraq.errors import FormatError
from loraq.formats.block import BlockFormat, QTensor
from loraq.formats.scales import view_bytes


def times_power_of_two(q: QTensor, exponent: int) -> QTensor:
    """Return a quantized tensor times 2^exponent.

    The product is exact unless scales become too small to be stored: then it is rounded anew, which
    stores zeros in the blocks that are lost.

    Raises:
        FormatError: a value leaves the range of fp32, or of the 16-bit format.
    """
    if not exponent:
        return q
    exact = q.dequantize().double() * 2.0**exponent
    product, limit = _shift(q, exponent), torch.finfo(torch.float32).max
    if exact.abs().max() > limit:
        raise FormatError(
            f"'{q.format.name}' cannot hold {exact.abs().max():.3g}: a decoded value may be "
            f"{limit:.3g} at most. Scale the weight down, or keep this layer in floats."
        )
    if torch.equal(product.dequantize().double(), exact):
        return product
    return q.format.quantize(exact.float(), "search")


def _shift(q: QTensor, exponent: int) -> QTensor:
    """Return the same codes with scales times 2^exponent, as far as these can be stored."""
    if not isinstance(q.format, BlockFormat):
        return q.format.quantize((q.dequantize().double() * 2.0**exponent).float())
    if q.global_scale is not None:
        above = _times(view_bytes(q.global_scale, torch.float32), exponent)
        return replace(q, global_scale=above.view(torch.uint8))
    assert q.scale is not None, "a block format always stores scales"
    storage = q.format.scale_format
    if storage.is_power_of_two:
        return replace(q, scale=(q.scale.int() + exponent).clamp_(0, 254).to(torch.uint8))
    scale = _times(storage.decode(q.scale), exponent)
    return replace(q, scale=storage.encode(scale).view(q.scale.shape))


def _times(scale: Tensor, exponent: int) -> Tensor:
    limit = torch.finfo(torch.float32).max
    return (scale.double() * 2.0**exponent).clamp_(-limit, limit).float()
