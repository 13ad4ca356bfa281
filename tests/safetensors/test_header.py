"""Headers of safetensors files: every absurd one is refused before a number is read."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraq.errors import CheckpointError
from loraq.safetensors.header import TensorSpec, encode_header, read_header

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file(folder: Path, header: bytes | dict, n_data: int = 8, length: int | None = None) -> Path:
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    path = folder / "model.safetensors"
    path.write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + bytes(n_data)
    )
    return path


def test_a_file_of_the_safetensors_library_is_understood(tmp_path):
    tensors = {
        "b": torch.ones(3, 5, dtype=torch.bfloat16),
        "empty": torch.ones(0, 4),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "größe": torch.ones(7, dtype=torch.uint8),
        "flag": torch.tensor([True]),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    assert {name: spec.shape for name, spec in header.specs.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert header.specs["b"].dtype == "BF16"
    assert header.file_bytes == (tmp_path / "a.safetensors").stat().st_size


def test_what_is_written_is_read_back_and_aligned(tmp_path):
    specs = {
        "a": TensorSpec("F32", (3,)),
        "none": TensorSpec("F32", (0, 2)),
        "b": TensorSpec("U8", ()),
    }
    first, places = encode_header(specs)
    (tmp_path / "a.safetensors").write_bytes(first + bytes(13))
    header = read_header(tmp_path / "a.safetensors")
    assert header.specs == specs
    assert (
        header.offsets == places == {"a": len(first), "none": len(first) + 12, "b": len(first) + 12}
    )
    assert len(first) % 8 == 0


@pytest.mark.parametrize(
    ("header", "n_data", "length", "match"),
    [
        (b"", 0, None, "a header of 0 is announced"),
        ({"a": ENTRY}, 8, 10**6, "a header of 1000000 is announced"),
        ({"a": ENTRY}, 8, 2**63, "a header of 9223372036854775808 is announced"),
        (b"{ ", 8, None, "Expecting"),
        (b"[1]", 8, None, "is a list, not an object"),
        (b"\xff\xfe{}", 8, None, "codec can't decode"),
        (b"[" * 100_000, 8, None, "nested in more than 32 levels"),
        (b'{"a": 1, "a": 2}', 8, None, "has the key 'a' twice"),
        ({"a": 3}, 8, None, "'a' is a int, not an object"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, None, "lacks 'data_offsets'"),
        ({"a": {**ENTRY, "dtype": "F99"}}, 8, None, "has the dtype 'F99', which is not read"),
        ({"a": {**ENTRY, "shape": [3]}}, 8, None, "is 12 bytes, and its range holds 8"),
        ({"a": {**ENTRY, "shape": [-2]}}, 8, None, "where whole numbers from 0 are required"),
        ({"a": {**ENTRY, "shape": [2.0]}}, 8, None, "where whole numbers from 0 are required"),
        ({"a": {**ENTRY, "shape": [2**62, 2**62]}}, 8, None, "and its range holds 8"),
        (
            {"a": {**ENTRY, "data_offsets": [8, 16]}},
            16,
            None,
            "starts at byte 8, the one before it ends at 0",
        ),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, 8, None, "its range holds -8"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, 8, None, "1 data_offsets"),
        ({"a": ENTRY, "b": ENTRY}, 8, None, "'b' starts at byte 0, the one before it ends at 8"),
        ({"a": ENTRY}, 7, None, "8 bytes of tensors are announced, and it has 7"),
        ({"a": ENTRY}, 9, None, "8 bytes of tensors are announced, and it has 9"),
    ],
)
def test_an_absurd_header(tmp_path, header, n_data, length, match):
    path = file(tmp_path, header, n_data, length)
    with pytest.raises(
        CheckpointError,
        match=rf"model\.safetensors' is truncated or not a safetensors file: .*({match})",
    ):
        read_header(path)


def test_a_header_of_more_than_25_mb_is_not_read(tmp_path):
    path = file(tmp_path, {"a": ENTRY}, length=25_000_001)
    with path.open("r+b") as sparse:
        sparse.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="a header of 25000001 is announced"):
        read_header(path)
