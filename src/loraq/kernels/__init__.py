"""How a quantized layer runs: back ends, and the rules that pick one."""

from loraq.kernels.base import Backend, LayerSpec, Prepared
from loraq.kernels.dispatch import (
    BACKENDS,
    DEFAULT_BACKEND,
    asked_backend,
    check_for_all,
    choose,
    get_backend,
    prepare,
)

__all__ = [
    "BACKENDS",
    "DEFAULT_BACKEND",
    "Backend",
    "LayerSpec",
    "Prepared",
    "asked_backend",
    "check_for_all",
    "choose",
    "get_backend",
    "prepare",
]
