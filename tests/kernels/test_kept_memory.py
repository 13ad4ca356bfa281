"""What a layer holds after a forward is its stored bytes and what its back end says it keeps.

It is counted by the allocator of each device: that of a GPU knows what is held, the profiler sees
what the CPU's gives and takes back.
"""

import gc
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.worlds.matrices import gaussian
from benchmarks.worlds.random_layers import random_layer
from loraq.errors import KernelError
from loraq.kernels import BACKENDS, DEFAULT_BACKEND
from loraq.nn import QuantizedLinear
from loraq.recipe_names import parse_scheme

N_OUT, N_IN = 384, 512
CASES = [
    ("auto", "mxfp4-a8+w8a8-r16"),
    ("auto", "int8-a8+int8-r16"),
    ("reference", "mxfp4-a8+w8a8-r16"),
    ("resident", "int4-a4+w6a6-r16-h32"),
    ("low_memory", "int4-a8+w8a8-r16-s"),
    ("low_memory", "nvfp4-a16+w8a8-r16"),
    ("int8_row", "int4-a8+w8a8-r16"),
    ("int8_row", "int8-a8+int8-r16"),
    ("fp8_row", "mxfp4-amxfp8_e4m3+w8a8-r16"),
    ("triton", "mxfp4-amxfp8_e4m3+mxfp8_e4m3-r16"),
]
#: What a GPU's allocator rounds a tensor up to.
BLOCK = 512
T = TypeVar("T")


def held(make: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """Return what a function makes, and the bytes of tensors that are alive for that."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        made = make()
        gc.collect()
        torch.cuda.synchronize()
        return made, torch.cuda.memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        made = make()
        gc.collect()
    events = found.profiler.kineto_results.events()
    return made, sum(event.nbytes() for event in events if event.name() == "[memory]")


def ran(backend: str, name: str, x: Tensor) -> QuantizedLinear:
    """Return a layer that has run once."""
    layer = random_layer((N_OUT, N_IN), parse_scheme(name), x.device)
    layer.backend = backend
    with torch.no_grad():
        assert layer(x).isfinite().all()
    return layer


def test_no_back_end_is_left_out():
    assert {backend for backend, _ in CASES} == {DEFAULT_BACKEND, *BACKENDS} - {"openvino"}


@pytest.mark.parametrize(("backend", "name"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_after_a_forward_a_layer_holds_what_it_says(backend, name, dtype, device):
    x = gaussian(64, N_IN).to(device, dtype)
    try:
        ran(backend, name, x)  # tables, a library's workspace, kernels that are tried
    except KernelError as refused:
        pytest.skip(str(refused))
    layer, nbytes = held(lambda: ran(backend, name, x), device)
    tensors = [*layer.parameters(), *layer.buffers()]
    said = sum(tensor.nbytes for tensor in tensors) + layer.kept_nbytes
    assert (layer.kept_nbytes > 0) == (backend in ("resident", "int8_row", "fp8_row", "triton"))
    # Each kept tensor may be rounded up, too; there are fewer of them than stored ones.
    rounding = 2 * len(tensors) * BLOCK if device.type == "cuda" else 0
    assert said <= nbytes <= said + rounding
