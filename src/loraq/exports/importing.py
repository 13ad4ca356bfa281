"""`import_checkpoint`: a quantized folder of another program as one of loraq."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loraq.checkpoint.apart import require_apart
from loraq.checkpoint.components import copy_components
from loraq.checkpoint.fit import require_fit
from loraq.checkpoint.folder import require_free, require_space
from loraq.checkpoint.partial import atomic_folder, require_no_run
from loraq.checkpoint.places import empty_layer
from loraq.checkpoint.streamed import write_streamed
from loraq.exports.lite import LiteLayer, find_layers, lay_bias_back
from loraq.integrations.diffusers import model_of
from loraq.integrations.folders import Folder
from loraq.integrations.hub import local_path
from loraq.json_files import read_json
from loraq.layers import find_places, swap
from loraq.options import checked
from loraq.pipeline.progress import ProgressCallback, show_layers
from loraq.safetensors.header import DTYPES
from loraq.safetensors.reader import ShardReader
from loraq.state import answer_for_weights


@dataclass(frozen=True)
class ImportReport:
    """What became of a folder of another program."""

    #: Every quantized layer; all are the same numbers here.
    layers: tuple[LiteLayer, ...]
    #: Bytes of the quantized weights.
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "nbytes": self.nbytes,
            "layers": {
                layer.name: {
                    "kind": layer.kind,
                    "fate": "exact",
                    "shape": list(layer.shape),
                    "weight": layer.scheme.weight,
                    "rank": layer.scheme.branch.rank if layer.scheme.branch else 0,
                    "bytes": layer.nbytes,
                }
                for layer in self.layers
            },
        }


@checked
def import_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    overwrite: bool = False,
    progress: ProgressCallback | bool = True,
) -> ImportReport:
    """Make a folder of loraq from a folder of diffusers that was quantized for Nunchaku Lite.

    Codes, scales and factors are the same numbers in another order, so the model is the same; its
    activations stay in 16 bits, which Nunchaku's kernels round to 4. It runs wherever loraq runs.
    One layer is in memory at a time, and the target appears under its name only when it is whole.

    Args:
        source: a folder of diffusers with `quant_method: nunchaku_lite`, a pipeline's folder with
            one in it (its other components go along), or a repository of the hub.
        target: the folder to make.
        overwrite: whether a model folder that is there may be replaced.
        progress: False for silence, True for a display on stderr, or a function to call after each
            layer.

    Returns:
        What became of each layer.

    Raises:
        CheckpointError: the source is no such folder, or damaged; or the target cannot be written.
        ExportError: a layer has what no format here holds. Nothing is written then.
    """
    place = Path(target)
    require_apart(place, source)
    require_free(place, overwrite=overwrite)
    require_no_run(place)
    found = Folder.find(local_path(source), None)
    config = read_json(found.path / "config.json")
    model = model_of(config, found.path / "config.json")
    reader = ShardReader(found.path)
    layers = find_layers(config, model, reader)
    made = {f"{layer.name}.weight" for layer in layers}
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in made}
    require_fit(reader, kept, found.path, {name for layer in layers for name in layer.sources})
    new = {}
    for layer in layers:
        old: Any = model.get_submodule(layer.name)
        has_bias = old.bias is not None
        dtype = DTYPES[reader.dtype(f"{layer.name}.bias")] if has_bias else old.weight.dtype
        new[layer.name] = empty_layer(old, layer.scheme, layer.shape, dtype, bias=has_bias)
    swap(find_places(model, new))
    answer_for_weights(model, list(new))
    report = ImportReport(tuple(layers), sum(layer.nbytes for layer in layers))
    size = sum(path.stat().st_size for path in [*found.others.values(), *_weights(found.path)])
    require_space(place, size)
    with (
        show_layers(progress, "import") as show,
        atomic_folder(place, overwrite=overwrite) as partial,
    ):
        components = copy_components(found.others, partial)
        folder = partial / found.component
        folder.mkdir(exist_ok=True)
        imported = _ImportedReader(reader, layers, show)
        write_streamed(model, imported, folder, {}, components=components)
    return report


def _weights(folder: Path) -> list[Path]:
    return list(folder.glob("*.safetensors"))


class _ImportedReader:
    """The tensors of a folder in loraq's order; a layer is made when its first one is read."""

    def __init__(
        self, reader: ShardReader, layers: list[LiteLayer], show: ProgressCallback
    ) -> None:
        self._reader, self._show = reader, show
        self._layers = {layer.name: layer for layer in layers}
        self._made: tuple[str, Mapping[str, Tensor]] = ("", {})
        self._n_done = 0

    @property
    def names(self) -> list[str]:
        """Names of the tensors in the files."""
        return self._reader.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        layer, leaf = self._find(name)
        if layer is None or leaf == "bias":
            return self._reader.shape(name)
        return layer.scheme.storage(layer.shape)[leaf]

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor in safetensors' notation."""
        layer, leaf = self._find(name)
        return self._reader.dtype(name) if layer is None or leaf == "bias" else "U8"

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU."""
        layer, leaf = self._find(name)
        if layer is None:
            return self._reader.read(name)
        if leaf == "bias":
            return lay_bias_back(layer, self._reader.read(name))
        if self._made[0] != layer.name:
            self._made = layer.name, layer.make(self._reader).tensors
            self._n_done += 1
            self._show(self._n_done, len(self._layers), layer.name, 0.0)
        return self._made[1][leaf]

    def read_slice(self, name: str, index: int) -> Tensor:
        """Return one entry of a tensor's first axis."""
        return self.read(name)[index]

    def _find(self, name: str) -> tuple[LiteLayer | None, str]:
        layer, _, leaf = name.rpartition(".")
        return self._layers.get(layer), leaf
