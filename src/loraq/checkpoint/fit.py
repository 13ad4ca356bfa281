"""Whether the tensors of a checkpoint are those of a model."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from loraq.errors import CheckpointError, list_some
from loraq.safetensors.header import DTYPE_NAMES, FLOATS
from loraq.safetensors.reader import TensorReader

#: What may stand for an integer of a model: not raw bytes.
_INTEGERS = frozenset({"I64", "I32", "I16", "I8"})


def require_fit(
    reader: TensorReader,
    expected: Mapping[str, Tensor],
    weights: Path,
    unused: Collection[str] = (),
) -> None:
    """Require that a file has the tensors of a model, floats where the model has floats.

    Args:
        reader: the file's tensors.
        expected: the model's tensors by name; only their shapes and dtypes matter.
        weights: where the file is from, for messages.
        unused: tensors of the file that belong to other models.

    Raises:
        CheckpointError: names, shapes or dtypes differ.
    """
    found = [name for name in reader.names if name not in unused]
    require_names(found, expected, f"The weights in '{weights}' do not fit its config.json")
    for name, tensor in expected.items():
        shape, dtype = reader.shape(name), reader.dtype(name)
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"'{weights}': tensor '{name}' has shape {shape}, config.json wants "
                f"{tuple(tensor.shape)}."
            )
        require_kind(name, dtype, tensor.dtype, weights)


def require_kind(name: str, stored: str, wanted: torch.dtype, place: Path) -> None:
    """Require that a stored tensor's numbers are of the kind that a model has under its name.

    Floats of 16 bits or more stand for each other; integers do, too. Anything else is required
    as it is: FP8 without its scale is no weight, and raw bytes are no number.

    Args:
        name: of the tensor.
        stored: its dtype in the file.
        wanted: its dtype in the model.
        place: where the file is from, for messages.

    Raises:
        CheckpointError: it is of another kind.
    """
    if stored == DTYPE_NAMES.get(wanted):
        return
    kinds = (FLOATS, _INTEGERS)
    if any(stored in kind and DTYPE_NAMES.get(wanted) in kind for kind in kinds):
        return
    required = (
        "Float weights of 16 bits or more are required"
        if wanted.is_floating_point
        else f"{DTYPE_NAMES.get(wanted, wanted)} is required"
    )
    raise CheckpointError(
        f"'{place}': tensor '{name}' is {stored}, the model wants {wanted}. {required}."
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
            f"{complaint}. Missing keys: {list_some(missing) or 'none'}. Unexpected keys: "
            f"{list_some(unexpected) or 'none'}. {advice}".rstrip()
        )
