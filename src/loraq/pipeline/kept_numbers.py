"""NaN and infinities in what stays as it is: copied, as every loader takes them, and told.

A mask holds infinities for a reason, and a tensor that nothing reads may hold anything. What is to
be quantized has none (`formats.faults`).
"""

import logging
from collections.abc import Collection, Mapping

from torch import nn

from loraq.formats.faults import find_not_finite
from loraq.pipeline.counting import list_beside

_LOGGER = logging.getLogger("loraq")
#: Tensors that a warning names.
_NAMED = 3


def warn_of_kept(model: nn.Module, names: Collection[str] = ()) -> None:
    """Warn of what a model stores beside the weights of these names, where it has such numbers."""
    beside = list_beside(model, names)
    loaded = ((name, tensor) for _, name, tensor in beside if not tensor.is_meta)
    tell({name: fault for name, tensor in loaded if (fault := find_not_finite(tensor))})


def tell(faults: Mapping[str, str]) -> None:
    """Warn of tensors with such numbers, given where these are (`find_not_finite`) by name."""
    if not faults:
        return
    shown = [f"'{name}' ({fault})" for name, fault in list(faults.items())[:_NAMED]]
    _LOGGER.warning(
        "What stays as it is holds NaN or infinity, which is copied: %s%s. If the float model "
        "works, that is fine; if not, download it again.",
        ", ".join(shown),
        f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else "",
    )
