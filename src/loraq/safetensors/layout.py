"""Where every byte of a set of shards will stand, known before the first one is written.

Scheme and shape fix the size of every stored tensor, so files can be made at their final size, and
tensors written into them in any order and by any process: the same bytes come out.
"""

import errno
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraq import disk
from loraq.errors import CheckpointError
from loraq.json_files import write_json
from loraq.safetensors.header import DTYPE_NAMES, TensorSpec, encode_header

#: Bytes of one shard unless the caller says otherwise.
DEFAULT_SHARD_BYTES = 2_000_000_000


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
        order is kept. The metadata go into the header of every file.
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
            None if n == 1 else f"{stem}.safetensors.index.json",
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
            weight_map = {name: self.locations[name][0] for name in self.specs}
            total = sum(spec.nbytes for spec in self.specs.values())
            write_json(
                folder / self.index, {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
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
            descriptor = disk.open_file(folder / file)
            try:
                for name in names:
                    self._require(name, tensors[name])
                    disk.write_at(descriptor, tensor_bytes(tensors[name]), self.locations[name][1])
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

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
) -> list[str]:
    """Write tensors as `<stem>.safetensors`, or as numbered shards with an index.

    Returns the file names.
    """
    layout = ShardLayout.of(
        {name: spec_of(name, tensor) for name, tensor in tensors.items()}, stem, shard_bytes
    )
    layout.allocate(folder)
    layout.write(folder, tensors)
    return layout.files


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(raw.numpy().data)


def _reserve(descriptor: int, size: int) -> None:
    """Take the space on the disk now, so that it is not missing after hours of work."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:  # macOS has none, and some file systems refuse
        if getattr(error, "errno", None) not in (None, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)
