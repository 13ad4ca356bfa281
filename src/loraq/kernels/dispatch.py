"""Picks a back end by name; each one is exact or states its bound against the reference."""

from loraq.errors import KernelError, unknown
from loraq.kernels.base import Backend
from loraq.kernels.reference import Reference
from loraq.kernels.resident import Resident

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Reference(), Resident())}
DEFAULT_BACKEND = "resident"


def get_backend(name: str) -> Backend:
    """Return a back end by name.

    Raises:
        KernelError: there is no such back end.
    """
    if name not in BACKENDS:
        raise KernelError(unknown("back end", name, BACKENDS))
    return BACKENDS[name]
