"""The same sums whoever runs them: what a process has set for its own work does not count here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch


@contextmanager
def fixed_arithmetic(device: torch.device) -> Iterator[None]:
    """Compute in fp32 on the CPU where nothing else is said, exactly, and without autocast.

    On a CPU one thread computes: then sums do not depend on the core count, and layers run side by
    side.
    """
    threads, flushes = torch.get_num_threads(), _flushes_denormals()
    if device.type == "cpu":
        torch.set_num_threads(1)
    if flushes:
        torch.set_flush_denormal(False)
    try:
        # The meta device has no autocast.
        has_autocast = torch.amp.is_autocast_available(device.type)
        no_autocast = torch.autocast(device.type if has_autocast else "cpu", enabled=False)
        # As a mode it costs time at every call, so only where a default was set.
        on_cpu = torch.get_default_device().type == "cpu"
        with _SETTINGS, no_autocast, nullcontext() if on_cpu else torch.device("cpu"):
            yield
    finally:
        torch.set_num_threads(threads)
        if flushes:
            torch.set_flush_denormal(True)


def _flushes_denormals() -> bool:
    """Return whether this thread computes with zeros in place of the smallest numbers."""
    smallest = torch.tensor([1], dtype=torch.int32, device="cpu").view(torch.float32)
    return not (2 * smallest).item()


class _Settings:
    """Settings of the whole process, which threads that solve side by side share.

    The first one that comes makes them, and the last one that goes puts back what was there.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._n_inside = 0
        self._put_back: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._n_inside:
                self._put_back = [
                    _set_default_dtype(),
                    _make_products_exact(),
                ]
            self._n_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if not self._n_inside:
                for put_back in self._put_back:
                    put_back()


_SETTINGS = _Settings()


def _set_default_dtype() -> Callable[[], None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    return lambda: torch.set_default_dtype(before)


def _make_products_exact() -> Callable[[], None]:
    """Let no product of fp32 be computed in TF32 or bf16, and return what puts that back."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # torch < 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return lambda: torch.set_float32_matmul_precision(before)
    # To read the older setting is an error once one of these was set.
    products = [backends.cuda.matmul, backends.mkldnn.matmul]
    less_exact = [(p, p.fp32_precision) for p in products if p.fp32_precision in ("tf32", "bf16")]
    for product, _ in less_exact:
        product.fp32_precision = "ieee"

    def put_back() -> None:
        for product, precision in less_exact:
            product.fp32_precision = precision

    return put_back
