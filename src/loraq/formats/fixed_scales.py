"""Rounding to scales that are settled beforehand."""

from dataclasses import replace

from torch import Tensor

from loraq.formats.block import BlockFormat, QTensor
from loraq.formats.packing import pack
from loraq.formats.scales import safe_divisor


class FixedScales:
    """Rounding to scales that are settled beforehand, for methods that choose the codes themselves.

    `BlockFormat.quantize` chooses scales and codes together; here the scales that it would choose
    for a matrix (out, in) stay, and every value can be rounded to them by itself, in any order.
    """

    def __init__(self, matrix: Tensor, fmt: BlockFormat, rule: str | None = None) -> None:
        """Choose the scales.

        Args:
            matrix: fp32, (out, in).
            fmt: format of the result.
            rule: scale rule; `None` is the format's default.

        Raises:
            FormatError: a value is NaN or infinite, or the rule does not exist for this format.
        """
        n = matrix.shape[1]
        self._nearest = fmt.quantize(matrix, rule)
        self._element = fmt.scale_rule(rule).extend(fmt.element)
        scale = fmt.scales(self._nearest)[..., 0]  # (out, n_blocks)
        #: Scale of every value, (out, in).
        self.of_values = scale.repeat_interleave(fmt.block_size or n, 1)[:, :n]

    def round(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return the nearest values that can be stored with these scales; saturates.

        Args:
            values: fp32, any part of a matrix (out, in).
            scale: the same part of `of_values`.
        """
        return self._element.round(values / safe_divisor(scale)).mul_(scale)

    def pack(self, rounded: Tensor) -> QTensor:
        """Return the packed form of rounded values, (out, in)."""
        codes = self._element.encode(rounded / safe_divisor(self.of_values))
        return replace(self._nearest, packed=pack(codes, self._nearest.format.bits))
