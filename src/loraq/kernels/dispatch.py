"""Picks the back end of a layer: the one that is asked for, or the first that suits the device and the formats.

The choice is made when the layer prepares its operands, for (device, scheme, shape) and, where exactness depends on
them, the values. It is logged once for each such triple, at level INFO of the logger `loraq.kernels`.
"""

import logging
import os
from typing import Any

import torch

from loraq.errors import KernelError, unknown
from loraq.formats import QTensor
from loraq.kernels.base import Backend
from loraq.kernels.fp8_row import Fp8Row
from loraq.kernels.int8_row import Int8Row
from loraq.kernels.reference import Reference
from loraq.kernels.resident import Resident
from loraq.kernels.triton_row import TritonRow
from loraq.scheme import LowRankBranch, Scheme

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Reference(),
        Resident(),
        Resident("low_memory", keeps_operands=False),
        Int8Row(),
        Fp8Row(),
        TritonRow(),
    )
}
#: The choice by device and formats; `LORAQ_BACKEND` in the environment puts a name in its place.
DEFAULT_BACKEND = "auto"

#: What the automatic choice tries in turn, by device. A back end stands here only after it was measured on such a
#: device and was faster; none is allowed to encode a weight anew. `resident` takes every layer.
_AUTOMATIC: dict[str, tuple[Backend, ...]] = {"cpu": (Int8Row(weight_error=0.0), Resident())}

_LOGGER = logging.getLogger("loraq.kernels")
_logged: set[tuple[str, Scheme, tuple[int, ...], str]] = set()


def get_backend(name: str) -> Backend:
    """Return a back end by name.

    Raises:
        KernelError: there is no such back end.
    """
    if name not in BACKENDS:
        raise KernelError(unknown("back end", name, [*BACKENDS, DEFAULT_BACKEND]))
    return BACKENDS[name]


def asked_backend(name: str) -> str:
    """Return the name of a back end, or "auto": what is given, or what `LORAQ_BACKEND` says in place of "auto".

    Raises:
        KernelError: there is no such back end.
    """
    if name == DEFAULT_BACKEND:
        name = os.environ.get("LORAQ_BACKEND") or DEFAULT_BACKEND
    return name if name == DEFAULT_BACKEND else get_backend(name).name


def candidates(asked: str, device: torch.device) -> tuple[Backend, ...]:
    """Return the back ends to try in turn on a device: the one that is asked for, or the automatic list."""
    return (get_backend(asked),) if asked != DEFAULT_BACKEND else _AUTOMATIC.get(device.type, (Resident(),))


def choose(asked: str, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> Backend:
    """Return the first candidate that does not refuse a layer (out, in), judged without its values.

    Raises:
        KernelError: the back end that is asked for refuses.
    """
    reason = None
    for backend in candidates(asked, device):
        reason = backend.refusal(scheme, shape, device)
        if reason is None:
            return backend
    raise KernelError(
        f"The back end '{asked}' cannot run a layer {shape[0]}×{shape[1]} in '{scheme.weight}': {reason}. "
        "Use the back end 'resident', which runs every layer, or 'auto'."
    )


def prepare(
    asked: str, weight: QTensor, branch: LowRankBranch | None, scheme: Scheme, dtype: torch.dtype
) -> tuple[Backend, Any]:
    """Return the back end of a layer and its operands for inputs of `dtype`.

    Raises:
        KernelError: the back end that is asked for refuses, or cannot keep its bound with these values.
    """
    n_out, n_in = weight.shape
    device = weight.packed.device
    passed: list[str] = []
    for backend in candidates(asked, device):
        reason = backend.refusal(scheme, (n_out, n_in), device)
        if reason is None:
            try:
                operands = backend.prepare(weight, branch, scheme, dtype)
            except KernelError as error:
                if asked != DEFAULT_BACKEND:
                    raise
                reason = str(error)
            else:
                if not torch.compiler.is_compiling():
                    _log(backend.name, scheme, (n_out, n_in), device.type, passed)
                return backend, operands
        passed.append(f"not {backend.name}: {reason}")
    raise KernelError(
        f"No back end takes a layer {n_out}×{n_in} in '{scheme.weight}': {'; '.join(passed)}. Use 'resident' or 'auto'."
    )


def _log(name: str, scheme: Scheme, shape: tuple[int, int], device: str, passed: list[str]) -> None:
    if (name, scheme, shape, device) not in _logged:
        _logged.add((name, scheme, shape, device))
        _LOGGER.info("%s×%s %s on %s: %s%s", *shape, scheme, device, name, "".join(f" ({why})" for why in passed))
