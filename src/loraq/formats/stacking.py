"""Rows and columns added to a quantized matrix, and taken away again; the others keep their bytes.

What is added is rounded under the scales that it shares with what is there: that of a whole row
(`int8`, `fp8_e4m3`), and the one above all block scales (NVFP4). It begins at a block, and what is
between is filled with zeros. Only a scale of nothing but zeros, which says nothing, is chosen anew.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from loraq.formats.block import BlockFormat, QTensor
from loraq.formats.packing import pack, unpack
from loraq.formats.scales import safe_divisor, view_bytes

#: The scale rule of what is added: of all rules, the one that leaves the least error.
RULE = "search"


class Move(NamedTuple):
    """A range of rows or columns, and where it begins in the result."""

    start: int
    end: int
    to: int


def add_rows(q: QTensor, rows: Tensor, at: int) -> QTensor:
    """Return a matrix with more rows, from row `at` on."""
    if _is_blank(q):
        return _quantize(q, torch.cat((rows.new_zeros(at, rows.shape[1]), rows)))
    old, new = _open(move_rows(q, [Move(0, q.shape[0], 0)], at + len(rows))), _quantize(q, rows, q)
    cells = _open(new)
    old.codes[at:] = cells.codes
    if old.scale is not None and cells.scale is not None:
        old.scale[at:] = cells.scale
    return _close(old, q)


def add_columns(q: QTensor, columns: Tensor, at: int) -> QTensor:
    """Return a matrix with more columns, from column `at` on, which begins a block."""
    if _is_blank(q):
        return _quantize(q, torch.cat((columns.new_zeros(len(columns), at), columns), -1))
    wide = move_columns(q, [Move(0, q.shape[1], 0)], at + columns.shape[1])
    old, new = _open(wide), _open(_under_scales(q, columns))
    old.codes[:, at:] = new.codes
    if old.scale is not None and new.scale is not None:
        first = 0 if shares_rows(q) else _block_of(q, at)
        old.scale[:, first:] = new.scale
    return _close(old, q)


def round_columns(q: QTensor, columns: Tensor) -> Tensor:
    """Return the values that columns have once they are added to a matrix."""
    return _under_scales(q, columns).dequantize()


def round_rows(q: QTensor, rows: Tensor) -> Tensor:
    """Return the values that rows have once they are added to a matrix."""
    return _quantize(q, rows, None if _is_blank(q) else q).dequantize()


def room_of_rows(q: QTensor) -> Tensor:
    """Return the largest magnitude that each row takes where one scale holds for a row."""
    assert isinstance(q.format, BlockFormat)
    largest = q.format.scales(q)[:, 0, 0] * q.format.element.max
    return torch.where(_free_rows(q), torch.inf, largest)


def move_rows(q: QTensor, moves: Sequence[Move], height: int) -> QTensor:
    """Return a matrix of zeros into which ranges of rows are moved."""
    cells, old = _open(_zeros_like(q, (height, q.shape[1]))), _open(q)
    for start, end, to in moves:
        cells.codes[to : to + end - start] = old.codes[start:end]
        if cells.scale is not None and old.scale is not None:
            cells.scale[to : to + end - start] = old.scale[start:end]
    return _close(cells, q)


def move_columns(q: QTensor, moves: Sequence[Move], width: int) -> QTensor:
    """Return a matrix of zeros into which ranges of columns, each from a block on, are moved."""
    cells, old = _open(_zeros_like(q, (q.shape[0], width))), _open(q)
    for start, end, to in moves:
        cells.codes[:, to : to + end - start] = old.codes[:, start:end]
        if cells.scale is not None and old.scale is not None and not shares_rows(q):
            first, n = _block_of(q, start), _block_of(q, end - 1) + 1 - _block_of(q, start)
            at = _block_of(q, to)
            cells.scale[:, at : at + n] = old.scale[:, first : first + n]
    if shares_rows(q) and cells.scale is not None and old.scale is not None:
        kept = (cells.codes != 0).any(-1).any(-1)  # rows with content
        cells.scale[kept] = old.scale[kept]
    return _close(cells, q)


def shares_rows(q: QTensor) -> bool:
    """Return whether one scale holds for a whole row."""
    return isinstance(q.format, BlockFormat) and q.format.block_size is None


def same_bytes(a: QTensor, b: QTensor) -> bool:
    """Return whether two quantized tensors are stored alike."""
    parts = a.tensors.keys() | b.tensors.keys()
    return a.shape == b.shape and all(
        name in a.tensors and name in b.tensors and torch.equal(a.tensors[name], b.tensors[name])
        for name in parts
    )


class _Cells(NamedTuple):
    """The bytes of a matrix by row, column and byte; and those of its scales by row and block."""

    codes: Tensor
    scale: Tensor | None


def _open(q: QTensor) -> _Cells:
    n_rows, n = q.shape
    if not isinstance(q.format, BlockFormat):
        return _Cells(q.packed.view(n_rows, n, -1).clone(), None)
    assert q.scale is not None, "a block format always stores scales"
    codes = unpack(q.packed, n, q.format.bits).unsqueeze(-1).clone()
    return _Cells(codes, q.scale.view(n_rows, q.format.n_blocks(n), -1).clone())


def _close(cells: _Cells, like: QTensor) -> QTensor:
    n_rows, n, _ = cells.codes.shape
    fmt = like.format
    if not isinstance(fmt, BlockFormat):
        return QTensor(cells.codes.flatten(1), None, None, (n_rows, n), fmt)
    assert cells.scale is not None, "a block format always stores scales"
    packed = pack(cells.codes.squeeze(-1), fmt.bits)
    closed = QTensor(packed, cells.scale.flatten(1), like.global_scale, (n_rows, n), fmt)
    if fmt.has_global_scale and not cells.codes.any():
        return _zeros_like(like, closed.shape)
    return closed


def _zeros_like(q: QTensor, shape: tuple[int, ...]) -> QTensor:
    return q.format.quantize(torch.zeros(shape, device=q.packed.device), RULE)


def _is_blank(q: QTensor) -> bool:
    """Return whether a matrix is stored as one of zeros is."""
    return not q.packed.any() and same_bytes(q, _zeros_like(q, q.shape))


def _quantize(q: QTensor, x: Tensor, under: QTensor | None = None) -> QTensor:
    """Return x in the format of a matrix, under its global scale if it has one."""
    fmt = q.format
    if under is None or not isinstance(fmt, BlockFormat) or under.global_scale is None:
        return fmt.quantize(x, RULE)
    return fmt.quantize(x, RULE, above=view_bytes(under.global_scale, torch.float32))


def _under_scales(q: QTensor, columns: Tensor) -> QTensor:
    """Return columns quantized under what they share with the columns of a matrix."""
    fresh = _quantize(q, columns, None if _is_blank(q) else q)
    fmt = q.format
    if not shares_rows(q):
        return fresh
    assert isinstance(fmt, BlockFormat)
    old, new = _open(q), _open(fresh)
    assert old.scale is not None
    assert new.scale is not None
    is_free = _free_rows(q)[:, None]
    fixed = fmt.element.encode(columns.float() / safe_divisor(fmt.scales(q)[..., 0]))
    codes = torch.where(is_free, new.codes.squeeze(-1), fixed)
    scale = torch.where(is_free[..., None], new.scale, old.scale)
    return replace(fresh, packed=pack(codes, fmt.bits), scale=scale.flatten(1))


def _free_rows(q: QTensor) -> Tensor:
    """Return which rows hold zeros only, under the scale of such a row: it may be chosen anew."""
    cells, zeros = _open(q), _open(_zeros_like(q, q.shape))
    assert cells.scale is not None
    assert zeros.scale is not None
    return (cells.codes == 0).all(-1).all(-1) & (cells.scale == zeros.scale).all(-1).all(-1)


def _block_of(q: QTensor, column: int) -> int:
    assert isinstance(q.format, BlockFormat)
    assert q.format.block_size is not None
    return column // q.format.block_size
