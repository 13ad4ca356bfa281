"""Packed stays packed, and no activation is rounded where nothing is gained by it."""

import gc
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.speed.memory import peak_bytes
from benchmarks.worlds.matrices import dit_like, heavy_tailed, outlier_columns
from loraq.formats import FORMATS, BlockFormat, get_format
from loraq.kernels import BACKENDS, dispatch, low_memory
from loraq.kernels.int8_matrix import saturates
from loraq.kernels.low_memory import LowMemory
from loraq.layers import set_backend
from loraq.linalg import relative_error
from loraq.nn import QuantizedLinear
from loraq.packed import PackedWeight
from loraq.pipeline.module import quantize_weight
from loraq.recipe import Recipe
from loraq.recipe_names import SHOWCASE, parse_scheme

N_OUT, N_IN = 96, 256
NAMES = ["mxfp4-a8+w8a8-r16", "mxfp4-a4+w8a8-r16", "int4-a4+w6a6-r16-h32", "nvfp4-a4", "int5-a8"]


def layer_of(
    name: str, backend: str = "auto", n_out: int = N_OUT, n_in: int = N_IN
) -> QuantizedLinear:
    method = "svdquant" if "+" in name else "rtn"
    solved = quantize_weight(dit_like(n_out, n_in), name, method=method)
    layer = QuantizedLinear.from_packed(solved.packed, dit_like(1, n_out, 3)[0])
    layer.backend = backend
    return layer


def back_and_forth() -> nn.Sequential:
    """Two layers, of which the second undoes the shape of the first."""
    name = "mxfp4-a8+w8a8-r16"
    return nn.Sequential(layer_of(name), layer_of(name, n_out=N_IN, n_in=N_OUT))


def exact(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """The layer without any rounding of activations."""
    return x.double() @ layer.reconstruct().double().T + layer.bias.double()


@pytest.mark.parametrize("recipe", SHOWCASE)
@pytest.mark.parametrize("kind", [heavy_tailed, outlier_columns], ids=lambda kind: kind.__name__)
def test_the_automatic_choice_is_never_further_from_the_exact_layer_than_the_scheme(recipe, kind):
    layer, x = layer_of(recipe), kind(40, N_IN)
    with torch.no_grad():
        distance = relative_error(exact(layer, x), layer(x))
        layer.backend = "reference"
        simulated = relative_error(exact(layer, x), layer(x))
    assert distance <= simulated + 1e-6
    if not layer.scheme.is_weight_only:
        assert simulated > 1e-4  # so that the comparison means something


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["resident", "low_memory"])
@pytest.mark.parametrize("n_tokens", [1, 3, 200], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_activations_keep_the_bound(name, backend, n_tokens, dtype):
    layer, x = layer_of(name, backend), heavy_tailed(n_tokens, N_IN).to(dtype)
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == dtype
    bound = max(BACKENDS[backend].bound(layer.scheme, dtype), torch.finfo(dtype).eps)
    assert relative_error(exact(layer, x), y) <= bound
    assert layer._prepared.scheme.is_weight_only
    assert layer._prepared.scheme.rotation == 0


@pytest.mark.parametrize("name", NAMES)
def test_simulated_activations_are_those_of_the_scheme(name):
    layer, x = layer_of(name), heavy_tailed(20, N_IN)
    with torch.no_grad():
        plain = layer(x)
        layer.ask_activations("stored", simulate=True)
        simulated = layer(x)
        layer.backend = "reference"
        reference = layer(x)
    assert relative_error(reference, simulated) <= LowMemory().bound(layer.scheme, torch.float32)
    assert relative_error(reference, plain) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_decoded_weight(name):
    layer, x = layer_of(name), heavy_tailed(12, N_IN).view(4, 3, N_IN)
    layer.bias.requires_grad_(True)
    x.requires_grad_(True)
    towards = heavy_tailed(12, N_OUT).view(4, 3, N_OUT)
    layer(x).backward(towards)
    torch.testing.assert_close(x.grad, towards @ layer.reconstruct(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, towards.sum((0, 1)), rtol=1e-4, atol=1e-5)


class Watch:
    """Counts the bytes that autograd keeps of layers."""

    def __init__(self) -> None:
        self.nbytes, self.seen = 0, set[int]()

    def __call__(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self.seen:
            self.seen.add(address)
            self.nbytes += tensor.untyped_storage().nbytes()
        return tensor


def test_a_training_step_keeps_packed_bytes_and_no_decoded_weight():
    model = back_and_forth()
    packed = sum(layer.nbytes for layer in model)
    watch = Watch()
    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        model(heavy_tailed(4, N_IN).requires_grad_(True))
    assert 0 < watch.nbytes <= packed + 4 * 4 * (N_IN + N_OUT)


@pytest.fixture
def only_new_objects():
    """Let the collector forget all that is there, hundreds of thousands of objects."""
    gc.freeze()
    yield
    gc.unfreeze()


def tensors_in_memory() -> dict[int, int]:
    """Bytes of every storage that a new tensor of Python holds, by its address."""
    gc.collect()
    # Of these types alone: others are stand-ins of a compiler, without memory. `isinstance` would
    # ask the objects, some of which import what they stand for.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    real = [t for t in tensors if not t.is_mkldnn and t.device.type == "cpu" and not t.is_sparse]
    storages = [tensor.untyped_storage() for tensor in real]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("backend", ["auto", "reference", "resident", "low_memory", "fp8_row"])
@pytest.mark.parametrize("name", ["mxfp4-amxfp8_e4m3+w8a8-r16", "fp8_e4m3-a8"])
def test_what_a_forward_leaves_in_memory_is_what_the_layer_says(name, backend):
    model, x = nn.Sequential(layer_of(name)), heavy_tailed(64, N_IN).bfloat16()
    set_backend(model, backend)
    with torch.no_grad():
        layer_of(name, backend)(x)  # tables of codes are there then, which all layers share
        before = tensors_in_memory()
        model(x)
        after = tensors_in_memory()
    found = sum(size for address, size in after.items() if address not in before)
    kept = sum(layer.kept_nbytes for layer in model)
    assert found == kept
    if backend in ("auto", "low_memory", "reference"):
        assert kept == 0
    if backend == "resident":
        assert kept == 2 * N_OUT * N_IN


def test_layers_share_the_memory_of_one_decoded_weight():
    model = back_and_forth()
    set_backend(model, "low_memory")
    x = heavy_tailed(64, N_IN)
    expected = exact(model[1], exact(model[0], x))
    low_memory._shared.kept.clear()
    with torch.inference_mode():
        first = model(x)
    model(heavy_tailed(64, N_IN).requires_grad_(True)).sum().backward()
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(model, [x] * 16))
    for y in (first, *others):
        assert relative_error(expected, y.double()) < 1e-6
    assert {dtype: kept.nbytes for dtype, kept in low_memory._shared.kept.items()} == {
        torch.float32: 4 * N_OUT * N_IN
    }


BLOCKS = [name for name, fmt in FORMATS.items() if isinstance(fmt, BlockFormat)]


@pytest.mark.parametrize("n_tokens", [8, 1024])
@pytest.mark.parametrize(
    "recipe",
    dict.fromkeys(
        [*(f"{name}-a16" for name in BLOCKS), *(f"{name}-a16-h32" for name in BLOCKS), *SHOWCASE]
    ),
)
def test_the_automatic_choice_takes_half_a_decoded_weight_beside_one(recipe, n_tokens, monkeypatch):
    # As on a large machine, whose many threads have more to do at a time.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    layer, taken = run_automatically(recipe, n_tokens)
    assert layer.backend == "low_memory"
    assert layer.kept_nbytes == 0
    assert taken <= 1.5


@pytest.mark.skipif(saturates(torch.device("cpu")), reason="int8_row refuses this CPU")
@pytest.mark.parametrize("n_tokens", [8, 1024, 16384])
def test_integer_activations_of_many_tokens_take_no_more(n_tokens):
    layer, taken = run_automatically("int8-a8", n_tokens)
    assert layer.backend == "int8_row"
    assert layer.kept_nbytes == 0
    assert taken <= 1.5


def run_automatically(recipe: str, n_tokens: int) -> tuple[QuantizedLinear, float]:
    """Return a layer and what a call takes beside its output, in decoded bf16 weights."""
    shape = (1152, 1152)
    scheme = Recipe.named(recipe).scheme_for("layer", shape)
    zeros = {
        name: torch.zeros(stored, dtype=torch.uint8)
        for name, stored in scheme.storage(shape).items()
    }
    layer = QuantizedLinear.from_packed(PackedWeight.from_tensors(zeros, scheme, shape))
    x = torch.zeros(n_tokens, shape[1], dtype=torch.bfloat16)
    with torch.no_grad():
        y = layer(x)  # tables of codes are there then, which all layers share
        low_memory._shared.kept.clear()
        peak = peak_bytes(lambda: layer(x))
    return layer, (peak - y.nbytes) / (2 * shape[0] * shape[1])


@pytest.mark.parametrize("n_in", [30, 31, 32, 36, 62, 64])
@pytest.mark.parametrize("name", ["mxfp4", "int4", "nvfp4", "int4_b256"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_table_decodes_rows_of_any_length(name, n_in, dtype):
    q = get_format(name).quantize(heavy_tailed(5, n_in))
    out = torch.full((5, n_in), torch.nan, dtype=dtype)
    assert torch.equal(low_memory._look_up(q, out), q.dequantize().to(dtype))
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), q.packed.flatten()])[
        1:
    ]  # an odd address
    moved = replace(q, packed=shifted.view(q.packed.shape))
    assert torch.equal(low_memory._look_up(moved, out), q.dequantize().to(dtype))


def test_it_is_said_once_that_activations_run_in_16_bits(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())
    layers = [layer_of("mxfp4-a8+w8a8-r16"), layer_of("mxint4-a8"), layer_of("mxfp4-a16")]
    with caplog.at_level(logging.WARNING, logger="loraq.kernels"), torch.no_grad():
        for layer in layers:
            for dtype in (torch.float32, torch.bfloat16):
                layer(heavy_tailed(2, N_IN).to(dtype))
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "Activations in 'mxint8' gain nothing on cpu, so layers run with 16-bit activations there"
    )
    caplog.clear()
    layers[0].ask_activations("stored", simulate=True)
    layers[0](heavy_tailed(2, N_IN))
    assert not caplog.records


def test_an_activation_that_the_device_multiplies_is_rounded_as_stored():
    layer, x = layer_of("int8-a8"), heavy_tailed(5, N_IN)
    if layer.backend != "int8_row":
        pytest.skip("int8_row refuses this CPU")
    layer(x)
    assert layer._prepared.scheme == parse_scheme("int8-a8")
    layer.ask_activations("a16")
    assert layer.backend == "low_memory"
    assert relative_error(exact(layer, x), layer(x)) < 1e-5
