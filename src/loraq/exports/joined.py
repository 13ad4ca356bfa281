"""Layers that another program has as one: rows under one another, branches side by side.

`JoinedSource` shows a source under native names, so that a target and the writer see the layers
and tensors of the other program.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loraq.exports.layer import Factors, Head, Layer
from loraq.exports.native import NativeNames, Rows
from loraq.exports.source import ExportSource
from loraq.formats import QTensor
from loraq.formats.scales import E4M3_SCALE, view_bytes
from loraq.safetensors.header import DTYPE_NAMES, DTYPES

#: How far apart global scales may be: under the largest of them E4M3 has no room for more.
_MOST_APART = 2.0**6


@dataclass(frozen=True)
class JoinedSource(ExportSource):
    """A source under the names of another program."""

    #: What each native tensor is put together from.
    names: NativeNames = field(default_factory=dict)

    @classmethod
    def of(cls, source: ExportSource, names: NativeNames) -> "JoinedSource":
        """Return a source under native names."""
        weights = {head.weight_name: head for head in source.heads}
        heads = tuple(
            _join_heads(source, native, rows, weights)
            for native, rows in names.items()
            if any(each.name in weights for each in rows)
        )
        return cls(**(vars(source) | {"heads": heads, "names": names}))

    def list_kept(self) -> list[str]:
        """Return the native names of all tensors that are no part of a quantized weight."""
        weights = {head.weight_name for head in self.heads}
        return [name for name in self.names if name not in weights]

    def kept_spec(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return the widest dtype of a kept tensor's parts, and its shape."""
        joined = _stack(self.names[name], lambda part: self._empty(part))
        return DTYPE_NAMES[joined.dtype], tuple(joined.shape)

    def read_kept(self, name: str) -> Tensor:
        """Return a kept tensor, put together."""
        return _stack(self.names[name], super().read_kept)

    def read_layer(self, head: Head) -> Layer:
        """Return a layer whose parts are quantized in one format."""
        layers = [super(JoinedSource, self).read_layer(part) for part in head.parts]
        main = join_weights([layer.main for layer in layers])
        return Layer(head, main, join_factors(layers))

    def read_dense(self, head: Head) -> Tensor:
        """Return the effective weight of a layer in fp32, whatever its parts are."""
        parts = {part.weight_name: part for part in head.parts}
        read_part, read_float = super().read_dense, super().read_kept

        def read(name: str) -> Tensor:
            return read_part(parts[name]) if name in parts else read_float(name).float()

        return _stack(self.names[head.weight_name], read)

    def _empty(self, name: str) -> Tensor:
        dtype, shape = super().kept_spec(name)
        return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


def join_weights(parts: Sequence[QTensor]) -> QTensor:
    """Return quantized matrices under one another.

    Several of NVFP4 get the largest of their global scales, and their block scales shrink by the
    power of two that is between: exact, but for scales near the smallest that E4M3 has.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    packed = torch.cat([part.packed for part in parts])
    shape = packed.shape[0], first.shape[1]
    scales, top = [part.scale for part in parts if part.scale is not None], None
    above = [view_bytes(p.global_scale, torch.float32) for p in parts if p.global_scale is not None]
    if above:
        top = torch.stack(above).amax(0)
        decoded = [E4M3_SCALE.decode(scale) for scale in scales]
        shrunk = [d * (own / top) for d, own in zip(decoded, above, strict=True)]
        scales = [E4M3_SCALE.encode(E4M3_SCALE.round(scale)) for scale in shrunk]
        top = top.view(torch.uint8)
    return QTensor(packed, torch.cat(scales), top, shape, first.format)


def join_factors(layers: Sequence[Layer]) -> Factors | None:
    """Return the branch of layers under one another: `diag(U₁, U₂ …) @ [D₁; D₂; …]`."""
    branches = [layer.branch for layer in layers if layer.branch is not None]
    if not branches:
        return None
    ups = [
        torch.zeros(layer.main.shape[0], 0) if layer.branch is None else layer.branch.up
        for layer in layers
    ]
    return Factors(torch.block_diag(*ups), torch.cat([branch.down for branch in branches]))


def _join_heads(
    source: ExportSource, native: str, rows: tuple[Rows, ...], weights: dict[str, Head]
) -> Head:
    """Return the head of a native layer; its `misfit` says why its parts do not join."""
    parts = tuple(weights[each.name] for each in rows if each.name in weights)

    def empty(name: str) -> Tensor:
        shape = weights[name].dense_shape if name in weights else source.kept_spec(name)[1]
        return torch.empty(shape, device="meta")

    dense_shape = tuple(_stack(rows, empty).shape)
    first = next((part for part in parts if part.scheme.branch), parts[0])
    scheme, rank = first.scheme, sum(part.rank - part.lora_rank for part in parts)
    if scheme.branch is not None:
        scheme = replace(scheme, branch=replace(scheme.branch, rank=rank))
    return replace(
        first,
        name=native.removesuffix(".weight"),
        shape=(dense_shape[0], first.shape[1]),
        scheme=scheme,
        dense_shape=dense_shape,
        is_kept=all(part.is_kept for part in parts),
        lora_rank=sum(part.lora_rank for part in parts),
        is_modulation=any(part.is_modulation for part in parts),
        parts=parts,
        misfit=_explain_misfit(source, rows, parts),
    )


def _explain_misfit(source: ExportSource, rows: tuple[Rows, ...], parts: tuple[Head, ...]) -> str:
    """Return why quantized layers do not join to one; "" if they do."""
    if any(each.half is not None for each in rows):
        return "its rows stand in another order there"
    if len(parts) < len(rows):
        return f"{len(parts)} of its {len(rows)} parts are quantized"
    kinds = {(part.scheme.weight, part.scheme.activation) for part in parts}
    if len(kinds) > 1:
        return f"its {len(rows)} parts are quantized in several formats"
    if len(parts) > 1 and parts[0].main is not None and parts[0].main.has_global_scale:
        above = torch.stack([source.read_global_scale(part) for part in parts])
        ratios = above.amax() / above
        if not (ratios.frexp().mantissa == 0.5).all() or (ratios > _MOST_APART).any():
            return "the global scales of its parts are no powers of two, or far apart"
    return ""


def _stack(rows: tuple[Rows, ...], read: Callable[[str], Tensor]) -> Tensor:
    parts = [each.of(read(each.name)) for each in rows]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
