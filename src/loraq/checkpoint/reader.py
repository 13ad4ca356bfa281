"""Read tensors from a folder of safetensors shards, one at a time, trusting nothing in it."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraq.errors import CheckpointError

#: Bytes. In a mapped file a tensor starts anywhere, and the sums of BLAS depend on where: a tensor must stand as torch
#: itself would place it, or a model would not compute the same bits after a round trip.
ALIGNMENT = 64


class ShardReader:
    """The tensors of a folder, by name; files are mapped, and a tensor is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Find the shards and read their headers.

        Raises:
            CheckpointError: no weights, a missing or truncated shard, or an index that contradicts the shards.
        """
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"'{folder}' is not a folder. A folder with safetensors files is required.")
        indexes = sorted(folder.glob("*.safetensors.index.json"))
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if len(indexes) > 1:
            raise CheckpointError(
                f"'{folder}' has {len(indexes)} index files: {', '.join(p.name for p in indexes)}. Keep one."
            )
        if indexes:
            files = sorted(set(_weight_map(indexes[0]).values()))
        if not files:
            raise CheckpointError(f"'{folder}' has no .safetensors file. Other weight files are not read.")
        if len(files) > 1 and not indexes:
            raise CheckpointError(
                f"'{folder}' has {len(files)} weight files and no index: {', '.join(files[:4])}. Keep one variant, or "
                "add the missing '.safetensors.index.json'."
            )
        self._shards = {file: _open(folder / file) for file in files}
        self._home = {name: file for file, shard in self._shards.items() for name in shard.keys()}
        if indexes:
            self._check_index(_weight_map(indexes[0]), indexes[0])

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._shards[self._home[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor in safetensors' notation, such as "BF16" or "U8"."""
        return str(self._shards[self._home[name]].get_slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU.

        Raises:
            CheckpointError: there is none of this name, or it cannot be read.
        """
        if name not in self._home:
            raise CheckpointError(f"'{self.folder}' has no tensor '{name}'.")
        try:
            tensor: Tensor = self._shards[self._home[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"Cannot read '{name}' from '{self.folder / self._home[name]}': {error}") from error
        return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()

    def _check_index(self, weight_map: dict[str, str], index: Path) -> None:
        wrong = sorted(name for name, file in weight_map.items() if self._home.get(name) != file)
        wrong += sorted(set(self._home) - set(weight_map))
        if wrong:
            raise CheckpointError(
                f"'{index.name}' contradicts the shards in '{self.folder}' on {len(wrong)} tensors: {_some(wrong)}. "
                "Download the folder again."
            )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path}' is missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"Cannot read '{path}': {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' holds a {type(content).__name__}. A JSON object is required.")
    return content


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"'{index}' has no usable 'weight_map'. It must map tensor names to file names.")
    for file in weight_map.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"'{index}' names the file '{file}'. Only .safetensors files beside the index are read."
            )
    return weight_map


def _open(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"Shard '{path.name}' is missing from '{path.parent}'. Download or copy it again.")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' is truncated or no safetensors file: {error}. Copy it again.") from error


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
