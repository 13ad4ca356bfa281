"""A GGUF file, version 3: header, fields, places of the tensors, and the tensors.

Everything is little-endian. Sizes are known before the numbers are, so tensors can be written in
any order, one at a time.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from loraq import disk
from loraq.errors import ExportError
from loraq.safetensors.layout import tensor_bytes

#: Tensors begin at multiples of it; the default of the format.
_ALIGNMENT = 32
_VERSION = 3
_UINT32, _STRING = 4, 8
#: ggml's numbers of plain types by safetensors' names.
PLAIN_TYPES = {"F32": 0, "F16": 1, "BF16": 30, "I8": 24, "I16": 25, "I32": 26, "I64": 27, "F64": 28}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file."""

    #: ggml's number of its type.
    kind: int
    #: In torch's order; the file has it the other way round.
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class GgufLayout:
    """Where every byte of a file will stand."""

    file: str
    header: bytes
    offsets: dict[str, int]
    specs: dict[str, GgufTensor]
    nbytes: int

    @classmethod
    def of(
        cls, tensors: Mapping[str, GgufTensor], file: str, fields: Mapping[str, str | int]
    ) -> "GgufLayout":
        """Lay tensors out behind fields of text and of numbers of 32 bits."""
        head = struct.pack("<4sIQQ", b"GGUF", _VERSION, len(tensors), len(fields))
        head += b"".join(_encode_field(name, value) for name, value in fields.items())
        places, end = {}, 0
        for name, spec in tensors.items():
            places[name] = end
            dims = spec.shape[::-1]
            head += _encode_text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
            head += struct.pack("<IQ", spec.kind, end)
            end += -(-spec.nbytes // _ALIGNMENT) * _ALIGNMENT
        head += b"\0" * (-len(head) % _ALIGNMENT)
        offsets = {name: len(head) + place for name, place in places.items()}
        return cls(file, head, offsets, dict(tensors), len(head) + end)

    @property
    def files(self) -> list[str]:
        """The one file."""
        return [self.file]

    def allocate(self, folder: Path) -> None:
        """Make the file at its final size."""
        descriptor = disk.open_file(folder / self.file, create=True)
        try:
            os.ftruncate(descriptor, self.nbytes)
            disk.write_at(descriptor, self.header, 0)
        finally:
            os.close(descriptor)

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors at their places.

        Raises:
            ExportError: one has not the bytes that were laid out.
            OSError: the disk refuses.
        """
        descriptor = disk.open_file(folder / self.file)
        try:
            for name, tensor in tensors.items():
                raw = tensor_bytes(tensor)
                if len(raw) != self.specs[name].nbytes:
                    raise ExportError(
                        f"Tensor '{name}' has {len(raw)} bytes, and the room for it is "
                        f"{self.specs[name].nbytes}. Please report this."
                    )
                disk.write_at(descriptor, raw, self.offsets[name])
        finally:
            os.close(descriptor)


def _encode_field(name: str, value: str | int) -> bytes:
    if isinstance(value, int):
        return _encode_text(name) + struct.pack("<II", _UINT32, value)
    return _encode_text(name) + struct.pack("<I", _STRING) + _encode_text(value)


def _encode_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
