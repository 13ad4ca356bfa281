"""Every back end and every layer keeps its tensors where its bytes are.

There need be no GPU: tensors are fake ones on a fake CUDA device, where an operator raises for
tensors of two devices; `tests/methods/test_fake_cuda.py` does the same for solvers. Operators that
are opaque to compilers are opened, so that their insides are looked at; kernels of Triton look at
what they are launched with, and compute nothing.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import loraq
from benchmarks.worlds.random_layers import random_layer
from loraq.appended import BranchStack, Part, append, branch_for, remove
from loraq.experts import QuantizedExperts
from loraq.kernels import BACKENDS, int8_row, low_memory
from loraq.kernels.int8_matrix import rows_of
from loraq.kernels.triton import fused
from loraq.nn import QuantizedConv1x1, QuantizedLinear
from loraq.packed import PackedStack, PackedWeight
from loraq.recipe_names import parse_scheme
from loraq.scheme import Branch
from tests.fake_cuda import CUDA, fake_cuda

N_OUT, N_IN = 64, 128
CASES = [
    ("auto", "mxfp4-a8+w8a8-r16"),
    ("auto", "int4-a4+w6a6-r16-h32"),
    ("auto", "int5-a8"),
    ("reference", "mxfp4-a4+w8a8-r16"),
    ("resident", "nvfp4-a4+w8a8-r16"),
    ("resident", "mxint4-a4-h16"),
    ("low_memory", "nvfp4-a16+w8a8-r16"),
    ("int8_row", "int8-a8+int8-r16"),
    ("int8_row", "int4-a8+w8a8-r16"),
    ("fp8_row", "mxfp4-amxfp8_e4m3+w8a8-r16"),
    ("fp8_row", "fp8_e4m3-a8"),
    ("triton", "mxfp4-amxfp8_e4m3+mxfp8_e4m3-r16"),
    ("triton", "nvfp4-a16+w8a8-r16"),
    ("auto", "int4-a8+w8a8-r16-s"),
    ("resident", "int4-a4+w6a6-r16-s-h32"),
    ("int8_row", "int8-a8+int8-r16-s"),
]


def of_loraq() -> Iterator[Any]:
    return (module for name, module in list(sys.modules.items()) if name.split(".")[0] == "loraq")


def forget() -> None:
    """No fake tensor may stay in a table that real layers read, and none of theirs here."""
    for module in of_loraq():
        for value in list(vars(module).values()):
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()


def same(a: Tensor, b: Tensor) -> bool:
    assert a.device == b.device
    return True


class Answers(TorchFunctionMode):
    """What a host reads as `int(x)` and `torch.equal`, made up."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        answers = {Tensor.__int__: lambda x: int(x.item()), torch.equal: same}
        return answers.get(function, function)(*args, **(kwargs or {}))


@contextmanager
def fake() -> Iterator[None]:
    with fake_cuda(), Answers(), torch.no_grad():
        yield


class Launch:
    """A kernel of Triton that looks at the tensors it is launched with."""

    n_launched = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size > 0 for size in grid)

        def launch(*given: Any, **constants: Any) -> None:
            tensors = [value for value in given if isinstance(value, Tensor)]
            assert tensors
            assert {tensor.device for tensor in tensors} == {CUDA}
            assert all(tensor.is_contiguous() for tensor in tensors)
            Launch.n_launched += 1

        return launch


class Traffic(TorchDispatchMode):
    """Counts copies between the host and the device, which no CUDA graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, Tensor)]
        tensors += [result] if isinstance(result, Tensor) else []
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.seen.append(str(function))
        return result


@pytest.fixture(autouse=True)
def opened(monkeypatch) -> Iterator[None]:
    for module in of_loraq():
        for name, value in list(vars(module).items()):
            if isinstance(value, CustomOpDef):
                monkeypatch.setattr(module, name, value._init_fn)
    if find_spec("triton") is not None:
        from loraq.kernels.triton import decode, gemm_up, quant_down, small_m

        for module in (decode, gemm_up, quant_down, small_m):
            name = f"{module.__name__.rpartition('.')[2]}_kernel"
            monkeypatch.setattr(module, name, Launch())
    monkeypatch.setattr(fused, "_is_right", lambda *trial: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: id(self))
    monkeypatch.setattr(int8_row, "rows_of", lambda stored: (rows_of(stored)[0], 0.0))
    # Decoded at once: inside of the subclass of tensors no mode sees an index.
    monkeypatch.setattr("loraq.nn.DenseWeight", lambda decode, *about: decode())
    forget()
    yield
    forget()


@pytest.fixture(params=[True, False], ids=["kernels", "no kernels"])
def with_triton(request, monkeypatch) -> bool:
    if not request.param:
        monkeypatch.setattr(fused, "absence", lambda device: "not here")
    elif find_spec("triton") is None:
        pytest.skip('Triton is missing: pip install "loraq[triton]"')
    return request.param


def packed_of(name: str) -> PackedWeight:
    return random_layer((N_OUT, N_IN), parse_scheme(name), torch.device("cpu")).packed


@contextmanager
def on_device(packed: PackedWeight) -> Iterator[PackedWeight]:
    """Let a fake CUDA device have the bytes of a real weight."""
    with fake():
        there = {
            name: torch.empty(tensor.shape, dtype=torch.uint8, device=CUDA)
            for name, tensor in packed.tensors.items()
        }
        yield PackedWeight.from_tensors(there, packed.scheme, packed.shape)


def layer_of(packed: PackedWeight, backend: str = "auto") -> QuantizedLinear:
    layer = QuantizedLinear.from_packed(packed, torch.empty(N_OUT, device=CUDA))
    layer.ask_backend(backend, strict=backend != "auto")
    return layer


def test_no_back_end_is_left_out():
    assert {backend for backend, _ in CASES} == {"auto", *BACKENDS} - {"openvino"}  # for CPUs


@pytest.mark.parametrize(("backend", "name"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_layer_runs_where_its_bytes_are_and_a_second_call_talks_to_no_host(
    backend, name, dtype, with_triton
):
    if backend == "triton" and not with_triton:
        pytest.skip("it is Triton's")
    packed = packed_of(name)
    for n_tokens in (3, 200):
        for simulate in (False, True):
            with on_device(packed) as there:
                layer = layer_of(there, backend)
                layer.ask_activations("stored", simulate=simulate)
                x = torch.empty(2, n_tokens, N_IN, dtype=dtype, device=CUDA)
                assert layer(x).device == CUDA
                with Traffic() as traffic:
                    y = layer(x)
                assert (y.device, y.dtype, y.shape) == (CUDA, dtype, (2, n_tokens, N_OUT))
                assert traffic.seen == []
            forget()


def test_the_kernels_were_launched(with_triton):
    packed, Launch.n_launched = packed_of("int4-a4+w6a6-r16-h32"), 0
    with on_device(packed) as there:
        layer_of(there)(torch.empty(200, N_IN, dtype=torch.bfloat16, device=CUDA))
    assert Launch.n_launched == (3 if with_triton else 0)


@pytest.mark.parametrize("name", ["int4-a4+w6a6-r16-h32", "nvfp4-a16+bf16-r16", "mxfp6_e2m3-a16"])
def test_a_gradient_is_made_on_the_device(name, with_triton):
    packed = packed_of(name)
    text = low_memory.write_scheme(packed.scheme, packed.scheme.rotation)
    with on_device(packed) as there:
        gradient = torch.empty(24, N_OUT, device=CUDA)
        tensors = list(there.tensors.values())
        back = low_memory._packed_linear_back(gradient, tensors, text, N_IN, torch.float32)
        assert back.device == CUDA


@pytest.mark.parametrize("precision", ["a16", "a8", "a4"])
def test_another_precision_runs_on_the_device(precision):
    packed = packed_of("mxfp4-a4+w8a8-r16")
    with on_device(packed) as there:
        model = nn.Sequential(layer_of(there))
        loraq.set_activations(model, precision)
        x = torch.empty(24, N_IN, dtype=torch.bfloat16, device=CUDA)
        assert model(x).device == CUDA


@pytest.mark.parametrize(
    "name", ["int4-a4+w6a6-r16-h32", "nvfp4-a16+bf16-r16", "int5-a8", "int4-a8+w8a8-r16-s"]
)
def test_what_is_decoded_stays_on_the_device(name):
    packed = packed_of(name)
    with on_device(packed) as there:
        layer = layer_of(there)
        assert layer.reconstruct().device == CUDA
        assert (layer.weight + torch.empty(N_OUT, N_IN, device=CUDA)).device == CUDA
        assert layer.dequantize().weight.device == CUDA


def test_a_convolution_runs_on_the_device():
    packed = packed_of("mxfp4-a8+w8a8-r16")
    with on_device(packed) as there:
        layer = QuantizedConv1x1.from_packed(there)
        assert layer(torch.empty(2, N_IN, 4, 4, device=CUDA)).device == CUDA


def test_experts_run_on_the_device():
    packed = packed_of("mxfp4-a8+w8a8-r16")
    with fake():
        there = {
            name: torch.empty((3, *tensor.shape), dtype=torch.uint8, device=CUDA)
            for name, tensor in packed.tensors.items()
        }
        stack = PackedStack.from_tensors(there, packed.scheme, (3, N_OUT, N_IN))
        for transposed in (False, True):
            layer = QuantizedExperts.from_stack(stack, transposed=transposed, dtype=torch.bfloat16)
            x = torch.empty(24, N_IN, dtype=torch.bfloat16, device=CUDA)
            assert layer(x, 1).device == CUDA
            assert layer.dequantize().device == CUDA


@pytest.mark.parametrize("name", ["mxfp4-a8+w8a8-r16", "int4-a4+w6a6-r16-h32", "nvfp4-a8"])
def test_a_lora_is_appended_and_removed_on_the_device(name):
    packed = packed_of(name)
    with on_device(packed) as there:
        stack = BranchStack.of({}, there.scheme)
        branch = branch_for(there.scheme, (), Branch(0, "mxint8", "mxint8", "int8"))
        factors = torch.empty(N_OUT, 4, device=CUDA), torch.empty(4, N_IN, device=CUDA)
        part = Part("one", "0" * 64, 1.0, 0, 4)
        result, new, _ = append(there, stack, part, branch, factors)
        assert {tensor.device for tensor in result.tensors.values()} == {CUDA}
        left, _ = remove(result, new, "one")
        assert {tensor.device for tensor in left.tensors.values()} == {CUDA}


def test_a_tensor_of_the_host_is_found(monkeypatch):
    original = low_memory._table.__wrapped__
    monkeypatch.setattr(
        low_memory, "_table", lambda name, work, device: original(name, work, torch.device("cpu"))
    )
    monkeypatch.setattr(fused, "absence", lambda device: "not here")
    packed = packed_of("mxfp4-a16")
    with on_device(packed) as there, pytest.raises(RuntimeError, match="device"):
        layer_of(there)(torch.empty(3, N_IN, device=CUDA))
