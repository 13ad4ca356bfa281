"""Where every byte of a set of shards will stand, known before the first one is written.

Scheme and shape fix the size of every stored tensor, so files can be made at their final size, and
tensors written into them in any order and by any process: the same bytes come out.
"""

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from loraq import disk
from loraq.errors import CheckpointError
from loraq.json_files import encode_json
from loraq.safetensors.header import DTYPE_NAMES, TensorSpec, encode_header

#: Bytes of one shard unless the caller says otherwise.
DEFAULT_SHARD_BYTES = 2_000_000_000
#: Bytes that are read at a time.
_BLOCK = 4 * 2**20


@dataclass(frozen=True)
class ShardLayout:
    """Tensors by file, and where each tensor stands in it."""

    specs: dict[str, TensorSpec]
    #: First bytes (the header) of each file by its name, in the order of the shards.
    headers: dict[str, bytes]
    #: Final size of each file.
    sizes: dict[str, int]
    #: File of each tensor, and the offset of its first byte there.
    locations: dict[str, tuple[str, int]]
    #: Name of the index, or `None` for a single file.
    index: str | None

    @classmethod
    def of(
        cls,
        specs: Mapping[str, TensorSpec],
        stem: str,
        shard_bytes: float = DEFAULT_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
    ) -> "ShardLayout":
        """Lay tensors out as `<stem>.safetensors`, or as numbered shards with an index.

        The layout is that of the Hugging Face libraries. A tensor larger than a shard gets one of
        its own. Within a file wide dtypes stand first, which aligns every tensor; otherwise the
        order is kept. A variant of a model is a part of the stem, such as "model.fp16". The
        metadata go into the header of every file.
        """
        shards: list[dict[str, TensorSpec]] = [{}]
        filled = 0
        for name, spec in specs.items():
            if shards[-1] and filled + spec.nbytes > shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = spec
            filled += spec.nbytes
        n = len(shards)
        files = (
            [f"{stem}.safetensors"]
            if n == 1
            else [f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        )
        base, dot, variant = stem.partition(".")  # as the libraries call an index
        headers, sizes = {}, {}
        locations: dict[str, tuple[str, int]] = {}
        for file, shard in zip(files, shards, strict=True):
            ordered = dict(sorted(shard.items(), key=lambda item: -item[1].itemsize))
            headers[file], offsets = encode_header(ordered, metadata)
            sizes[file] = len(headers[file]) + sum(spec.nbytes for spec in shard.values())
            locations |= {name: (file, offset) for name, offset in offsets.items()}
        return cls(
            dict(specs),
            headers,
            sizes,
            locations,
            None if n == 1 else f"{base}.safetensors.index{dot}{variant}.json",
        )

    @property
    def files(self) -> list[str]:
        """Names of all files, the index last."""
        return [*self.sizes, *([self.index] if self.index else [])]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.sizes.values())

    @property
    def sha256(self) -> str:
        """Hash of everything that is known before the numbers are."""
        digest = hashlib.sha256()
        for file, header in self.headers.items():
            digest.update(file.encode() + b"\0" + header)
        return digest.hexdigest()

    @property
    def _index_json(self) -> bytes:
        weight_map = {name: self.locations[name][0] for name in self.specs}
        total = sum(spec.nbytes for spec in self.specs.values())
        return encode_json({"metadata": {"total_size": total}, "weight_map": weight_map})

    def allocate(self, folder: Path) -> None:
        """Make the files of a folder at their final size; what already stands in them is kept."""
        for file, header in self.headers.items():
            descriptor = disk.open_file(folder / file, create=True)
            try:
                size = min(os.fstat(descriptor).st_size, self.sizes[file])
                os.ftruncate(descriptor, size)
                _reserve(descriptor, self.sizes[file])
                disk.write_at(descriptor, header, 0)
            finally:
                os.close(descriptor)
        if self.index:
            disk.write_file(folder / self.index, self._index_json)
        disk.sync_folder(folder)

    def write(self, folder: Path, tensors: Mapping[str, Tensor], *, sync: bool = False) -> None:
        """Write tensors at their places.

        Args:
            folder: where `allocate` made the files.
            tensors: some of the layout's tensors.
            sync: whether to return only when they are on the disk.

        Raises:
            CheckpointError: a tensor is not what the layout says, or has no numbers.
            OSError: the disk refuses.
        """
        by_file: dict[str, list[str]] = {}
        for name in tensors:
            by_file.setdefault(self.locations[name][0], []).append(name)
        for file, names in by_file.items():
            descriptor = disk.open_file(folder / file, direct=sync)
            try:
                for name in names:
                    self._require(name, tensors[name])
                    disk.write_at(descriptor, tensor_bytes(tensors[name]), self.locations[name][1])
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def hash_files(self, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
        """Read every file once, and return its SHA-256, and that of each tensor's bytes in it.

        Raises:
            CheckpointError: a file has not the header and the size that were laid out.
        """
        files, tensors = {}, {}
        for file, header in self.headers.items():
            whole = hashlib.sha256()
            with (folder / file).open("rb", buffering=0) as shard:
                blocks = _read_blocks(shard, len(header))
                complete = b"".join(blocks) == header
                whole.update(header)
                for name in self._names_in(file):
                    digest, nbytes = hashlib.sha256(), 0
                    for block in _read_blocks(shard, self.specs[name].nbytes):
                        whole.update(block)
                        digest.update(block)
                        nbytes += len(block)
                    complete &= nbytes == self.specs[name].nbytes
                    tensors[name] = digest.hexdigest()
                complete &= not shard.read(1)
            if not complete:
                raise CheckpointError(
                    f"'{folder / file}' is not what was written to it: something else has changed "
                    "it. Run the same command again."
                )
            files[file] = whole.hexdigest()
        return files | self._hash_index(), tensors

    def hash_content(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the SHA-256 that every file has when all tensors are written to it."""
        files = {}
        for file, header in self.headers.items():
            whole = hashlib.sha256(header)
            for name in self._names_in(file):
                whole.update(tensor_bytes(tensors[name]))
            files[file] = whole.hexdigest()
        return files | self._hash_index()

    def _names_in(self, file: str) -> list[str]:
        """Return the tensors of a file, in the order in which they stand there."""
        places = {name: offset for name, (home, offset) in self.locations.items() if home == file}
        # A tensor without numbers stands where the next one begins.
        return sorted(places, key=lambda name: (places[name], self.specs[name].nbytes))

    def _hash_index(self) -> dict[str, str]:
        return {self.index: hashlib.sha256(self._index_json).hexdigest()} if self.index else {}

    def _require(self, name: str, tensor: Tensor) -> None:
        if tensor.is_meta:
            raise CheckpointError(
                "Cannot write tensors of the meta device: they hold no numbers. Load the model "
                "first."
            )
        if spec_of(name, tensor) != self.specs[name]:
            raise CheckpointError(
                f"Tensor '{name}' is {tensor.dtype} of shape {tuple(tensor.shape)}, and the room "
                f"for it is {self.specs[name]}."
            )


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """Return dtype and shape of a tensor.

    Raises:
        CheckpointError: safetensors has no such dtype.
    """
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"Tensor '{name}' is {tensor.dtype}, which safetensors files cannot hold. Cast it "
            "first."
        )
    return TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def write_shards(
    tensors: Mapping[str, Tensor], folder: Path, stem: str, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> dict[str, str]:
    """Write tensors as `<stem>.safetensors`, or as numbered shards with an index.

    Returns the SHA-256 of each file by its name.
    """
    layout = ShardLayout.of(
        {name: spec_of(name, tensor) for name, tensor in tensors.items()}, stem, shard_bytes
    )
    layout.allocate(folder)
    layout.write(folder, tensors)
    return layout.hash_content(tensors)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(raw.numpy().data)


def _read_blocks(file: IO[bytes], nbytes: int) -> Iterator[bytes]:
    """Yield the next bytes of a file in pieces; fewer if it ends before."""
    while nbytes and (block := file.read(min(nbytes, _BLOCK))):
        nbytes -= len(block)
        yield block


def _reserve(descriptor: int, size: int) -> None:
    """Take the space on the disk now, so that it is not missing after hours of work."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:  # macOS has none, and some file systems refuse
        if getattr(error, "errno", None) not in (None, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)
