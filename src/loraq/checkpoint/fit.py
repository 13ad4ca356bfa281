"""Whether the tensors of a checkpoint are those of a model."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from loraq.errors import CheckpointError
from loraq.safetensors.header import FLOATS
from loraq.safetensors.reader import TensorReader


def require_fit(reader: TensorReader, expected: Mapping[str, Tensor], place: Path) -> None:
    """Require that a file has the tensors of a model, floats where the model has floats.

    Args:
        reader: the file's tensors.
        expected: the model's tensors by name; only their shapes and dtypes matter.
        place: where the file is from, for messages.

    Raises:
        CheckpointError: names, shapes or dtypes differ.
    """
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
    """Require that the names in files are those of a model.

    Args:
        found: names in the files.
        expected: names that the model has.
        complaint: what does not fit what, the message's first sentence without its period.
        advice: what to do, the message's last sentence.

    Raises:
        CheckpointError: names are missing or unexpected; the message lists them.
    """
    missing, unexpected = sorted({*expected} - {*found}), sorted({*found} - {*expected})
    if missing or unexpected:
        raise CheckpointError(
            f"{complaint}. Missing keys: {', '.join(missing) or 'none'}. Unexpected keys: "
            f"{', '.join(unexpected) or 'none'}. {advice}".rstrip()
        )
