"""How a quantized layer runs: back ends, and the rules that pick one."""

from loraq.kernels.base import Backend, LayerSpec, Prepared, reconstruct
from loraq.kernels.dispatch import (
    BACKENDS,
    DEFAULT_BACKEND,
    check_for_all,
    choose,
    get_backend,
    prepare,
    resolve_backend,
)

__all__ = [
    "BACKENDS",
    "DEFAULT_BACKEND",
    "Backend",
    "LayerSpec",
    "Prepared",
    "check_for_all",
    "choose",
    "get_backend",
    "prepare",
    "reconstruct",
    "resolve_backend",
]
