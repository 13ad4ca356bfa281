"""The header of a safetensors file: written byte for byte, and read trusting nothing.

A file is 8 bytes (length of the header), the header (a JSON object: dtype, shape and byte range of
each tensor), and the tensors back to back. The reader checks all of it before a number is read,
because headers come from strangers.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loraq.errors import CheckpointError

#: What safetensors calls the dtypes that torch has too.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
#: The same, the other way round.
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: Floats of 16 bits or more: what may be quantized.
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

#: Longest header that is read, as in the safetensors library.
_MOST_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a stored tensor, in safetensors' notation."""

    #: A key of `DTYPES`.
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file's header says, checked against the size of the file."""

    specs: dict[str, TensorSpec]
    #: Place of each tensor's first byte in the file.
    offsets: dict[str, int]
    #: SHA-256 of the header's bytes: names, dtypes, shapes and order, not the numbers.
    sha256: str
    file_bytes: int
    #: Text that goes along with the tensors.
    metadata: dict[str, str] = field(default_factory=dict)


def encode_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Return the first bytes of a file with these tensors in this order, and each one's offset.

    The offsets count from the beginning of the file.

    The header is filled with spaces to a multiple of 8, so that a tensor is aligned if those before
    it are.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    starts, end = {}, 0
    for name, spec in specs.items():
        starts[name] = end
        end += spec.nbytes
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = struct.pack("<Q", len(text)) + text
    return first, {name: len(first) + start for name, start in starts.items()}


def read_header(path: Path) -> Header:
    """Read and check the header of a file.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is absurd; the message says
            in what.
    """
    if not path.is_file():
        raise CheckpointError(
            f"Shard '{path.name}' is missing from '{path.parent}'. Download or copy it again."
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= min(_MOST_BYTES, size - 8):
                raise ValueError(f"it has {size} bytes and a header of {length} is announced")
            text = file.read(length)
        specs, offsets, metadata = _decode(text, size - 8 - length)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        reason = f"its header lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"'{path}' is truncated or not a safetensors file: {reason}. Copy it again."
        ) from error
    places = {name: 8 + length + start for name, start in offsets.items()}
    return Header(specs, places, hashlib.sha256(text).hexdigest(), size, metadata)


def _decode(
    text: bytes, data_bytes: int
) -> tuple[dict[str, TensorSpec], dict[str, int], dict[str, str]]:
    """Return tensors, their starts and metadata of a header.

    Raises `ValueError` unless they fill the data exactly.
    """
    entries = json.loads(text.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
    if not isinstance(entries, dict):
        raise ValueError(f"its header is a {type(entries).__name__}, not an object")
    metadata = {
        str(key): str(value) for key, value in dict(entries.pop("__metadata__", None) or {}).items()
    }
    specs, starts, end = {}, {}, 0
    for name, entry in sorted(
        entries.items(), key=lambda item: tuple(_require_integers(item[1]["data_offsets"]))
    ):
        start, stop = _require_integers(entry["data_offsets"])
        shape = tuple(_require_integers(entry["shape"]))
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"tensor '{name}' has the dtype {entry['dtype']!r}, which is not read")
        specs[name], starts[name] = TensorSpec(entry["dtype"], shape), start
        if stop - start != specs[name].nbytes:
            raise ValueError(
                f"tensor '{name}', {entry['dtype']} of shape {shape}, is {specs[name].nbytes} "
                f"bytes, and its place holds {stop - start}"
            )
        if start != end:
            raise ValueError(
                f"tensor '{name}' starts at byte {start}, the one before it ends at {end}"
            )
        end = stop
    if end != data_bytes:
        raise ValueError(f"{end} bytes of tensors are announced, and it has {data_bytes}")
    return specs, starts, metadata


def _refuse_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"its header has the key '{key}' twice")
        found[key] = value
    return found


def _require_integers(values: Any) -> list[int]:
    if not isinstance(values, list) or not all(
        type(value) is int and 0 <= value < 2**63 for value in values
    ):
        raise ValueError(f"its header has {values!r} where whole numbers from 0 are required")
    return values
