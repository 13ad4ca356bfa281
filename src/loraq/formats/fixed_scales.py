"""Rounding to scales that are settled beforehand, for methods that choose the codes themselves.

`BlockFormat.quantize` chooses scales and codes together; here its scales stay, and every value can be rounded to them
by itself, in any order.
"""

from dataclasses import replace

import torch
from torch import Tensor

from loraq.formats.block import BlockFormat, QTensor, _of_rows, _safe
from loraq.formats.packing import pack
from loraq.formats.scales import scale_rule, view_bytes


class FixedScales:
    """The scales that a format would choose for a matrix (out, in), and a way to store other values with them."""

    def __init__(self, matrix: Tensor, fmt: BlockFormat, rule: str | None = None) -> None:
        """Choose them.

        Args:
            matrix: fp32, (out, in).
            fmt: format of the result.
            rule: scale rule; `None` is the format's default.

        Raises:
            FormatError: a value is NaN or infinite, or the rule does not exist for this format.
        """
        self._nearest = fmt.quantize(matrix, rule)
        self._element = fmt._element(scale_rule(rule or fmt.default_rule, fmt.scale_format, fmt.element))
        n = matrix.shape[1]
        assert self._nearest.scale is not None, "a block format always stores scales"
        scale = fmt.scale_format.decode(self._nearest.scale)
        if self._nearest.global_scale is not None:
            above = _of_rows(view_bytes(self._nearest.global_scale, torch.float32), matrix, slice(None))
            assert above is not None
            scale = scale * above[..., 0]
        #: Scale of every value, (out, in).
        self.of_values = scale.repeat_interleave(fmt.block_size or n, 1)[:, :n]

    def round(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return the nearest values that can be stored with these scales, a part of `of_values`; saturates."""
        return self._element.round(values / _safe(scale)).mul_(scale)

    def pack(self, rounded: Tensor) -> QTensor:
        """Return the packed form of rounded values, (out, in)."""
        codes = self._element.encode(rounded / _safe(self.of_values))
        return replace(self._nearest, packed=pack(codes, self._nearest.format.bits))
