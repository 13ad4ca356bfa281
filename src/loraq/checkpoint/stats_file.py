"""Statistics on the disk: a safetensors file of `<layer>.second_moment` and `<layer>.tokens`.

Where sensitivities were collected, there is `<layer>.output_sensitivity` as well, and where calls
were told apart `<layer>.call_mean_squares`.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from loraq.checkpoint.apart import require_apart
from loraq.checkpoint.folder import require_writable
from loraq.checkpoint.partial import atomic_file, explain_refusals, partial_path
from loraq.errors import CalibrationError, CheckpointError
from loraq.safetensors.header import TensorSpec, read_header
from loraq.safetensors.layout import ShardLayout
from loraq.safetensors.reader import ShardReader
from loraq.stats import ActivationStats, StatsShapes

#: In the file's metadata, under "loraq_stats".
FORMAT_VERSION = "1"
_PARTS = ("second_moment", "tokens")
#: What a layer may have beside these.
_OPTIONAL = tuple(name for name in StatsShapes._fields if name not in _PARTS)
#: Of what each layer has.
Shapes = Mapping[str, StatsShapes]


def lay_out_stats(shapes: Shapes, stem: str) -> ShardLayout:
    """Lay out one file, given the shapes of what each layer has."""
    specs: dict[str, TensorSpec] = {}
    for layer, of_layer in shapes.items():
        parts = (TensorSpec("F32", of_layer.second_moment), TensorSpec("I64", (1,)))
        specs |= {f"{layer}.{name}": part for name, part in zip(_PARTS, parts, strict=True)}
        for name in _OPTIONAL:
            if (shape := getattr(of_layer, name)) is not None:
                specs[f"{layer}.{name}"] = TensorSpec("F32", shape)
    return ShardLayout.of(specs, stem, math.inf, {"loraq_stats": FORMAT_VERSION})


@contextmanager
def stats_file(path: Path, shapes: Shapes) -> Iterator[Callable[[str, ActivationStats], None]]:
    """Yield a function that writes one layer's statistics, in any order.

    The file appears when all is written. The disk's space is taken at the beginning, so that it is
    not missing after hours of work.

    Args:
        path: the file to make; what is there is replaced.
        shapes: of what each layer to come has.

    Raises:
        CheckpointError: the disk refuses, another run makes the same file, or a layer is not what
            was announced.
    """
    layout = lay_out_stats(shapes, path.stem)
    with atomic_file(path) as partial:
        with explain_refusals(path):
            layout.allocate(partial.parent)

        def write(layer: str, stats: ActivationStats) -> None:
            parts = (stats.second_moment.float(), torch.tensor([stats.tokens], device="cpu"))
            named = {f"{layer}.{name}": part for name, part in zip(_PARTS, parts, strict=True)}
            for name in _OPTIONAL:
                if (part := getattr(stats, name)) is not None:
                    named[f"{layer}.{name}"] = part.float()
            with explain_refusals(path):
                layout.write(partial.parent, named)

        yield write


def require_room(path: Path, shapes: Shapes, *, overwrite: bool) -> int:
    """Return the bytes that a file of statistics will take, if it can be made.

    Raises:
        CheckpointError: something is in its way, or the disk has not enough space.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"Cannot write '{path}': a name that ends with '.safetensors' is required."
        )
    if path.is_dir():
        raise CheckpointError(
            f"Cannot write '{path}': a folder of this name exists. Choose another name."
        )
    if path.exists() and not overwrite:
        raise CheckpointError(
            f"Cannot write '{path}': the file exists. Choose another name, or allow overwriting "
            "(`--overwrite`)."
        )
    if path.exists() and not _is_stats(path):
        raise CheckpointError(
            f"Will not replace '{path}': it is not a file of statistics. Choose another name, or "
            "delete it yourself."
        )
    require_writable(path)
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    needed, free = lay_out_stats(shapes, path.stem).nbytes, shutil.disk_usage(parent).free
    left = sum(p.stat().st_size for p in partial_path(path).rglob("*.safetensors"))
    if needed > free + left:
        raise CheckpointError(
            f"'{parent}' has {free / 1e9:.3g} GB free and the statistics take {needed / 1e9:.3g} "
            "GB. Free space, choose another target, or collect mean squares only "
            "(`--mean-squares`)."
        )
    return needed


def _is_stats(path: Path) -> bool:
    try:
        return "loraq_stats" in read_header(path).metadata
    except CheckpointError:
        return False


def save_stats(stats: Mapping[str, ActivationStats], path: str | Path) -> None:
    """Write the statistics of all layers to one .safetensors file.

    It appears, or is replaced, when it is whole.

    Raises:
        CalibrationError: there are no statistics.
        CheckpointError: the file cannot be written, or is the one that the statistics are read
            from.
    """
    require_apart(path, file_of_stats(stats))
    if not stats:
        raise CalibrationError(
            "There are no statistics to save. Collect those of at least one layer."
        )
    shapes = {layer: of_layer.shapes for layer, of_layer in stats.items()}
    require_room(Path(path), shapes, overwrite=True)
    with stats_file(Path(path), shapes) as write:
        for layer, of_layer in stats.items():
            write(layer, of_layer)


def file_of_stats(stats: object) -> Path | None:
    """Return the file that statistics are, or are read from; `None` if they are in memory."""
    if isinstance(stats, _StatsFile):
        return stats.path
    return Path(stats) if isinstance(stats, str | Path) else None


def load_stats(path: str | Path) -> Mapping[str, ActivationStats]:
    """Open a file that `save_stats` wrote.

    A layer's statistics are read each time they are asked for.

    Raises:
        CalibrationError: it is not a file of statistics, or is of a newer format.
        CheckpointError: it is missing, truncated or not a safetensors file.
    """
    return _StatsFile(Path(path))


class _StatsFile(Mapping[str, ActivationStats]):
    """The layers of a file. It holds no open file, so it can be sent to another process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(
                f"There is no file of statistics '{path}'. `loraq stats` makes one."
            )
        self._reader = ShardReader(path)
        version = self._reader.files[path.name].metadata.get("loraq_stats")
        if version != FORMAT_VERSION:
            what = "not a file of statistics" if version is None else f"of format version {version}"
            raise CalibrationError(
                f"'{path}' is {what}; version {FORMAT_VERSION} is required. Make it with `loraq "
                "stats` or `loraq.save_stats`."
            )
        names = set(self._reader.names)
        self._layers = [
            name.removesuffix(".tokens") for name in self._reader.names if name.endswith(".tokens")
        ]
        needed = {f"{layer}.{part}" for layer in self._layers for part in _PARTS}
        self._optional = names & {f"{layer}.{part}" for layer in self._layers for part in _OPTIONAL}
        if names != needed | self._optional:
            raise CalibrationError(
                f"'{path}' has other tensors than {', '.join(_PARTS)} of each layer, and perhaps "
                f"{' and '.join(_OPTIONAL)}. Make it again."
            )

    def __getitem__(self, layer: str) -> ActivationStats:
        if layer not in self._layers:
            raise KeyError(layer)
        moment, tokens = (self._reader.read(f"{layer}.{part}") for part in _PARTS)
        others = {
            part: self._reader.read(name)
            for part in _OPTIONAL
            if (name := f"{layer}.{part}") in self._optional
        }
        floats = {part.dtype for part in (moment, *others.values())}
        if tokens.dtype != torch.int64 or tokens.numel() != 1 or floats != {torch.float32}:
            raise CalibrationError(
                f"'{self.path}': layer '{layer}' has other dtypes than fp32 and int64."
            )
        try:
            return ActivationStats(int(tokens), moment, **others)
        except CalibrationError as error:
            raise CalibrationError(f"'{self.path}': layer '{layer}': {error}") from error

    def __contains__(self, layer: object) -> bool:  # a Mapping's own would read all of it
        return layer in self._layers

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
