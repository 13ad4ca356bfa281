"""Rounding one column after the other, for methods that change the columns still to come.

`BlockFormat.quantize` sees the whole matrix at once; here the scale of a block is chosen when its first column is
reached, and stays.
"""

import torch
from torch import Tensor

from loraq.formats.block import BlockFormat, QTensor, _of_rows, _safe
from loraq.formats.packing import pack
from loraq.formats.scales import scale_rule


class ColumnRounder:
    """One matrix on its way to a `QTensor`: `begin_block`, `round` each of its columns, and at the end `pack`.

    For columns that nobody changes the result is that of `BlockFormat.quantize`, bit for bit.
    """

    def __init__(self, matrix: Tensor, fmt: BlockFormat, rule: str | None = None) -> None:
        """Choose the scale above the block scales, if the format has one, from the matrix as it is now.

        Args:
            matrix: fp32, (out, in).
            fmt: format of the result.
            rule: scale rule; `None` is the format's default.

        Raises:
            FormatError: the rule does not exist for this format.
        """
        self.format, self._rule = fmt, scale_rule(rule or fmt.default_rule, fmt.scale_format, fmt.element)
        self._element = fmt._element(self._rule)
        self._above = fmt._global_scale(matrix)
        self._scales: list[Tensor] = []

    def begin_block(self, block: Tensor) -> None:
        """Choose the scales of the next block, (out, at most `block_size`), from its values as they are now."""
        above = _of_rows(self._above, block, slice(None))
        self._scales.append(self.format._choose_scale(self.format._blocks(block), self._rule, above)[:, 0])

    def round(self, column: Tensor) -> Tensor:
        """Return the nearest values that the scales of the current block can store, (out); saturates."""
        scale = self._scales[-1][:, 0]
        return self._element.round(column / _safe(scale)).mul_(scale)

    def pack(self, matrix: Tensor) -> QTensor:
        """Return the packed form of the rounded columns, (out, in), once all blocks were begun."""
        fmt, scale = self.format, torch.cat(self._scales, 1)
        codes = self._element.encode(fmt._blocks(matrix) / _safe(scale)[..., None])
        above = _of_rows(self._above, matrix, slice(None))
        return QTensor(
            packed=pack(codes.flatten(-2)[..., : matrix.shape[-1]], fmt.bits),
            scale=fmt.scale_format.encode(scale if above is None else scale / _safe(above)[..., 0]),
            global_scale=None if self._above is None else self._above.view(torch.uint8),
            shape=tuple(matrix.shape),
            format=fmt,
        )
