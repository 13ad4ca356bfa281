"""Every back end against the reference, within the bound that it states."""

import inspect
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.worlds.matrices import dit_like, heavy_tailed, outlier_columns
from loraq.errors import KernelError
from loraq.formats import FORMATS, get_format
from loraq.kernels import BACKENDS, DEFAULT_BACKEND, choose, get_backend
from loraq.kernels.base import Backend, LayerSpec, decode
from loraq.kernels.low_memory import decode_by_table
from loraq.kernels.reference import Reference
from loraq.nn import QuantizedLinear
from loraq.packed import LayerSolution, PackedWeight
from loraq.pipeline.module import quantize_weight
from loraq.recipe_names import parse_scheme
from loraq.scheme import Scheme

N_OUT, N_IN = 96, 240
MAINS = ("mxfp4", "int4", "nvfp4", "mxint4", "int5", "mxfp8_e5m2")
BRANCHES = ("", "+bf16-r16", "+w8a8-r16", "+w6a6-r16", "+w4a8-r16")
SCHEMES = [
    main + width + branch
    for main in MAINS
    for branch in BRANCHES
    for width in ("-a4", "-a8", "-a16")
]
#: Names that bring INT8 tokens to the same kinds of weights and branches.
SCHEMES += [
    f"{main}-a8{branch}" for main in ("int8", "int4") for branch in ("+int8-r16", "+bf16-r16")
]
SCHEMES += ["mxfp4-amxfp8_e4m3+w8a8-r16", "mxint4-amxfp8_e5m2+w6a6-r16", "fp8_e4m3-a8"]
SCHEMES += ["mxfp4-aint8+int8-r16", "mxint4-aint8", "nvfp4-aint8+w8a8-r16"]
#: Quantized factors beside activations in 16 bits, while those of the main path are rounded.
SCHEMES += ["int4-a8+w8a16-r16", "int8-a8+w4a16-r16", "mxfp4-amxfp8_e4m3+w8a16-r16"]
#: `triton` and `openvino` have tests of their own: they need what may not be there.
APART = ("triton", "openvino")
OTHERS = [backend for backend in BACKENDS.values() if backend.name not in ("reference", *APART)]

each_other = pytest.mark.parametrize("backend", OTHERS, ids=lambda backend: backend.name)


@cache
def solution_of(main_and_branch: str) -> LayerSolution:
    # LoRaQ's own solutions: their main part and branch may cancel, which is the hard case for short
    # sums.
    return quantize_weight(dit_like(N_OUT, N_IN), main_and_branch, method="loraq")


def layer_of(name: str) -> QuantizedLinear:
    main, plus, branch = name.partition("+")
    solved = solution_of(
        main.split("-a")[0] + ("-aint8" if "int8" in name else "-a4") + plus + branch
    )
    layer = QuantizedLinear.from_packed(
        replace(solved.packed, scheme=parse_scheme(name)), dit_like(1, N_OUT, 3)[0]
    )
    layer.ask_activations("stored", simulate=True)
    return layer


def error(y: Tensor, expected: Tensor) -> float:
    return (
        torch.linalg.vector_norm(y.double() - expected)
        / torch.linalg.vector_norm(expected.double())
    ).item()


def run(layer: QuantizedLinear, name: str, x: Tensor) -> Tensor:
    layer.backend = name
    with torch.no_grad():
        return layer(x)


#: Formats whose values are e4m3 numbers under a power of two: at most 4 significant bits.
FIT_E4M3 = {"mxfp4", "mxint4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "fp8_e4m3"}


def should_run(backend: str, scheme: Scheme) -> bool:
    """The table of what each back end takes on a CPU, written out here once more."""
    if backend == "int8_row":
        return scheme.activation == "int8"
    if backend == "fp8_row":
        return {scheme.weight, scheme.activation} <= FIT_E4M3
    return backend not in APART


#: `low_memory` gives the bits of `resident`, as a test of its own shows; E5M2's range is refused
#: when it is seen.
RUNS = [
    (backend, name)
    for backend in OTHERS
    for name in SCHEMES
    if should_run(backend.name, parse_scheme(name))
    and not (backend.name == "low_memory" and "-a4" not in name)
    and not (backend.name == "fp8_row" and name.startswith("mxfp8_e5m2"))
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def test_every_back_end_takes_just_the_schemes_of_the_table(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    every = [*SCHEMES, *(f"{main}-a{activation}" for main in FORMATS for activation in FORMATS)]
    schemes = [parse_scheme(name) for name in every if get_format(name.split("-")[0]).bits <= 8]
    wrong = [
        (backend.name, scheme)
        for backend in BACKENDS.values()
        if backend.name != "openvino"
        for scheme in schemes
        if should_run(backend.name, scheme)
        != (backend.refusal(scheme, (N_OUT, N_IN), torch.device("cpu")) is None)
    ]
    assert not wrong
    assert {backend.name for backend, _ in RUNS} == {backend.name for backend in OTHERS}


@pytest.mark.parametrize(("backend", "name"), RUNS, ids=lambda value: getattr(value, "name", value))
def test_a_back_end_keeps_its_bound_which_is_no_loophole(backend, name):
    layer, broken = layer_of(name), []
    for dtype in DTYPES:
        bound = backend.bound(layer.scheme, dtype)
        assert 0 < bound <= 4e-2
        for kind in (heavy_tailed, outlier_columns):
            x = kind(24, N_IN).to(dtype)
            y, expected = run(layer, backend.name, x), run(layer, "reference", x)
            assert y.dtype == expected.dtype == dtype
            if (measured := error(y, expected.double())) > bound:
                broken.append((dtype, kind.__name__, measured, bound))
    assert not broken
    bounds = [backend.bound(layer.scheme, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert bounds == sorted(bounds)


def test_values_that_a_back_end_cannot_keep_are_refused_when_they_are_seen():
    with pytest.raises(
        KernelError, match=r"rows of the weight in 'mxfp8_e5m2' do not fit e4m3 exactly"
    ):
        run(layer_of("mxfp8_e5m2-a4"), "fp8_row", heavy_tailed(2, N_IN))


SCHEME_OF = {"fp8_row": "mxfp4-a4+w8a8-r16", "int8_row": "int4-a8+int8-r16"}


@each_other
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_bound_holds_for_inputs_of_any_size(backend, scale):
    layer = layer_of(SCHEME_OF.get(backend.name, "mxfp4-a4+w8a8-r16"))
    for dtype in (torch.float32, torch.bfloat16):
        x = (scale * heavy_tailed(24, N_IN)).to(dtype)
        y, expected = run(layer, backend.name, x), run(layer, "reference", x)
        assert error(y, expected.double()) <= backend.bound(layer.scheme, dtype)


@each_other
def test_the_stated_bound_is_needed_and_not_idle(backend):
    layer = layer_of(SCHEME_OF.get(backend.name, "mxfp4-a4+w8a8-r16"))
    x = heavy_tailed(24, N_IN).bfloat16()
    measured = error(run(layer, backend.name, x), run(layer, "reference", x).double())
    assert measured > backend.bound(layer.scheme, torch.bfloat16) / 20


def test_the_reference_is_exact_and_takes_every_layer():
    reference = get_backend("reference")
    assert isinstance(reference, Reference)
    assert all(reference.bound(parse_scheme(name), torch.float32) == 0 for name in SCHEMES)


def test_only_a_back_end_with_operands_of_its_own_keeps_them():
    layer, x = layer_of("mxfp4-a4+w8a8-r16"), heavy_tailed(2, N_IN)
    for name in ("reference", "low_memory"):
        run(layer, name, x)
        assert layer._prepared.operands is None
    run(layer, "resident", x)
    assert layer._prepared.operands.main.dtype == torch.float32
    run(layer, "resident", x.bfloat16())
    assert layer._prepared.operands.main.dtype == torch.bfloat16
    layer.backend = "reference"
    assert layer._prepared is None


@pytest.mark.parametrize(
    "name", [name for name in SCHEMES if "-a4+" in name or name == "mxint4-aint8"]
)
def test_low_memory_gives_the_bits_of_resident(name):
    layer = layer_of(name)
    for dtype in DTYPES:
        x = heavy_tailed(5, N_IN).to(dtype)
        assert torch.equal(run(layer, "low_memory", x), run(layer, "resident", x)), dtype


@pytest.mark.parametrize("name", ["mxfp4", "mxint4", "int4", "nvfp4", "int4_b16"])
@pytest.mark.parametrize("shape", [(3, 64), (5, 75), (700, 512), (1, 1), (2, 31)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_byte_table_decodes_to_the_same_bits(name, shape, dtype):
    stored = get_format(name).quantize(
        torch.cat([dit_like(*shape), 1e-37 * dit_like(*shape), torch.zeros(shape)])
    )
    packed = PackedWeight(Scheme(name), stored)
    by_table = decode_by_table(packed, dtype).main
    assert torch.equal(by_table, decode(packed, dtype).main)
    assert by_table.shape == (3 * shape[0], shape[1])


def test_operands_are_the_stored_tensors_in_full():
    layer = layer_of("mxfp4-a4+w8a8-r16-h0")
    packed = layer.packed
    operands = decode(packed, torch.float32)
    assert torch.equal(operands.main, packed.main.dequantize())
    assert torch.equal(operands.main + operands.proj_up @ operands.proj_down, layer.reconstruct())
    plain = decode(PackedWeight(Scheme("mxfp4"), packed.main), torch.bfloat16)
    assert plain.proj_up is plain.proj_down is None
    assert plain.main.dtype == torch.bfloat16


@pytest.mark.parametrize("name", BACKENDS)
def test_a_back_end_is_found_by_its_own_name(name):
    backend = get_backend(name)
    assert backend.name == name
    for member in (member for member, _ in inspect.getmembers(Backend) if member[0] != "_"):
        assert hasattr(backend, member)


@pytest.mark.parametrize("name", ["", "Resident", "cuda", "residant", None])
def test_an_unknown_back_end_is_answered_with_the_list(name):
    with pytest.raises(
        KernelError, match=rf"Unknown back end '{name}'.*Known: auto, .*reference, resident"
    ):
        get_backend(name)


def test_the_default_is_a_choice_and_takes_low_memory_for_mx_formats():
    assert DEFAULT_BACKEND not in BACKENDS
    assert (
        choose(
            DEFAULT_BACKEND,
            LayerSpec((Scheme("mxfp4", "mxint8"),), (N_OUT, N_IN), torch.device("cpu")),
        ).name
        == "low_memory"
    )


@pytest.mark.parametrize("name", ["reference", "resident", "low_memory"])
def test_a_weight_of_one_value_is_multiplied(name):
    layer = QuantizedLinear.from_packed(
        quantize_weight(torch.ones(1, 1), Scheme("mxfp4", "mxfp4")).packed
    )
    assert run(layer, name, torch.tensor([[2.0], [0.0]])).tolist() == [[2.0], [0.0]]
