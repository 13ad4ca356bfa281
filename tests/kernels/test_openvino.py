"""The back end `openvino`, where OpenVINO is installed: `make test-exports` installs it."""

import subprocess
import sys
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from benchmarks.worlds.matrices import dit_like, gaussian, heavy_tailed, outlier_columns
from loraq.errors import KernelError
from loraq.kernels import choose, get_backend, openvino
from loraq.kernels.base import LayerSpec
from loraq.linalg import relative_error
from loraq.nn import QuantizedLinear
from loraq.packed import PackedWeight
from loraq.pipeline.module import quantize_weight
from loraq.recipe_names import parse_scheme

CPU = torch.device("cpu")
N_OUT, N_IN = 96, 320
BACKEND, REFERENCE = get_backend("openvino"), get_backend("reference")
#: Recipe, activations that run, and those of the branch.
RUNS = {
    "int4-a8": ("int8_b64", None),
    "int4-a8+int8-r64": ("int8_b64", ("int8_b64", "int8_b64")),
    "int4-a8+int8-r16": ("int8_b64", ("int8_b64", "bf16")),
    "int4-a8+w8a8-r32": ("int8_b64", ("bf16", "bf16")),
    # Ranks that are filled up: to an even one, and to whole blocks.
    "int4-a8+int8-r61": ("int8_b64", ("int8_b64", "bf16")),
    "int4-a8+int8-r63": ("int8_b64", ("int8_b64", "int8_b64")),
    "int4-a8+w8a16-r62": ("int8_b64", ("bf16", "bf16")),
    "int4-a8+w8a16-r17": ("int8_b64", ("bf16", "bf16")),
    "mxint4-a8+w8a8-r61": ("int8_b32", ("int8_b32", "int8_b32")),
    "mxint4-a8+w8a8-r32": ("int8_b32", ("int8_b32", "int8_b32")),
    "mxint4-a8+w8a8-r16": ("int8_b32", ("int8_b32", "bf16")),
    "int4-a8+int8-r64-h32": ("int8_b64", ("int8_b64", "int8_b64")),
    "int8-a8+int8-r16": ("int8_b64", ("int8_b64", "bf16")),
    "int4_b160-a8": ("int8_b32", None),
}
REFUSED = {
    "mxfp4-a8+w8a8-r32": "rows of 320 in 'mxfp4' are no INT4 or INT8 in blocks of 32",
    "int4_b16-a8": "rows of 320 in 'int4_b16' are no INT4 or",
    "int5-a8": "rows of 320 in 'int5' are no INT4 or INT8",
    "int4-a16": "activations in 'bf16'",
    "int4-a4": "activations in 'int4'",
    "int4-a8+bf16-r16": "its branch is in 'bf16', and 8-bit integers",
    "int4-a8+w4a8-r16": "its branch is in 'mxfp4', and 8-bit integers",
    "mxint4-a8+w8a16-r32": "it would round the branch's activations too",
    "int4_b128-a8": "rows of 320 in 'int4_b128' are no multiple of 128",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

installed = pytest.mark.skipif(
    not openvino.is_installed(), reason="openvino is not installed; `make test-exports` has it"
)
each_run = pytest.mark.parametrize("name", RUNS)


def spec_of(name: str, device: str = "cpu") -> LayerSpec:
    return LayerSpec((parse_scheme(name),), (N_OUT, N_IN), torch.device(device))


@cache
def packed_of(name: str) -> PackedWeight:
    # LoRaQ's own solutions: main part and branch may cancel, the hard case for short sums.
    return quantize_weight(dit_like(N_OUT, N_IN), name, method="loraq").packed


def layer_of(name: str) -> QuantizedLinear:
    layer = QuantizedLinear.from_packed(packed_of(name), gaussian(1, N_OUT, 5)[0])
    layer.backend = "openvino"
    return layer


def run(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


@pytest.mark.parametrize("name", [*RUNS, *REFUSED])
def test_what_it_takes(monkeypatch, name):
    monkeypatch.setattr(openvino, "is_installed", lambda: True)
    if name in RUNS:
        assert choose("openvino", spec_of(name)) is BACKEND
    else:
        with pytest.raises(KernelError, match=REFUSED[name]):
            choose("openvino", spec_of(name))


@each_run
def test_what_runs_in_place_of_the_activations_of_a_scheme(name):
    run, (main, branch) = BACKEND.as_run(parse_scheme(name)), RUNS[name]
    assert run.activation == main
    assert (run.branch and (run.branch.activation, run.branch.intermediate_format.name)) == branch
    assert BACKEND.as_run(run) == run


def test_other_devices_and_a_machine_without_it_are_told(monkeypatch):
    monkeypatch.setattr(openvino, "is_installed", lambda: True)
    with pytest.raises(KernelError, match="known on 'cpu', not on 'cuda'"):
        choose("openvino", spec_of("int4-a8", "cuda"))
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    with pytest.raises(KernelError, match=r'pip install "loraq\[openvino\]"'):
        choose("openvino", spec_of("int4-a8"))
    assert choose("openvino", spec_of("int4-a8"), strict=False).name == "low_memory"


@installed
@each_run
@pytest.mark.parametrize("kind", [heavy_tailed, outlier_columns])
def test_it_keeps_its_bound_which_is_no_loophole(name, kind):
    layer, bias = layer_of(name), gaussian(1, N_OUT, 5)[0]
    for dtype in DTYPES:
        x = kind(24, N_IN).to(dtype)
        y = run(layer, x)
        scheme = layer._prepared.scheme
        turned = layer_of(name)
        turned.ask_backend("reference", strict=True)
        turned.scheme = scheme
        measured = relative_error(run(turned, x).double(), y.double())
        bound = BACKEND.bound(scheme, dtype)
        assert bound / 20 < measured <= bound <= 2e-2, dtype
        assert y.dtype == dtype
        assert bias.shape == (N_OUT,)


@installed
@each_run
@pytest.mark.parametrize("kind", [heavy_tailed, outlier_columns])
def test_it_is_nearer_to_the_layer_without_rounding_than_the_scheme(name, kind):
    layer, x = layer_of(name), kind(40, N_IN)
    exact = x.double() @ layer.reconstruct().double().T + layer.bias.double()
    ours = relative_error(exact, run(layer, x).double())
    layer.backend = "reference"
    assert ours <= relative_error(exact, run(layer, x).double())


@installed
def test_simulated_activations_are_refused_if_they_are_others():
    layer = layer_of("int4-a8+int8-r64")
    layer.ask_activations("stored", simulate=True)
    with pytest.raises(KernelError, match="activations in 'int8' are none of its 'int8_b64'"):
        run(layer, gaussian(2, N_IN))


@installed
def test_bytes_that_were_stored_for_16_bit_activations_run_with_8():
    packed = quantize_weight(dit_like(N_OUT, N_IN), "int4-a16+int8-r16", method="svdquant").packed
    layer = QuantizedLinear.from_packed(packed)
    layer.ask_activations("a8")
    layer.backend = "openvino"
    run(layer, gaussian(2, N_IN))
    assert layer._prepared.scheme.activation == "int8_b64"


@installed
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_tokens_with_a_bias_or_without(dtype):
    layer, x = layer_of("int4-a8+int8-r64"), gaussian(33, N_IN).to(dtype)
    whole = run(layer, x)
    for n in (1, 7, 0, 33, 7):
        assert relative_error(whole[:n].double(), run(layer, x[:n]).double()) < 1e-2 if n else True
        assert run(layer, x[:n]).shape == (n, N_OUT)
    assert torch.equal(run(layer, x.view(3, 11, N_IN)).view(33, N_OUT), whole)
    bias, layer.bias = layer.bias, None
    assert relative_error((whole - bias).double(), run(layer, x).double()) < 2e-2


@installed
def test_a_changed_bias_is_seen_and_another_dtype_prepares_anew():
    layer, x = layer_of("int4-a8"), gaussian(3, N_IN)
    before = run(layer, x)
    with torch.no_grad():
        layer.bias += 1
    assert torch.allclose(run(layer, x), before + 1, atol=1e-5)
    assert run(layer, x.bfloat16()).dtype == torch.bfloat16
    assert torch.allclose(run(layer, x), before + 1, atol=1e-5)


@installed
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_stays_in_its_token(dtype):
    layer, x = layer_of("int4-a8+int8-r64"), gaussian(5, N_IN).to(dtype)
    expected = run(layer, x)
    x[2, 7], x[3, 8] = torch.nan, torch.inf
    y = run(layer, x)
    assert y[2].isnan().all()
    assert not y[3].isfinite().all() or y[3].abs().max() > 1e3
    assert torch.equal(y[[0, 1, 4]], expected[[0, 1, 4]])


@installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_low_memory(dtype):
    gradients = []
    for backend in ("openvino", "low_memory"):
        layer, x = layer_of("int4-a8+int8-r64-h32"), gaussian(24, N_IN).to(dtype).requires_grad_()
        layer.bias = nn.Parameter(layer.bias.to(dtype))
        layer.backend = backend
        (layer(x) * gaussian(24, N_OUT, 3).to(dtype)).sum().backward()
        gradients.append((x.grad, layer.bias.grad))
    for ours, theirs in zip(*gradients, strict=True):
        # In bf16 one rotates the gradient, and the other the weight.
        bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
        both = (torch.atleast_2d(each.double()) for each in (theirs, ours))
        assert relative_error(*both) < bound


@installed
def test_another_device_by_default_changes_nothing():
    layer, x = layer_of("int4-a8+int8-r64"), gaussian(3, N_IN)
    expected = run(layer, x)
    layer.invalidate()
    with torch.device("meta"):
        assert torch.equal(run(layer, x), expected)


@installed
def test_one_graph_under_a_compiler():
    torch.compiler.reset()
    layer, x = layer_of("int4-a8+int8-r64"), gaussian(24, N_IN)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(run(compiled, x), run(layer, x))
    torch.compiler.reset()


@installed
def test_threads_share_a_layer():
    from concurrent.futures import ThreadPoolExecutor

    layer = layer_of("int4-a8+int8-r64")
    inputs = [gaussian(8 + i % 2, N_IN, i) for i in range(8)]
    wanted = [run(layer, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: run(layer, x), inputs))
    assert all(map(torch.equal, found, wanted))


@installed
def test_what_it_keeps_is_a_copy_and_no_more():
    """Anonymous memory of 8 layers of a million weights after a forward, in a process of its own.

    A graph itself takes about a megabyte.
    """
    program = """
import ctypes, gc, torch
from benchmarks.worlds.random_layers import random_layer
from loraq.recipe_names import parse_scheme
def used():
    gc.collect(); ctypes.CDLL(None).malloc_trim(0)
    rows = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * int(rows["RssAnon"].split()[0])
def make():
    return random_layer((1024, 2048), parse_scheme("int4-a8+int8-r64"), torch.device("cpu"))
x = torch.ones(512, 2048, dtype=torch.bfloat16)
def run(layer):
    layer.backend = "openvino"
    with torch.no_grad(): layer(x)
run(make())
layers = [make() for _ in range(8)]
before = used()
for layer in layers: run(layer)
print((used() - before) / 8, layers[0].kept_nbytes, layers[0].nbytes)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, kept, packed = map(float, done.stdout.split())
    assert packed <= kept <= 1.1 * packed
    assert kept / 2 < grown < kept + 3 * 2**20
