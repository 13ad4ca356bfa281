"""Plain matrix products on decoded weights: kept (`resident`) or not (`low_memory`).

`resident` takes the memory of the decoded weight (2 bytes a value for bf16 inputs, 4 for the
others) on top of the packed bytes and runs everywhere. `low_memory` keeps nothing but the packed
bytes and gives the same bits. Its 4-bit codes are decoded two at a time through a table of 256
bytes, several times faster than one code at a time.

Where no activation is rounded, the branch is a part of the weight: Qw(R) + U D is one matrix, and
the layer costs what `nn.Linear` costs.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, library

from loraq.formats import BlockFormat, CastFormat, QTensor, get_format
from loraq.formats.scales import view_bytes
from loraq.kernels.base import Backend, Operands, decode, decode_one
from loraq.kernels.reference import run
from loraq.packed import PackedWeight
from loraq.scheme import Scheme

#: Decoded values handled at a time, so that the passes over them stay in cache.
_CHUNK_VALUES = 1 << 18


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return bf16 for bf16 inputs, else fp32, which CPUs do far faster than fp16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


@dataclass(frozen=True)
class Resident(Backend):
    """Multiply in the input's dtype with decoded weights, kept or decoded anew at each call."""

    #: Name for `get_backend`.
    name: str = "resident"
    #: Whether the decoded weights are kept.
    keeps_operands: bool = True

    def refusal(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        """Return `None`: every layer runs."""
        return None

    def bound(self, scheme: Scheme, dtype: torch.dtype) -> float:
        """Return what BLAS's order of sums does in fp32, and what rounding to 8 bits does in bf16.

        A sum in another order may also round to the next fp16 number (2⁻¹¹), which few of them do.
        """
        return {torch.float16: 1e-4, torch.bfloat16: 2e-2}.get(dtype, 1e-5)

    def prepare(self, packed: PackedWeight, dtype: torch.dtype) -> Operands | PackedWeight:
        """Return the decoded weights, or the packed ones."""
        if not self.keeps_operands:
            return packed
        return _merge(decode(packed, operand_dtype(dtype)), packed.scheme)

    def linear(
        self,
        x: Tensor,
        operands: Operands | PackedWeight,
        scheme: Scheme,
        bias: Tensor | None,
    ) -> Tensor:
        """Return y (…, out) in the dtype of x (…, in)."""
        dtype = operand_dtype(x.dtype)
        if isinstance(operands, PackedWeight):
            operands = _merge(decode_by_table(operands, dtype), scheme)
        return run(x, operands, scheme, bias, dtype)


def _merge(operands: Operands, scheme: Scheme) -> Operands:
    """Add the branch to the main weight, if nothing between them is rounded."""
    main, up, down = operands
    if scheme.branch is None or up is None or down is None:
        return operands
    branch = scheme.branch
    formats = scheme.activation_format, branch.activation_format, branch.intermediate_format
    if not all(isinstance(fmt, CastFormat) for fmt in formats):
        return operands
    return Operands(torch.addmm(main, up, down), None, None)


def decode_by_table(packed: PackedWeight, dtype: torch.dtype) -> Operands:
    """Return what `decode` returns, sooner for 4-bit tensors."""
    branch = packed.branch
    return Operands(
        _decode_pairs(packed.main, dtype),
        _decode_pairs(branch.proj_up, dtype) if branch else None,
        _decode_pairs(branch.proj_down, dtype) if branch else None,
    )


def _decode_pairs(q: QTensor, dtype: torch.dtype) -> Tensor:
    if q.format.bits != 4:
        return decode_one(q, dtype)
    return _dequantize_pairs(q.packed, q.scale, q.global_scale, q.format.name, q.shape[-1], dtype)


# Opaque, as `loraq::dequantize` is, so that a compiled model keeps no decoded weight as a constant.
@library.custom_op("loraq::dequantize_pairs", mutates_args=())
def _dequantize_pairs(
    packed: Tensor,
    scale: Tensor | None,
    global_scale: Tensor | None,
    name: str,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    fmt = get_format(name)
    assert isinstance(fmt, BlockFormat)
    assert scale is not None
    factor = fmt.scale_format.decode(scale)
    if global_scale is not None:
        factor = factor * view_bytes(global_scale, torch.float32)
    # A product of a 4-bit value and a scale of 8 significant bits is exact in fp32, so rounding it
    # to bf16 at once is what rounding a decoded fp32 weight is. Longer scales multiply in fp32.
    exact = dtype == torch.bfloat16 and fmt.scale_format.n_bytes < 4 and global_scale is None
    work = dtype if exact else torch.float32
    table, factor = _pairs(name, work, packed.device), factor.to(work)
    size = fmt.block_size or n
    out = torch.empty((len(packed), n), dtype=dtype, device=packed.device)
    step = max(1, _CHUNK_VALUES // n) if packed.device.type == "cpu" else len(packed)
    for start in range(0, len(packed), step):
        part = slice(start, start + step)
        values = (
            table.index_select(0, packed[part].flatten().int())
            .view(work)
            .view(len(packed[part]), -1)
        )
        if n % size or n % 2:
            values = values[:, :n] * factor[part].repeat_interleave(size, -1)[:, :n]
        else:
            values.view(len(values), -1, size).mul_(factor[part].unsqueeze(-1))
        out[part] = values
    return out


@_dequantize_pairs.register_fake
def _(
    packed: Tensor,
    scale: Tensor | None,
    global_scale: Tensor | None,
    name: str,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], n), dtype=dtype)


@lru_cache(maxsize=32)
def _pairs(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Both values of every byte, as one integer a byte: a single look-up then moves both."""
    fmt = get_format(name)
    assert isinstance(fmt, BlockFormat)
    byte, grid = torch.arange(256, device="cpu"), fmt.element.grid().to(dtype)
    pairs = torch.stack((grid[byte & 15], grid[byte >> 4]), -1)
    return pairs.view(torch.int32 if dtype == torch.bfloat16 else torch.int64).flatten().to(device)
