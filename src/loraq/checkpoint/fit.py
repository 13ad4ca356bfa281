"""Whether the tensors of a checkpoint are those of a model."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from loraq.errors import CheckpointError
from loraq.safetensors.header import FLOATS
from loraq.safetensors.reader import TensorReader


def require_fit(reader: TensorReader, expected: Mapping[str, Tensor], place: Path) -> None:
    """Raise `CheckpointError` unless a file has the tensors of a model, floats where it has floats."""
    require_names(reader.names, expected, f"The weights in '{place}' do not fit its config.json")
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


def require_names(
    found: Iterable[str], expected: Iterable[str], complaint: str, advice: str = ""
) -> None:
    """Raise `CheckpointError` that lists missing and unexpected names, unless there are none.

    Args:
        found: names in the files.
        expected: names that the model has.
        complaint: what does not fit what, the message's first sentence without its period.
        advice: what to do, the message's last sentence.
    """
    missing, unexpected = sorted({*expected} - {*found}), sorted({*found} - {*expected})
    if missing or unexpected:
        raise CheckpointError(
            f"{complaint}. Missing keys: {', '.join(missing) or 'none'}. Unexpected keys: "
            f"{', '.join(unexpected) or 'none'}. {advice}".rstrip()
        )
