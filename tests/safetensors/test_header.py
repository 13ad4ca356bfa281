"""Headers of safetensors files: every absurd one is refused before a number is read."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraq.errors import CheckpointError
from loraq.safetensors.header import TensorSpec, encode_header, read_header
from tests.patience import at_once

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


# --- headers that ask for work --------------------------------------------------------------------

HUGE = 2**63 - 1
MANY = {f"layers.{i}.weight": TensorSpec("U8", (1, 1)) for i in range(30_000)}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": {**ENTRY, "shape": [HUGE] * 400_000}}, "has 400000 axes .* at most 64"),
        ({"a": {**ENTRY, "shape": [HUGE] * 700_000}}, "items, and at most 500000 are read"),
        ({"a": {**ENTRY, "shape": [HUGE] * 64}}, "is more bytes, and its range holds 8"),
        ({"a": {**ENTRY, "shape": [HUGE] * 63 + [0]}}, "is more bytes"),
        ({"a": {**ENTRY, "shape": [HUGE, HUGE, 0], "data_offsets": [0, 0]}}, "is more bytes"),
        ({"a": {**ENTRY, "shape": [2**64]}}, "a number of 65 bits"),
        ({f"x{i}": i for i in range(200_000)}, "'x0' is a int, not an object"),
        ({"a" * 10**7: ENTRY}, "Names of at most 1000 printable"),
        (
            {"__metadata__": {"a": "x" * 24_000_000}, "a": {**ENTRY, "shape": [3]}},
            "its range holds",
        ),
        (b"[" * 20_000_000, "items"),
        (b'{"a":' * 400_000, "nested"),
        (b'{"a": "' + b"\\u0000" * 4_000_000, "Invalid"),
        (b"{" + b'"a":{},' * 240_000 + b'"b":{}}', "'a' twice"),
        (b'{"' + b'":1,"'.join(b"%d" % i for i in range(400_000)) + b'":1}', "'0' is a int"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_header_that_asks_for_work_is_refused_within_a_second(tmp_path, header, match):
    path = file(tmp_path, header)
    with at_once(), pytest.raises(CheckpointError, match=match) as raised:
        read_header(path)
    assert len(str(raised.value).encode()) <= 4096


def test_tens_of_thousands_of_tensors_are_read_in_a_second(tmp_path):
    first, _ = encode_header(MANY)
    (tmp_path / "a.safetensors").write_bytes(first + bytes(30_000))
    with at_once():
        assert read_header(tmp_path / "a.safetensors").specs == MANY


@pytest.mark.parametrize(
    "name", ["a\x1b[31m", "a\nb", "\u202ea", "a\0", "\x7f", "x" * 1001], ids=ascii
)
def test_names_that_cannot_be_shown_are_neither_read_nor_written(tmp_path, name):
    with pytest.raises(
        CheckpointError, match=r"cannot be used: .*at most 1000 printable"
    ) as raised:
        read_header(file(tmp_path, {name: ENTRY}))
    assert str(raised.value).isprintable()
    with pytest.raises(CheckpointError, match="Names of at most 1000 printable"):
        encode_header({name: TensorSpec("U8", ())})


@pytest.mark.parametrize("metadata", [[], "x", {"a": 1}, {"a": None}, {"a": {}}, 0, False])
def test_metadata_that_is_no_text(tmp_path, metadata):
    with pytest.raises(CheckpointError, match="'__metadata__' does not map names to text"):
        read_header(file(tmp_path, {"__metadata__": metadata, "a": ENTRY}))


@pytest.mark.parametrize("dtype", [None, 1, ["F32"], {"F32": 1}])
def test_a_dtype_that_is_no_text(tmp_path, dtype):
    with pytest.raises(CheckpointError, match="which is not read"):
        read_header(file(tmp_path, {"a": {**ENTRY, "dtype": dtype}}))
