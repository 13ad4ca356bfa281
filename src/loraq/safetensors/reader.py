"""Read tensors from a folder of safetensors shards, one at a time, trusting nothing in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loraq.errors import CheckpointError, list_some
from loraq.regular_file import open_regular
from loraq.safetensors.header import DTYPES, Header, TensorSpec, read_header
from loraq.safetensors.selection import read_weight_map, select_weights


class TensorReader(Protocol):
    """Tensors by name, read one at a time; `ShardReader` is one.

    It can be sent to another process.
    """

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        ...

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor in safetensors' notation."""
        ...

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU; raises `CheckpointError` if it cannot be read."""
        ...

    def read_slice(self, name: str, index: int) -> Tensor:
        """Return one entry of a tensor's first axis; raises `CheckpointError` as `read`."""
        ...


class ShardReader:
    """The tensors of a folder or of one file, by name; a tensor is read when it is asked for.

    Reading copies the bytes and does not map the file: a file that shrinks meanwhile is an error
    with a message, not the end of the process. A reader holds no open file, so it can be sent to
    another process.
    """

    def __init__(
        self, folder: Path, variant: str | None = None, *, files: Sequence[str] | None = None
    ) -> None:
        """Find the shards and read their headers.

        Args:
            folder: with weights as `select_weights` chooses them; or a safetensors file.
            variant: which of several copies, as `select_weights`.
            files: the files of the folder, for a caller who knows them: nothing is chosen.

        Raises:
            CheckpointError: no weights, a missing or truncated shard, an absurd header, a tensor in
                two shards, or an index that contradicts the shards.
        """
        self.folder = folder
        #: What a user should know of the choice of files; empty if there was none.
        self.note = ""
        if folder.is_file():
            self.folder = folder.parent
            self._open([folder.name])
            return
        if files is not None:
            self._open(files)
            return
        weights = select_weights(folder, variant)
        self.note = weights.note
        self._open(weights.files)
        if weights.index:
            self._check_index(read_weight_map(weights.index), weights.index)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._shards[self._home[name]].specs[name].shape

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor in safetensors' notation, such as "BF16" or "U8"."""
        return self._shards[self._home[name]].specs[name].dtype

    @property
    def files(self) -> dict[str, Header]:
        """Header of each file, by its name."""
        return self._shards

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self.folder / self._home[name]

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU.

        Raises:
            CheckpointError: there is no tensor of this name, or it cannot be read.
        """
        return self._read(name, None)

    def read_slice(self, name: str, index: int) -> Tensor:
        """Return one entry of a tensor's first axis, of which alone the bytes are read.

        Raises:
            CheckpointError: as `read`.
        """
        return self._read(name, index)

    def _read(self, name: str, index: int | None) -> Tensor:
        if name not in self._home:
            raise CheckpointError(f"'{self.folder}' has no tensor '{name}'.")
        header, path = self._shards[self._home[name]], self.file_of(name)
        spec, offset = header.specs[name], header.offsets[name]
        if index is not None:
            spec = TensorSpec(spec.dtype, spec.shape[1:])
            offset += index * spec.nbytes
        raw = torch.empty(spec.nbytes, dtype=torch.uint8, device="cpu")
        try:
            with open_regular(path) as file:
                if file.seek(0, 2) != header.file_bytes:
                    raise OSError(f"it had {header.file_bytes} bytes and has {file.tell()} now")
                file.seek(offset)
                left = memoryview(raw.numpy().data)
                while left:
                    if not (n := file.readinto(left)):
                        raise OSError("it ends in the middle of the tensor")
                    left = left[n:]
        except OSError as error:
            raise CheckpointError(
                f"Cannot read '{name}' from '{path}': {error}. Put the file back as it was, and "
                "try again."
            ) from error
        return raw.view(DTYPES[spec.dtype]).reshape(spec.shape)

    def _open(self, files: Sequence[str]) -> None:
        self._shards = {file: read_header(self.folder / file) for file in files}
        self._home: dict[str, str] = {}
        for file, header in self._shards.items():
            if twice := sorted(self._home.keys() & header.specs.keys()):
                raise CheckpointError(
                    f"'{self.folder}' has {len(twice)} tensors in two shards: {list_some(twice)}. "
                    "Download it again."
                )
            self._home |= dict.fromkeys(header.specs, file)

    def _check_index(self, weight_map: dict[str, str], index: Path) -> None:
        wrong = sorted(name for name, file in weight_map.items() if self._home.get(name) != file)
        wrong += sorted(set(self._home) - set(weight_map))
        if wrong:
            raise CheckpointError(
                f"'{index.name}' contradicts the shards in '{self.folder}' on {len(wrong)} "
                f"tensors: {list_some(wrong)}. Download the folder again."
            )
