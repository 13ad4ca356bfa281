"""Picks the back end of a layer: the one that is asked for, or the first that suits it.

The choice is made when the layer prepares its operands, for (device, scheme, shape) and, where
exactness depends on them, the values. It is logged once for each such triple, at level INFO of the
logger `loraq.kernels`.

A back end that is asked for one layer runs it or raises. One that is asked for a whole model, by
`set_backend`, `load` or the environment, leaves the layers that it refuses to the automatic choice,
and a warning says so.

Activations are rounded where a device multiplies what is left of them natively, and where they are
to be simulated. Elsewhere the layer runs in 16 bits, which is more exact and faster; a warning says
so once for each format.
"""

import logging
import os
from collections.abc import Sequence

import torch

from loraq.errors import KernelError, unknown
from loraq.kernels.base import Backend, LayerSpec, Prepared
from loraq.kernels.fp8_row import Fp8Row
from loraq.kernels.int8_row import Int8Row
from loraq.kernels.low_memory import LowMemory
from loraq.kernels.openvino import OpenVino
from loraq.kernels.reference import Reference
from loraq.kernels.resident import Resident
from loraq.kernels.triton.backend import TritonRow
from loraq.packed import PackedWeight
from loraq.scheme import Scheme

_LOW_MEMORY = LowMemory()

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Reference(),
        Resident(),
        _LOW_MEMORY,
        Int8Row(),
        OpenVino(),
        Fp8Row(),
        TritonRow(),
    )
}
#: The choice by device and formats; `LORAQ_BACKEND` in the environment puts a name in its place.
DEFAULT_BACKEND = "auto"

#: What the automatic choice tries in turn, by device. A back end stands here only after it was
#: measured on such a device and was faster; none keeps anything beside the packed bytes, and none
#: encodes a weight anew. `low_memory` takes every layer.
_AUTOMATIC: dict[str, tuple[Backend, ...]] = {
    "cpu": (Int8Row(weight_error=0.0, keeps_operands=False), _LOW_MEMORY)
}

_LOGGER = logging.getLogger("loraq.kernels")
#: Kinds of layers, by device type, whose choice was logged; and whose refusal was warned of.
_logged: set[tuple[str, str, Scheme, tuple[int, int], str]] = set()
_warned: set[tuple[str, Scheme, tuple[int, int], str]] = set()
#: Device types and formats of activations of which it was said that they run in 16 bits.
_told: set[tuple[str, str]] = set()


def get_backend(name: str) -> Backend:
    """Return a back end by name.

    Raises:
        KernelError: there is no such back end.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise KernelError(unknown("back end", name, [*BACKENDS, DEFAULT_BACKEND]))
    return BACKENDS[name]


def resolve_backend(name: str) -> str:
    """Return the name of a back end, or "auto", in whose place `LORAQ_BACKEND` may put a name.

    Raises:
        KernelError: there is no such back end.
    """
    if name == DEFAULT_BACKEND:
        name = os.environ.get("LORAQ_BACKEND") or DEFAULT_BACKEND
    return name if name == DEFAULT_BACKEND else get_backend(name).name


def candidates(asked: str, device: torch.device, *, strict: bool = True) -> tuple[Backend, ...]:
    """Return the back ends to try in turn on a device.

    These are the automatic list; or the one that is asked for, with the automatic list behind it
    unless `strict`.
    """
    automatic = _AUTOMATIC.get(device.type, (_LOW_MEMORY,))
    if asked == DEFAULT_BACKEND:
        return automatic
    return (get_backend(asked), *(() if strict else automatic))


def choose(asked: str, spec: LayerSpec, *, strict: bool = True) -> Backend:
    """Return the first candidate that does not refuse a layer, judged without its values.

    Raises:
        KernelError: the back end that is asked for refuses, and `strict` leaves no other.
    """
    reason = ""
    for backend in candidates(asked, spec.device, strict=strict):
        scheme, reason = settle(backend, spec)
        if scheme is not None:
            return backend
    n_out, n_in = spec.shape
    raise KernelError(
        f"The back end '{asked}' cannot run a layer {n_out}×{n_in} in '{spec.schemes[0].weight}': "
        f"{reason}. Use the back end 'resident', which runs every layer, or 'auto'."
    )


def settle(backend: Backend, spec: LayerSpec) -> tuple[Scheme | None, str]:
    """Return the first of a layer's schemes that a back end runs, in the form in which it does.

    Returns:
        The scheme, or `None` and why the back end refuses the first of them.
    """
    reasons = []
    for asked in spec.schemes:
        scheme = asked if spec.simulate else backend.as_run(asked)
        reason = backend.refusal(scheme, spec.shape, spec.device)
        if reason is None:
            return scheme, ""
        reasons.append(reason)
    return None, reasons[0]


def check_for_all(asked: str, layers: Sequence[LayerSpec]) -> None:
    """Warn of the layers of a model that a back end refuses, judged without their values.

    Raises:
        KernelError: it refuses all of them.
    """
    if asked == DEFAULT_BACKEND:
        return
    backend = get_backend(asked)
    reasons = {spec: reason for spec in layers if (reason := settle(backend, spec)[1])}
    n_refused = sum(spec in reasons for spec in layers)
    if not n_refused:
        return
    first, reason = next(iter(reasons.items()))
    n_out, n_in = first.shape
    if n_refused == len(layers):
        raise KernelError(
            f"The back end '{asked}' cannot run any of the {n_refused} quantized layers. The first "
            f"one is {n_out}×{n_in}: {reason}. Use the back end 'resident', which runs every "
            "layer, or 'auto'."
        )
    _LOGGER.warning(
        "The back end '%s' refuses %d of %d layers, which run on the automatic choice. The first "
        "one is %d×%d: %s.",
        asked,
        n_refused,
        len(layers),
        n_out,
        n_in,
        reason,
    )
    _warned.update((asked, spec.schemes[0], spec.shape, spec.device.type) for spec in reasons)


def prepare(
    asked: str,
    packed: PackedWeight,
    dtype: torch.dtype,
    spec: LayerSpec | None = None,
    *,
    strict: bool = True,
) -> Prepared:
    """Return a layer that is ready for inputs of `dtype`, on the back end that takes it.

    Args:
        asked: name of the back end, or "auto".
        packed: the stored weight.
        dtype: of the inputs.
        spec: what is to be run; `None` is what is stored.
        strict: whether only the back end that is asked for will do.

    Raises:
        KernelError: the back end that is asked for refuses, or cannot keep its bound with these
            values, and `strict` leaves no other.
    """
    spec = spec or LayerSpec((packed.scheme,), packed.shape, packed.device)
    passed: list[str] = []
    for backend in candidates(asked, spec.device, strict=strict):
        scheme, reason = settle(backend, spec)
        if scheme is not None:
            try:
                operands = backend.prepare(packed, scheme, dtype)
            except KernelError as error:
                if strict and asked != DEFAULT_BACKEND:
                    raise
                reason = str(error)
            else:
                if not torch.compiler.is_compiling():
                    _log(asked, backend.name, spec, passed)
                    _tell_precision(spec, scheme)
                kept = operands if backend.keeps_operands else None
                return Prepared(backend, kept, scheme, dtype, spec.device)
        passed.append(f"not {backend.name}: {reason}")
    n_out, n_in = spec.shape
    raise KernelError(
        f"No back end takes a layer {n_out}×{n_in} in '{packed.scheme.weight}': "
        f"{'; '.join(passed)}. Use 'resident' or 'auto'."
    )


def _tell_precision(spec: LayerSpec, scheme: Scheme) -> None:
    """Warn, once for each kind of activation and of device, that it is run in 16 bits."""
    asked = spec.schemes[0]
    rounded = asked if asked.branch is None or asked.activation != "bf16" else asked.branch
    kind = spec.device.type, rounded.activation
    if asked.is_weight_only or not scheme.is_weight_only or kind in _told:
        return
    _told.add(kind)
    _LOGGER.warning(
        "Activations in '%s' gain nothing on %s, so layers run with 16-bit activations there: more "
        "exact, and faster. `loraq.set_activations(model, 'stored', simulate=True)` rounds them.",
        rounded.activation,
        spec.device.type,
    )


def _log(asked: str, name: str, spec: LayerSpec, passed: list[str]) -> None:
    scheme, shape, device = spec.schemes[0], spec.shape, spec.device
    kind = (asked, scheme, shape, device.type)
    if (name, *kind) in _logged:
        return
    _logged.add((name, *kind))
    unannounced = asked not in (DEFAULT_BACKEND, name) and kind not in _warned
    why = "".join(f" ({reason})" for reason in passed)
    level = logging.WARNING if unannounced else logging.INFO
    _LOGGER.log(level, "%s×%s %s on %s: %s%s", *shape, scheme, device.type, name, why)
