"""Every back end under `torch.compile`, one graph that is not
made anew needlessly; and in a CUDA graph.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, library, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from benchmarks.worlds.matrices import gaussian
from benchmarks.worlds.random_layers import random_layer
from loraq.errors import KernelError
from loraq.kernels import BACKENDS, DEFAULT_BACKEND, int8_row
from loraq.nn import QuantizedLinear
from loraq.recipe_names import parse_scheme

#: Back end and recipe; `triton` is compiled in `interpret_triton.py`, `openvino` in its own tests.
CASES = [
    ("auto", "mxfp4-a8+w8a8-r16"),
    ("auto", "int8-a8+int8-r16"),
    ("reference", "mxfp4-a8+w8a8-r16"),
    ("resident", "mxfp4-a4+w8a8-r16"),
    ("resident", "mxfp4-a16+w8a8-r16"),
    ("low_memory", "mxfp4-a8+w8a8-r16"),
    ("low_memory", "nvfp4-a16+w8a8-r16"),
    ("int8_row", "int8-a8+int8-r16"),
    ("int8_row", "int4-a8+w8a8-r16"),
    ("fp8_row", "mxfp4-amxfp8_e4m3+w8a8-r16"),
    ("fp8_row", "fp8_e4m3-a8"),
]
ON_GPU = [*CASES, ("triton", "mxfp4-amxfp8_e4m3+mxfp8_e4m3-r16"), ("triton", "mxfp4-a16+w8a8-r16")]
WIDTH = 128

each_case = pytest.mark.parametrize(("backend", "name"), CASES)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def layer_of(
    backend: str, name: str, device: str = "cpu", *, n_out: int = WIDTH
) -> QuantizedLinear:
    layer = random_layer((n_out, WIDTH), parse_scheme(name), torch.device(device))
    layer.backend = backend
    return layer


def counted() -> CompileCounterWithBackend:
    """Compiles without a C++ compiler, as training would, and counts how often."""
    return CompileCounterWithBackend("aot_eager")


def test_no_back_end_is_left_out():
    assert {backend for backend, _ in ON_GPU} == {DEFAULT_BACKEND, *BACKENDS} - {"openvino"}


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_graphs_do_for_any_number_of_tokens(backend, name, dtype):
    layer, counter = layer_of(backend, name), counted()
    layer.prepare(dtype)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    counts = []
    with torch.no_grad():
        for n_tokens in (24, 24, 7, 160, 33):
            x = gaussian(n_tokens, WIDTH).to(dtype)
            assert torch.equal(compiled(x), layer(x))
            counts.append(counter.frame_count)
    assert counts == [1, 1, 2, 2, 2]  # the second is for sizes that are not known beforehand


@each_case
def test_one_graph_does_if_it_is_told_that_sizes_vary(backend, name):
    layer, counter = layer_of(backend, name), counted()
    layer.prepare(torch.float32)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    with torch.no_grad():
        for n_tokens in (24, 7, 160):
            x = gaussian(n_tokens, WIDTH)
            assert torch.equal(compiled(x), layer(x))
            counts.append(counter.frame_count)
    assert counts == [1, 1, 1]


@each_case
def test_a_layer_prepares_itself_outside_of_the_one_graph(backend, name):
    layer, counter = layer_of(backend, name), counted()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = gaussian(24, WIDTH)
    with torch.no_grad():
        outputs = [compiled(x) for _ in range(3)]
    assert all(torch.equal(y, layer(x)) for y in outputs)
    assert counter.frame_count == 1


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_layer_that_is_not_compiled(backend, name, dtype):
    n_out = WIDTH // 2  # not square: a shape that is the wrong way round must not pass
    layer = layer_of(backend, name, n_out=n_out)
    compiled = torch.compile(layer, backend=counted(), fullgraph=True)
    layer.bias = nn.Parameter(gaussian(1, n_out, 3)[0].to(dtype))
    gradients = []
    for run in (compiled, layer):
        x = gaussian(24, WIDTH).to(dtype).requires_grad_()
        layer.bias.grad = None
        run(x).square().sum().backward()
        gradients.append((x.grad, layer.bias.grad))
    (x_grad, bias_grad), (expected_x, expected_bias) = gradients
    assert torch.equal(x_grad, expected_x)
    assert torch.equal(bias_grad, expected_bias)


@each_case
def test_autocast_inside_and_around_a_graph_is_that_of_the_layer_that_is_not_compiled(
    backend, name
):
    layer, x = layer_of(backend, name), gaussian(24, WIDTH)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    compiled = torch.compile(layer, backend=counted(), fullgraph=True)
    compiled_inside = torch.compile(inside, backend=counted(), fullgraph=True)
    with torch.no_grad():
        expected = layer(x.bfloat16())
        assert torch.equal(compiled_inside(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x), layer(x))


def test_int8_row_without_packed_operands_is_one_graph_too(monkeypatch):
    monkeypatch.setattr(int8_row, "can_pack", lambda device: False)
    layer, counter = layer_of("int8_row", "int8-a8+int8-r16"), counted()
    layer.prepare(torch.float32)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with torch.no_grad():
        x = gaussian(24, WIDTH)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


class Block(nn.Module):
    """Two layers around what is not linear."""

    def __init__(self, backend: str, name: str) -> None:
        super().__init__()
        self.first, self.second = layer_of(backend, name), layer_of(backend, name)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


@each_case
def test_blocks_that_are_compiled_one_by_one_share_one_graph(backend, name):
    blocks, counter = [Block(backend, name) for _ in range(3)], counted()
    x = gaussian(24, WIDTH)
    with torch.no_grad():
        expected = [block(x) for block in blocks]
        for block in blocks:
            block.compile(backend=counter, fullgraph=True)
        assert all(torch.equal(block(x), y) for block, y in zip(blocks, expected, strict=True))
    assert counter.frame_count == 1


# --- CUDA graphs ----------------------------------------------------------------------------------


#: What no CUDA graph can hold: values that Python reads, and tensors that it makes of its own data.
FORBIDDEN = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::lift_fresh",
}


def forbidden(run: Callable[[], object]) -> set[str]:
    """Operators that a CUDA graph cannot hold, those inside our own operators included."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    return FORBIDDEN & {event.key for event in found.key_averages()}


@library.custom_op("loraq_test::opaque", mutates_args=())
def opaque(x: Tensor, reads: bool) -> Tensor:
    return x * x.sum().item() if reads else x * torch.tensor([2.0])


def test_the_profiler_sees_into_opaque_operators():
    assert forbidden(lambda: opaque(torch.ones(2), True)) == {
        "aten::item",
        "aten::_local_scalar_dense",
    }
    assert forbidden(lambda: opaque(torch.ones(2), False)) == {"aten::lift_fresh"}


@each_case
def test_a_forward_reads_no_value_back_and_makes_no_tensor_of_python_data(backend, name):
    layer, x = layer_of(backend, name), gaussian(24, WIDTH)
    with torch.no_grad():
        layer(x)  # operands and tables are made once
        assert not forbidden(lambda: layer(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(("backend", "name"), ON_GPU)
@pytest.mark.parametrize("n_tokens", [8, 64])
def test_a_cuda_graph_replays_a_layer_on_new_inputs(backend, name, n_tokens):
    try:
        layer = layer_of(backend, name, "cuda")
    except KernelError as refused:
        pytest.skip(str(refused))
    x = gaussian(n_tokens, WIDTH).bfloat16().cuda()
    other = (-2 * gaussian(n_tokens, WIDTH, 7)).bfloat16().cuda()
    with torch.no_grad():
        expected = layer(other)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                layer(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(other)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.isfinite(y).all()
    # Under capture a library may pick another kernel, whose sums are rounded in another order.
    assert (y.double() - expected.double()).norm() <= BACKENDS[backend].bound(
        layer.scheme, x.dtype
    ) * expected.norm()
