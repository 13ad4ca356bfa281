"""Rounding to scales that are settled beforehand, for methods that choose the codes themselves.

`BlockFormat.quantize` chooses scales and codes together; here its scales stay, and every value can
be rounded to them by itself, in any order.
"""

from dataclasses import replace

from torch import Tensor

from loraq.formats.block import BlockFormat, QTensor, _safe
from loraq.formats.packing import pack
from loraq.formats.scales import scale_rule


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
        self._element = fmt._element(
            scale_rule(rule or fmt.default_rule, fmt.scale_format, fmt.element)
        )
        n = matrix.shape[1]
        #: Scale of every value, (out, in).
        self.of_values = fmt.scales(self._nearest)[..., 0].repeat_interleave(
            fmt.block_size or n, 1
        )[:, :n]

    def round(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return the nearest values that can be stored with these scales, a part of `of_values`; saturates."""
        return self._element.round(values / _safe(scale)).mul_(scale)

    def pack(self, rounded: Tensor) -> QTensor:
        """Return the packed form of rounded values, (out, in)."""
        codes = self._element.encode(rounded / _safe(self.of_values))
        return replace(self._nearest, packed=pack(codes, self._nearest.format.bits))
