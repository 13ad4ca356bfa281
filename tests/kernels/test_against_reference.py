"""Every back end against the reference, within the bound that it states."""

import inspect
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from loraq.errors import KernelError
from loraq.kernels import BACKENDS, DEFAULT_BACKEND, get_backend
from loraq.kernels.base import Backend, decode
from loraq.kernels.reference import Reference
from loraq.nn import QuantizedLinear
from loraq.pipeline.quantize import quantize_weight
from loraq.recipe import parse_scheme
from loraq.scheme import LayerSolution, Scheme
from matrices import dit_like, heavy_tailed, outlier_columns

N_OUT, N_IN = 96, 240
MAINS = ("mxfp4", "int4", "nvfp4", "mxint4", "int5", "mxfp8_e5m2")
BRANCHES = ("", "-w16a16-r16", "-w8a8-r16", "-w6a6-r16", "-w4a8-r16")
SCHEMES = [main + branch + width for main in MAINS for branch in BRANCHES for width in ("-a4", "-a8", "-a16")]
OTHERS = [backend for backend in BACKENDS.values() if backend.name != "reference"]

each_other = pytest.mark.parametrize("backend", OTHERS, ids=lambda backend: backend.name)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


@cache
def solution_of(main_and_branch: str) -> LayerSolution:
    # LoRaQ's own solutions: their main part and branch may cancel, which is the hard case for short sums.
    return quantize_weight(dit_like(N_OUT, N_IN), main_and_branch, method="loraq")


def layer_of(name: str) -> QuantizedLinear:
    solved = solution_of(name.rsplit("-", 1)[0] + "-a4")
    return QuantizedLinear.from_solution(replace(solved, scheme=parse_scheme(name)), dit_like(1, N_OUT, 3)[0])


def error(y: Tensor, expected: Tensor) -> float:
    return (torch.linalg.vector_norm(y.double() - expected) / torch.linalg.vector_norm(expected.double())).item()


def run(layer: QuantizedLinear, name: str, x: Tensor) -> Tensor:
    layer.backend = name
    with torch.no_grad():
        return layer(x)


@each_dtype
@pytest.mark.parametrize("name", SCHEMES)
@each_other
def test_a_back_end_keeps_its_tolerance(backend, name, dtype):
    layer = layer_of(name)
    bound = backend.tolerance[backend.operand_dtype(dtype)]
    for kind in (heavy_tailed, outlier_columns):
        x = kind(24, N_IN).to(dtype)
        y, expected = run(layer, backend.name, x), run(layer, "reference", x)
        assert y.dtype == expected.dtype == dtype
        assert error(y, expected.double()) <= bound


@each_other
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_tolerance_holds_for_inputs_of_any_size(backend, scale):
    layer = layer_of("mxfp4-w8a8-r16-a4")
    for dtype in (torch.float32, torch.bfloat16):
        x = (scale * heavy_tailed(24, N_IN)).to(dtype)
        y, expected = run(layer, backend.name, x), run(layer, "reference", x)
        assert error(y, expected.double()) <= backend.tolerance[dtype]


@each_other
def test_a_tolerance_is_stated_for_every_operand_dtype(backend):
    assert set(backend.tolerance) == {backend.operand_dtype(d) for d in (torch.float16, torch.bfloat16, torch.float32)}
    assert all(0 <= bound <= 2e-2 for bound in backend.tolerance.values())


@each_other
def test_the_stated_tolerance_is_needed_and_not_idle(backend):
    layer, x = layer_of("mxfp4-w8a8-r16-a4"), heavy_tailed(24, N_IN).bfloat16()
    measured = error(run(layer, backend.name, x), run(layer, "reference", x).double())
    assert measured > backend.tolerance[torch.bfloat16] / 20


def test_the_reference_is_exact_and_computes_in_single_precision():
    reference = get_backend("reference")
    assert isinstance(reference, Reference)
    assert reference.tolerance == {torch.float32: 0.0}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert reference.operand_dtype(dtype) == torch.float32


def test_the_reference_keeps_no_operands_and_resident_does():
    layer, x = layer_of("mxfp4-w8a8-r16-a4"), heavy_tailed(2, N_IN)
    run(layer, "reference", x)
    assert layer._operands is None
    run(layer, "resident", x)
    assert layer._operands.weight.dtype == torch.float32
    run(layer, "resident", x.bfloat16())
    assert layer._operands.weight.dtype == torch.bfloat16
    layer.backend = "reference"
    assert layer._operands is None
    assert [backend.keeps_operands for backend in (get_backend("reference"), get_backend("resident"))] == [False, True]


def test_operands_are_the_stored_tensors_in_full():
    layer = layer_of("mxfp4-w8a8-r16-h0-a4")
    operands = decode(layer.stored_weight, layer.branch, torch.float32)
    assert torch.equal(operands.weight, layer.stored_weight.dequantize())
    assert torch.equal(operands.weight + operands.proj_up @ operands.proj_down, layer.reconstruct())
    plain = decode(layer.stored_weight, None, torch.bfloat16)
    assert plain.proj_up is plain.proj_down is None
    assert plain.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", BACKENDS)
def test_a_back_end_is_found_by_its_own_name(name):
    backend = get_backend(name)
    assert backend.name == name
    for method in (member for member, _ in inspect.getmembers(Backend, inspect.isfunction) if member[0] != "_"):
        assert callable(getattr(backend, method))


@pytest.mark.parametrize("name", ["", "Resident", "cuda", "residant", None])
def test_an_unknown_back_end_is_answered_with_the_list(name):
    with pytest.raises(KernelError, match=rf"Unknown back end '{name}'.*Known: reference, resident"):
        get_backend(name)


def test_the_default_is_a_back_end():
    assert DEFAULT_BACKEND in BACKENDS


@pytest.mark.parametrize("name", BACKENDS)
def test_a_weight_of_one_value_is_multiplied(name):
    layer = QuantizedLinear.from_solution(quantize_weight(torch.ones(1, 1), Scheme("mxfp4", "mxfp4")))
    assert run(layer, name, torch.tensor([[2.0], [0.0]])).tolist() == [[2.0], [0.0]]
