"""Statistics on the disk: one safetensors file with `<layer>.second_moment`, `<layer>.max_abs` and `<layer>.tokens`."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from loraq.checkpoint.header import TensorSpec, encode_header
from loraq.checkpoint.layout import spec_of, tensor_bytes
from loraq.checkpoint.reader import ShardReader
from loraq.checkpoint.writer import reason_of
from loraq.errors import CalibrationError, CheckpointError
from loraq.stats import ActivationStats

#: In the file's metadata, under "loraq_stats".
FORMAT_VERSION = "1"
_PARTS = ("second_moment", "max_abs", "tokens")


def save_stats(stats: Mapping[str, ActivationStats], path: str | Path) -> None:
    """Write the statistics of all layers to one safetensors file, which appears when it is whole.

    Raises:
        CalibrationError: there are no statistics.
        CheckpointError: the disk refuses.
    """
    if not stats:
        raise CalibrationError("There are no statistics to save. Collect those of at least one layer.")
    path = Path(path)
    specs: dict[str, TensorSpec] = {}
    for layer, of_layer in stats.items():
        specs |= {name: spec_of(name, tensor) for name, tensor in _tensors(layer, of_layer).items()}
    ordered = dict(sorted(specs.items(), key=lambda item: -item[1].itemsize))  # wide dtypes first, which aligns all
    header, places = encode_header(ordered, {"loraq_stats": FORMAT_VERSION})
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(header)
            for layer, of_layer in stats.items():
                for name, tensor in _tensors(layer, of_layer).items():
                    file.seek(places[name])
                    file.write(tensor_bytes(tensor))
        partial.rename(path)
    except OSError as error:
        raise CheckpointError(f"Cannot write '{path}': {reason_of(error)}.") from error
    finally:
        partial.unlink(missing_ok=True)


def load_stats(path: str | Path) -> Mapping[str, ActivationStats]:
    """Open a file that `save_stats` wrote; a layer's statistics are read each time they are asked for.

    Raises:
        CalibrationError: it is no file of statistics, or is of a newer format.
        CheckpointError: it is missing, truncated or no safetensors file.
    """
    return _StatsFile(Path(path))


class _StatsFile(Mapping[str, ActivationStats]):
    """The layers of a file. It holds no open file, so it can be sent to another process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file():
            raise CheckpointError(f"There is no file of statistics '{path}'. `loraq.collect_stats` makes one.")
        self._reader = ShardReader(path)
        version = self._reader.files[path.name].metadata.get("loraq_stats")
        if version != FORMAT_VERSION:
            what = "no file of statistics" if version is None else f"of format version {version}"
            raise CalibrationError(
                f"'{path}' is {what}; version {FORMAT_VERSION} is required. Make it with `loraq.save_stats`."
            )
        names = self._reader.names
        self._layers = [name.removesuffix(".max_abs") for name in names if name.endswith(".max_abs")]
        if sorted(names) != sorted(f"{layer}.{part}" for layer in self._layers for part in _PARTS):
            raise CalibrationError(f"'{path}' has other tensors than {', '.join(_PARTS)} of each layer. Make it again.")

    def __getitem__(self, layer: str) -> ActivationStats:
        if layer not in self._layers:
            raise KeyError(layer)
        moment, largest, tokens = (self._reader.read(f"{layer}.{part}") for part in _PARTS)
        if tokens.dtype != torch.int64 or tokens.numel() != 1 or {moment.dtype, largest.dtype} != {torch.float32}:
            raise CalibrationError(f"'{self._path}': layer '{layer}' has other dtypes than fp32 and int64.")
        try:
            return ActivationStats(int(tokens), moment, largest)
        except CalibrationError as error:
            raise CalibrationError(f"'{self._path}': layer '{layer}': {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def _tensors(layer: str, stats: ActivationStats) -> dict[str, Tensor]:
    parts = (stats.second_moment.float(), stats.max_abs.float(), torch.tensor([stats.tokens]))
    return {f"{layer}.{name}": part for name, part in zip(_PARTS, parts, strict=True)}
