"""Whether the tensors of a float checkpoint are those of a model."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from loraq.checkpoint.header import FLOATS
from loraq.checkpoint.reader import TensorReader
from loraq.errors import CheckpointError


def require_fit(reader: TensorReader, expected: Mapping[str, Tensor], place: Path) -> None:
    """Raise `CheckpointError` unless a file has the tensors of a model, floats where it has floats."""
    missing = sorted(set(expected) - set(reader.names))
    unexpected = sorted(set(reader.names) - set(expected))
    if missing or unexpected:
        raise CheckpointError(
            f"The weights in '{place}' do not fit its config.json. Missing keys: "
            f"{', '.join(missing) or 'none'}. Unexpected keys: {', '.join(unexpected) or 'none'}."
        )
    for name, tensor in expected.items():
        shape, dtype = reader.shape(name), reader.dtype(name)
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"'{place}': tensor '{name}' has shape {shape}, config.json wants "
                f"{tuple(tensor.shape)}."
            )
        if tensor.is_floating_point() and dtype not in FLOATS:
            raise CheckpointError(
                f"'{place}': tensor '{name}' is {dtype}. Float weights of 16 bits or more are "
                f"required."
            )
