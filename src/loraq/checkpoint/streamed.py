"""The files of `save` without the model in memory: one tensor is read and written at a time."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from loraq.checkpoint.components import StoredFile
from loraq.checkpoint.configuration import (
    GENERATION_FILE,
    generation_config,
    model_config,
    weights_stem,
)
from loraq.checkpoint.manifest import Manifest
from loraq.checkpoint.model import require_quantized
from loraq.errors import CheckpointError, list_some
from loraq.json_files import write_json
from loraq.safetensors.header import TensorSpec
from loraq.safetensors.layout import DEFAULT_SHARD_BYTES, ShardLayout, tensor_bytes
from loraq.safetensors.reader import TensorReader


def write_streamed(
    model: nn.Module,
    reader: TensorReader,
    folder: Path,
    tied: Mapping[str, str],
    *,
    components: Mapping[str, StoredFile] | None = None,
) -> None:
    """Write what `write_model` writes of a model whose tensors a reader has.

    Args:
        model: with quantized layers, on the meta device.
        reader: of its tensors.
        folder: empty, where to.
        tied: names that share another name's tensor though they are two in the model.
        components: other files of the pipeline that the folder will be in.

    Raises:
        CheckpointError: a tensor cannot be read, or was changed while it was written.
        OSError: the disk refuses.
    """
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    ties = {}
    for name, tensor in state.items():
        source = tied[name] if tied.get(name) in state else first.setdefault(id(tensor), name)
        if source != name:
            ties[name] = source
    names = [name for name in state if name not in ties]
    specs = {name: TensorSpec(reader.dtype(name), reader.shape(name)) for name in names}
    config = model_config(model)
    layout = ShardLayout.of(specs, weights_stem(config), DEFAULT_SHARD_BYTES)
    layout.allocate(folder)
    written = {}
    for name in names:
        tensor = reader.read(name)
        layout.write(folder, {name: tensor})
        written[name] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
    files, found = layout.hash_files(folder)
    if wrong := [name for name in names if found[name] != written[name]]:
        raise CheckpointError(
            f"'{folder}' does not hold what was written to it: something else has changed "
            f"{list_some(wrong)}. Run the same command again."
        )
    if config:
        raw = write_json(folder / "config.json", config)
        files["config.json"] = hashlib.sha256(raw).hexdigest()
    if generation := generation_config(model):
        write_json(folder / GENERATION_FILE, generation)
    Manifest.of_layers(require_quantized(model), ties, components or {}).write(folder, files)
