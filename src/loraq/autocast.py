"""`torch.autocast` around a layer: what it casts, and how our own products are kept out of it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def cast_input(x: Tensor) -> Tensor:
    """Return an input as `nn.Linear` sees it: under `torch.autocast` in its dtype, unless fp64."""
    if x.dtype == torch.float64 or not _casts(x.device):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which products on a device have the dtype of their factors."""
    return torch.autocast(device.type, enabled=False) if _casts(device) else nullcontext()


def _casts(device: torch.device) -> bool:
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
