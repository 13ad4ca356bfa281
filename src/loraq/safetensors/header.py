"""The header of a safetensors file: written byte for byte, and read trusting nothing.

A file is 8 bytes (length of the header), the header (a JSON object: dtype, shape and byte range of
each tensor), and the tensors back to back. The reader checks all of it before a number is read,
because headers come from strangers.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loraq.errors import CheckpointError, list_some
from loraq.json_files import parse_json
from loraq.regular_file import open_regular

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

#: Longest header that is read. The safetensors library reads 100 MB, which Python would need
#: minutes and gigabytes for; a tensor takes about 120 bytes, so the longest real ones, of tens of
#: thousands of tensors, have a few MB.
_MOST_BYTES = 25_000_000
#: Most axes of a tensor, as in torch's own loops; real tensors have five.
_MOST_AXES = 64
#: Longest name of a tensor, in characters; real ones have less than 200.
_LONGEST_NAME = 1000


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

    Raises:
        CheckpointError: a name could not be read back.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    starts, end = {}, 0
    for name, spec in specs.items():
        require_name(name)
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
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= min(_MOST_BYTES, size - 8):
                raise ValueError(
                    f"it has {size} bytes and a header of {length} is announced; at most "
                    f"{_MOST_BYTES} are read"
                )
            text = file.read(length)
        specs, offsets, metadata = _decode(text, size - 8 - length)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"Shard '{path.name}' is missing from '{path.parent}'. Download or copy it again."
        ) from error
    except CheckpointError as error:  # says by itself what is wrong
        raise CheckpointError(f"'{path}' cannot be used: {error}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"'{path}' is truncated or not a safetensors file: {error}. Copy it again."
        ) from error
    places = {name: 8 + length + start for name, start in offsets.items()}
    return Header(specs, places, hashlib.sha256(text).hexdigest(), size, metadata)


def require_name(name: str) -> None:
    """Require that a tensor's name is of sane length and can be printed, typed and written back.

    Raises:
        CheckpointError: it cannot.
    """
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise CheckpointError(
            f"A tensor is called '{list_some([name])}'. Names of at most {_LONGEST_NAME} printable "
            "characters are required."
        )


def _decode(
    text: bytes, data_bytes: int
) -> tuple[dict[str, TensorSpec], dict[str, int], dict[str, str]]:
    """Return tensors, their starts and metadata of a header.

    Raises `ValueError` or `CheckpointError` unless they fill the data exactly.
    """
    entries = parse_json(text)
    if not isinstance(entries, dict):
        raise ValueError(f"its header is a {type(entries).__name__}, not an object")
    metadata = _parse_metadata(entries.pop("__metadata__", None))
    specs = {name: _parse_entry(name, entry) for name, entry in entries.items()}
    starts, end = {}, 0
    for name, (_, start, stop) in sorted(specs.items(), key=lambda item: item[1][1:]):
        if start != end:
            raise ValueError(
                f"tensor '{name}' starts at byte {start}, the one before it ends at {end}"
            )
        starts[name], end = start, stop
    if end != data_bytes:
        raise ValueError(f"{end} bytes of tensors are announced, and it has {data_bytes}")
    return {name: specs[name][0] for name in starts}, starts, metadata


def _parse_metadata(entry: Any) -> dict[str, str]:
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
        raise ValueError("its '__metadata__' does not map names to text")
    return entry


def _parse_entry(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    """Return what a header says of one tensor, and where its bytes begin and end."""
    require_name(name)
    if not isinstance(entry, dict):
        raise ValueError(f"tensor '{name}' is a {type(entry).__name__}, not an object")
    if lacking := [key for key in ("dtype", "shape", "data_offsets") if key not in entry]:
        raise ValueError(f"tensor '{name}' lacks {', '.join(map(repr, lacking))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor '{name}' has the dtype {dtype!r}, which is not read")
    _require_integers(name, shape)
    _require_integers(name, offsets)
    if len(offsets) != 2 or len(shape) > _MOST_AXES:
        raise ValueError(
            f"tensor '{name}' has {len(shape)} axes and {len(offsets)} data_offsets; at most "
            f"{_MOST_AXES}, and 2, are read"
        )
    nbytes = _count_bytes(DTYPES[dtype].itemsize, shape)
    if nbytes is None or offsets[1] - offsets[0] != nbytes:
        raise ValueError(
            f"tensor '{name}', {dtype} of shape {tuple(shape)}, is "
            f"{'more' if nbytes is None else nbytes} bytes, and its range holds "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorSpec(dtype, tuple(shape)), offsets[0], offsets[1]


def _count_bytes(itemsize: int, shape: list[int]) -> int | None:
    """Return the bytes of a tensor, or `None` if they are not counted in 63 bits."""
    if 0 in shape:
        # What torch multiplies on the way to nothing must not be too much either.
        shape = [size for size in shape if size]
        return 0 if _count_bytes(itemsize, shape) is not None else None
    nbytes = itemsize
    for size in shape:
        nbytes *= size
        if nbytes >= 2**63:
            return None
    return nbytes


def _require_integers(name: str, values: Any) -> None:
    if (
        not isinstance(values, list)
        or not {*map(type, values)} <= {int}
        or (values and not 0 <= min(values) <= max(values) < 2**63)
    ):
        raise ValueError(
            f"tensor '{name}' has {repr(values)[:200]} where whole numbers from 0 are required"
        )
