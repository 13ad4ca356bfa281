"""Build a model from a stranger's configuration: within bounds, or not at all.

A number in a configuration may ask for ten million layers, or for a table of positions that no
memory holds. What a constructor makes is watched while it makes it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from loraq.errors import CheckpointError
from loraq.safetensors.reader import ShardReader

#: The most parameters of a model whose weights are not known; those of diffusers have at most 5000.
#: A thousand take a tenth of a second.
MOST_PARAMETERS = 7_500
#: The most bytes that one operation of a constructor may compute, and all of them; the largest
#: table of positions, OmniGen's, takes 0.9 GB at a time and 4 in all.
_MOST_AT_ONCE, _MOST_BYTES = 1 << 30, 8 << 30
#: Largest integer, and most values, of a configuration. Real ones have 10^7 (a frequency) and 200.
_LARGEST = 2**24
_MOST_VALUES = 10_000


def require_plausible(config: dict[str, Any]) -> None:
    """Require that no number of a configuration is beyond what a size, count or frequency can be.

    Raises:
        CheckpointError: one is, or there are too many.
    """
    values = tree_flatten(config)[0]
    if len(values) > _MOST_VALUES:
        raise CheckpointError(f"it has {len(values)} values, and at most {_MOST_VALUES} are read")
    for value in values:
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise CheckpointError(f"it has the number {value}, and at most {_LARGEST} is read")


def bound_parameters(weights: Path) -> int:
    """Return the most parameters that a model with these weights may have.

    An original layout joins up to four of them in one tensor.
    """
    try:
        return 4 * len(ShardReader(weights).names) + 1000
    except CheckpointError:  # whoever reads the weights will say so
        return MOST_PARAMETERS


@contextmanager
def bounded_construction(most_parameters: int) -> Iterator[None]:
    """Stop a constructor that makes too much.

    Parameters are counted as they are registered, and bytes before they are computed. Memory that
    is only reserved costs nothing, and is how `init_empty_weights` makes parameters.

    Raises:
        CheckpointError: inside, where the constructor asks for it.
    """
    thread, made = threading.get_ident(), 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > most_parameters:
            raise CheckpointError(
                f"it asks for more than {most_parameters} parameters, and the weights have fewer"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        with _BoundedBytes():
            yield
    finally:
        hook.remove()


class _BoundedBytes(TorchDispatchMode):
    """Stops before an operation that computes more than a constructor may."""

    def __init__(self) -> None:
        super().__init__()
        self._computed = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket not in _RESERVES:
            nbytes = _predict_bytes(function, args, kwargs)
            self._computed += nbytes
            if nbytes > _MOST_AT_ONCE or self._computed > _MOST_BYTES:
                raise CheckpointError(
                    f"it asks for tables of more than {_MOST_AT_ONCE >> 30} GiB, or of "
                    f"{_MOST_BYTES >> 30} GiB in all"
                )
        return function(*args, **kwargs)


#: Operations that reserve memory and do not touch it.
_RESERVES = {torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like}


def _predict_bytes(function: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Return the bytes that an operation would write, by what it does on the meta device."""
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "meta":
        return 0
    if device is None and given and all(tensor.is_meta for tensor in given):
        return 0
    args, kwargs = tree_map(_to_meta, (args, kwargs))
    if device is not None or not given:
        kwargs["device"] = torch.device("meta")
    try:
        results = tree_flatten(function(*args, **kwargs))[0]
    except (RuntimeError, NotImplementedError, TypeError):
        return 0  # reads a number, or is wrong and will say so
    views = function.is_view
    return sum(
        result.numel() * result.element_size()
        for result in results
        if isinstance(result, Tensor) and not views
    )


def _to_meta(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
