"""Whether the tensors of a folder are those that its manifest describes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from loraq.checkpoint.manifest import Manifest
from loraq.errors import CheckpointError, list_some
from loraq.formats import CastFormat, Format
from loraq.formats.block import BlockFormat
from loraq.formats.element import E4M3
from loraq.formats.scales import view_bytes
from loraq.safetensors.header import FLOATS
from loraq.safetensors.reader import ShardReader


def require_contents(manifest: Manifest, reader: ShardReader) -> None:
    """Require that every part of every layer is there, in its shape, and nothing contradicts it.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype, belongs to no part of its
            layer, or does not stand for numbers; a name is tied to nothing; a size that was noted
            is not that of the tensors. The message names the tensor.
    """
    require_ties(manifest, reader)
    names = set(reader.names) | set(manifest.tied)
    expected: dict[str, tuple[int, ...]] = {}
    for layer, stored in manifest.layers.items():
        parts = stored.scheme.storage(stored.shape)
        expected |= {f"{layer}.{part}": shape for part, shape in parts.items()}
        noted, nbytes = stored.record.get("nbytes"), stored.scheme.nbytes(stored.shape)
        if noted is not None and noted != nbytes:
            raise _build_error(
                reader, f"layer '{layer}' takes {nbytes} bytes by its scheme and {noted} as noted"
            )
    if missing := sorted(expected.keys() - names):
        raise _build_error(reader, f"{len(missing)} tensors are missing: {list_some(missing)}")
    for name in names:
        source = manifest.tied.get(name, name)
        shape, dtype = reader.shape(source), reader.dtype(source)
        layer, _, leaf = name.rpartition(".")
        if name in expected:
            wanted, kinds = expected[name], frozenset({"U8"})
        elif layer in manifest.layers and leaf == "bias" and not manifest.layers[layer].is_stack:
            wanted, kinds = manifest.layers[layer].shape[:1], FLOATS
        elif layer in manifest.layers:
            raise _build_error(reader, f"tensor '{name}' is no part of its layer's scheme")
        else:
            continue
        if shape != wanted or dtype not in kinds:
            raise _build_error(
                reader,
                f"tensor '{name}' is {dtype} of shape {shape}, and {' or '.join(sorted(kinds))} of "
                f"shape {wanted} is required",
            )
    require_numbers(manifest, reader)


def require_ties(manifest: Manifest, reader: ShardReader) -> None:
    """Require that a name that shares another one's tensor has none of its own.

    Raises:
        CheckpointError: it has, or the other one has none.
    """
    stored = set(reader.names)
    if twice := sorted(manifest.tied.keys() & stored):
        raise _build_error(reader, f"these tensors are stored and tied too: {list_some(twice)}")
    if lost := sorted(set(manifest.tied.values()) - stored):
        raise _build_error(reader, f"names are tied to tensors that are missing: {list_some(lost)}")


def require_numbers(manifest: Manifest, reader: ShardReader) -> None:
    """Require that no scale, and no value of a format that has other codes, is NaN or infinite.

    Reads the scales and the 16-bit factors, a fraction of the bytes, and the codes of FP8.

    Raises:
        CheckpointError: one is; the message names the tensor. Or a tensor cannot be read.
    """
    for name, part, fmt in _list_parts(manifest):
        if not _may_be_broken(part, fmt):
            continue
        values = _decode(part, fmt, reader.read(manifest.tied.get(name, name)))
        if broken := int((~values.isfinite()).sum()):
            raise _build_error(
                reader,
                f"tensor '{name}' has {broken} of {values.numel()} values that are not finite "
                "numbers",
            )


def _list_parts(manifest: Manifest) -> Iterator[tuple[str, str, Format]]:
    """Yield the name of each packed tensor, what it is of its matrix, and the matrix's format."""
    for layer, stored in manifest.layers.items():
        *_, n_out, n_in = stored.shape
        for part, (fmt, matrix) in stored.scheme.parts((n_out, n_in)).items():
            for kind in fmt.storage(matrix):
                yield f"{layer}.{part}_{kind}", kind, fmt


def _may_be_broken(kind: str, fmt: Format) -> bool:
    if kind != "packed" or not isinstance(fmt, BlockFormat):
        return True
    return not bool(fmt.element.grid().isfinite().all())


def _decode(kind: str, fmt: Format, raw: Tensor) -> Tensor:
    """Return the numbers that bytes stand for; of a scale, the largest that it makes of a code.

    Only codes of 8 bits, of which each is a byte, may stand for no number.
    """
    if isinstance(fmt, CastFormat):
        return view_bytes(raw, fmt.dtype)
    assert isinstance(fmt, BlockFormat)
    if kind == "packed":
        return fmt.element.decode(raw)
    if kind == "scale":
        return fmt.scale_format.decode(raw) * fmt.element.max
    return view_bytes(raw, torch.float32) * (E4M3.max * fmt.element.max)


def _build_error(reader: ShardReader, reason: str) -> CheckpointError:
    return CheckpointError(
        f"'{reader.folder}' contradicts its 'loraq.json': {reason}. Quantize again, or copy the "
        "folder again."
    )
