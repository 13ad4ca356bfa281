"""Read tensors from a folder of safetensors shards, one at a time, trusting nothing in it."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loraq.errors import CheckpointError, list_some
from loraq.json_files import read_json
from loraq.regular_file import is_plain_name, open_regular
from loraq.safetensors.header import DTYPES, Header, read_header


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


class ShardReader:
    """The tensors of a folder or of one file, by name; a tensor is read when it is asked for.

    Reading copies the bytes and does not map the file: a file that shrinks meanwhile is an error
    with a message, not the end of the process. A reader holds no open file, so it can be sent to
    another process.
    """

    def __init__(self, folder: Path) -> None:
        """Find the shards and read their headers.

        Args:
            folder: with one safetensors file, or with shards and their index; or a safetensors
                file.

        Raises:
            CheckpointError: no weights, a missing or truncated shard, an absurd header, a tensor in
                two shards, or an index that contradicts the shards.
        """
        self.folder = folder
        if folder.is_file():
            self.folder = folder.parent
            self._open([folder.name])
            return
        if not folder.is_dir():
            raise CheckpointError(
                f"'{folder}' is not a folder. A folder with safetensors files is required."
            )
        indexes = sorted(folder.glob("*.safetensors.index.json"))
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if len(indexes) > 1:
            raise CheckpointError(
                f"'{folder}' has {len(indexes)} index files: "
                f"{list_some([index.name for index in indexes])}. Keep one."
            )
        if indexes:
            files = sorted(set(_read_weight_map(indexes[0]).values()))
        if not files:
            raise CheckpointError(
                f"'{folder}' has no .safetensors file. Other weight files are not read."
            )
        if len(files) > 1 and not indexes:
            raise CheckpointError(
                f"'{folder}' has {len(files)} weight files and no index: {list_some(files)}. "
                "Keep one variant, or add the missing '.safetensors.index.json'."
            )
        self._open(files)
        if indexes:
            self._check_index(_read_weight_map(indexes[0]), indexes[0])

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
        if name not in self._home:
            raise CheckpointError(f"'{self.folder}' has no tensor '{name}'.")
        header, path = self._shards[self._home[name]], self.file_of(name)
        spec = header.specs[name]
        raw = torch.empty(spec.nbytes, dtype=torch.uint8, device="cpu")
        try:
            with open_regular(path) as file:
                if file.seek(0, 2) != header.file_bytes:
                    raise OSError(f"it had {header.file_bytes} bytes and has {file.tell()} now")
                file.seek(header.offsets[name])
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

    def _open(self, files: list[str]) -> None:
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


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise CheckpointError(
            f"'{index}' has no usable 'weight_map'. It must map tensor names to file names."
        )
    for file in weight_map.values():
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"'{index}' names the file '{file}'. Only .safetensors files beside the index are "
                "read."
            )
    return weight_map
