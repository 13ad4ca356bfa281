"""Layouts of shards: safetensors itself reads them, and the order of writing changes no byte."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraq.errors import CheckpointError
from loraq.safetensors.header import TensorSpec, read_header
from loraq.safetensors.layout import ShardLayout, spec_of, write_shards
from loraq.safetensors.reader import ShardReader

DTYPES = (
    torch.uint8,
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.bool,
)


@pytest.fixture
def tensors(rng) -> dict[str, torch.Tensor]:
    shapes = ((3, 5), (), (0,), (7,), (2, 0, 3), (1, 1, 1, 1), (33,), (4, 4), (129,))
    made = {}
    for i, shape in enumerate(shapes * 3):
        made[f"layer.{i}.ü"] = torch.randint(0, 2, shape, generator=rng).to(DTYPES[i % len(DTYPES)])
    return made


@pytest.mark.parametrize("shard_bytes", [2_000_000_000, 200, 1])
def test_safetensors_reads_what_is_written(tensors, tmp_path, shard_bytes):
    files = write_shards(tensors, tmp_path, "model", shard_bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_our_reader_reads_it_too(tensors, tmp_path):
    write_shards(tensors, tmp_path, "model", 200)
    reader = ShardReader(tmp_path)
    assert set(reader.names) == set(tensors)
    for name, tensor in tensors.items():
        assert reader.read(name).dtype == tensor.dtype
        assert torch.equal(reader.read(name), tensor)


def test_every_tensor_is_aligned(tensors, tmp_path):
    write_shards(tensors, tmp_path, "model")
    header = read_header(tmp_path / "model.safetensors")
    assert all(place % header.specs[name].itemsize == 0 for name, place in header.offsets.items())


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_writing_does_not_change_a_byte(tensors, tmp_path, seed):
    layout = ShardLayout.of(
        {name: spec_of(name, tensor) for name, tensor in tensors.items()}, "model", 200
    )
    names = list(tensors)
    random.Random(seed).shuffle(names)
    for folder, order in (("a", list(tensors)), ("b", names)):
        (tmp_path / folder).mkdir()
        layout.allocate(tmp_path / folder)
        for name in order:
            layout.write(tmp_path / folder, {name: tensors[name]}, sync=True)
    for file in layout.files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_allocating_again_keeps_what_was_written(tensors, tmp_path):
    layout = ShardLayout.of(
        {name: spec_of(name, tensor) for name, tensor in tensors.items()}, "model"
    )
    layout.allocate(tmp_path)
    assert (
        (tmp_path / "model.safetensors").stat().st_size
        == layout.nbytes
        == layout.sizes["model.safetensors"]
    )
    layout.write(tmp_path, tensors)
    layout.allocate(tmp_path)
    assert torch.equal(ShardReader(tmp_path).read("layer.0.ü"), tensors["layer.0.ü"])


def test_the_index_is_that_of_the_hugging_face_libraries(tensors, tmp_path):
    files = write_shards(tensors, tmp_path, "model", 200)
    assert next(iter(files)) == f"model-00001-of-{len(files) - 1:05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert list(index["weight_map"]) == list(tensors)


def test_shards_are_filled_in_order_and_not_over_the_limit():
    layout = ShardLayout.of(
        {name: TensorSpec("U8", (n,)) for name, n in zip("abcd", (6, 5, 5, 30), strict=True)},
        "m",
        10,
    )
    assert [place[0][5:6] for place in layout.locations.values()] == ["0"] * 4
    assert [layout.locations[name][0] for name in "abcd"] == [
        f"m-0000{i}-of-00003.safetensors" for i in (1, 2, 2, 3)
    ]


def test_a_tensor_that_does_not_fit_its_place_is_refused(tmp_path):
    layout = ShardLayout.of({"a": TensorSpec("F32", (2,))}, "model")
    layout.allocate(tmp_path)
    for wrong in (torch.zeros(3), torch.zeros(2, dtype=torch.float16)):
        with pytest.raises(CheckpointError, match=r"Tensor 'a' is .*, and the room for it is"):
            layout.write(tmp_path, {"a": wrong})
    with pytest.raises(CheckpointError, match="meta device: they hold no numbers"):
        layout.write(tmp_path, {"a": torch.zeros(2, device="meta")})
    with pytest.raises(CheckpointError, match="safetensors files cannot hold"):
        write_shards({"a": torch.zeros(2, dtype=torch.complex128)}, tmp_path, "model")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tensors, tmp_path):
    write_shards(tensors, tmp_path, "model")
    reader = ShardReader(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"Cannot read 'layer\.0\.ü' from .*it had \d+ bytes and has \d+ now"
    ):
        reader.read("layer.0.ü")
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        reader.read("layer.0.ü")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for file in ("a", "b"):
        write_shards({"x": torch.zeros(2)}, tmp_path, file)
    (tmp_path / "a.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="1 tensors in two shards: x"):
        ShardReader(tmp_path)


# --- what was written -----------------------------------------------------------------------------


def written(tensors, folder: Path, shard_bytes: int) -> ShardLayout:
    specs = {name: spec_of(name, tensor) for name, tensor in tensors.items()}
    layout = ShardLayout.of(specs, "model", shard_bytes)
    layout.allocate(folder)
    layout.write(folder, tensors)
    return layout


@pytest.mark.parametrize("shard_bytes", [2_000_000_000, 200, 1])
def test_one_pass_gives_the_hashes_of_files_and_tensors(
    tensors, tmp_path, monkeypatch, shard_bytes
):
    monkeypatch.setattr("loraq.safetensors.layout._BLOCK", 7)
    layout = written(tensors, tmp_path, shard_bytes)
    files, found = layout.hash_files(tmp_path)
    assert list(files) == layout.files
    assert files == layout.hash_content(tensors)
    for name, digest in files.items():
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert found.keys() == tensors.keys()
    for name, digest in found.items():
        raw = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert digest == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("damage", ["header", "longer", "shorter", "empty"])
def test_a_file_that_is_not_what_was_laid_out_is_refused(tensors, tmp_path, damage):
    layout = written(tensors, tmp_path, 2_000_000_000)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    place = content.index(b"layer")
    path.write_bytes(
        {
            "header": content[:place] + b"m" + content[place + 1 :],
            "longer": content + b"x",
            "shorter": content[:-1],
            "empty": b"",
        }[damage]
    )
    with pytest.raises(CheckpointError, match="is not what was written to it"):
        layout.hash_files(tmp_path)
