"""How a quantized layer runs: back ends, and the table that picks one by name."""

from loraq.kernels.dispatch import BACKENDS, DEFAULT_BACKEND, get_backend

__all__ = ["BACKENDS", "DEFAULT_BACKEND", "get_backend"]
