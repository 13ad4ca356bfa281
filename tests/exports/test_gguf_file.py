"""A GGUF file: fields, places and numbers, read by a parser of its own."""

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from loraq.errors import ExportError
from loraq.exports.gguf_file import GgufLayout, GgufTensor


def read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]]]:
    """Return fields, and dims, type and place of each tensor."""
    raw, at = path.read_bytes(), 0

    def take(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return values if len(values) > 1 else values[0]

    def text() -> str:
        return take(f"{take('Q')}s").decode()

    assert take("4s") == b"GGUF"
    version, n_tensors, n_fields = take("IQQ")
    assert version == 3
    fields = {}
    for _ in range(n_fields):
        name, kind = text(), take("I")
        fields[name] = take("I") if kind == 4 else text()
    tensors = {}
    for _ in range(n_tensors):
        name, n_dims = text(), take("I")
        dims = tuple(take("Q") for _ in range(n_dims))
        tensors[name] = (dims, *take("IQ"))
    start = -(-at // 32) * 32
    return fields, {name: (d, kind, start + place) for name, (d, kind, place) in tensors.items()}


def test_what_is_written_is_read(tmp_path):
    tensors = {
        "a.weight": GgufTensor(2, (2, 32), 36),
        "a.bias": GgufTensor(0, (5,), 20),
        "conv": GgufTensor(0, (2, 3, 1, 1), 24),
    }
    fields = {"general.architecture": "flux", "general.file_type": 2}
    layout = GgufLayout.of(tensors, "model.gguf", fields)
    layout.allocate(tmp_path)
    values = {
        "conv": torch.arange(6.0).view(2, 3, 1, 1),
        "a.weight": torch.arange(36, dtype=torch.uint8),
        "a.bias": torch.arange(5.0),
    }
    for name, tensor in values.items():
        layout.write(tmp_path, {name: tensor})
    found, places = read(tmp_path / "model.gguf")
    assert found == fields
    assert {name: place[:2] for name, place in places.items()} == {
        "a.weight": ((32, 2), 2),
        "a.bias": ((5,), 0),
        "conv": ((1, 1, 3, 2), 0),
    }
    raw = (tmp_path / "model.gguf").read_bytes()
    assert len(raw) == layout.nbytes
    for name, (_, _, place) in places.items():
        assert place % 32 == 0
        assert raw[place:].startswith(values[name].numpy().tobytes())


def test_a_tensor_that_does_not_fit_is_refused(tmp_path):
    layout = GgufLayout.of({"a": GgufTensor(0, (4,), 16)}, "model.gguf", {})
    layout.allocate(tmp_path)
    with pytest.raises(ExportError, match="'a' has 12 bytes, and the room for it is 16"):
        layout.write(tmp_path, {"a": torch.zeros(3)})
