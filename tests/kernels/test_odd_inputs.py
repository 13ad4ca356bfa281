"""Inputs that no model should have, and outputs at the end of fp16: every back end answers as the
reference does.
"""

from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.worlds.matrices import dit_like, gaussian
from loraq.kernels import BACKENDS, int8_row
from loraq.nn import QuantizedLinear
from loraq.packed import LowRankBranch, PackedWeight
from loraq.pipeline.module import quantize_weight
from loraq.recipe_names import parse_scheme

N_OUT, N_IN = 48, 96
#: What each back end is tried on; `triton` is interpreted, by `interpret_triton.py`, and `openvino`
#: has tests of its own.
SCHEMES = {
    "reference": ("mxfp4-a4+w8a8-r16", "nvfp4-a4+bf16-r16", "int4-a16+w6a6-r16"),
    "resident": ("mxfp4-a4+w8a8-r16", "nvfp4-a4+bf16-r16", "int4-a16+w6a6-r16", "int4-a8"),
    "low_memory": ("mxfp4-a4+w8a8-r16", "nvfp4-a4+bf16-r16", "int4-a16+w6a6-r16", "int4-a8"),
    "int8_row": ("int8-a8+int8-r16", "int8-aint8", "int4-aint8+bf16-r16", "mxfp4-aint8+w8a8-r16"),
    "fp8_row": (
        "mxfp4-amxfp8_e4m3+w8a8-r16",
        "mxfp4-a4+bf16-r16",
        "fp8_e4m3-a8",
        "mxint4-amxfp8_e5m2+w6a6-r16",
    ),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

runs = pytest.mark.parametrize(
    ("backend", "name"),
    [(backend, name) for backend, names in SCHEMES.items() for name in names],
)


@pytest.fixture(params=[True, False], ids=["packed", "unpacked"])
def packs(request, monkeypatch):
    """Run a test with both products of `int8_row`."""
    if not request.param:
        monkeypatch.setattr(int8_row, "can_pack", lambda device: False)
    return request.param


@cache
def packed_of(name: str) -> PackedWeight:
    scheme = parse_scheme(name)
    method = "rtn" if scheme.branch is None else "svdquant"
    return quantize_weight(64 * dit_like(N_OUT, N_IN), scheme, method=method).packed


def run(packed: PackedWeight, backend: str, x: Tensor) -> Tensor:
    layer = QuantizedLinear.from_packed(packed, gaussian(1, len(packed.main.packed), 5)[0])
    layer.backend = backend
    layer.ask_activations("stored", simulate=True)
    with torch.no_grad():
        return layer(x)


def test_every_back_end_that_runs_here_is_tried():
    assert set(SCHEMES) == set(BACKENDS) - {"triton", "openvino"}


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_stays_in_its_token_and_in_all_of_it(backend, name, dtype, packs):
    x = gaussian(5, N_IN).to(dtype)
    expected = run(packed_of(name), backend, x)
    x[2, 7] = torch.nan
    y = run(packed_of(name), backend, x)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@cache
def edge_of_fp16(name: str) -> Tensor:
    """Tokens in fp16 whose largest output by the reference is one of the last finite numbers."""
    kept: list[Tensor] = []
    for factor in torch.linspace(0.9, 1.1, 100).tolist():
        x = gaussian(8, N_IN, 3)
        size = run(packed_of(name), "reference", x).abs().amax(-1, keepdim=True)
        x = (x * (factor * 65504 / size)).half()
        largest = run(packed_of(name), "reference", x).abs().amax(-1)
        kept.append(x[(largest >= 65408) & largest.isfinite()])
    return torch.cat(kept)


@runs
def test_outputs_that_fp16_holds_stay_finite(backend, name, packs):
    x = edge_of_fp16(name)
    assert len(x) > 0
    assert run(packed_of(name), backend, x).isfinite().all()


def cancelling(name: str) -> PackedWeight:
    """A main weight and a branch that nearly cancel, each far beyond fp16 for inputs of size 1."""
    scheme = parse_scheme(name)
    up, down = gaussian(N_OUT, 16, 1), gaussian(16, N_IN, 2)
    factor = scheme.branch.weight_format
    main = scheme.weight_format.quantize(1000 * up @ down)
    return PackedWeight(
        scheme,
        main,
        LowRankBranch(proj_up=factor.quantize(-1000 * up), proj_down=factor.quantize(down)),
    )


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        (backend, name)
        for backend, names in SCHEMES.items()
        for name in names
        if "+" in name and name != "mxfp4-aint8+w8a8-r16"
    ],
)
def test_a_main_product_beyond_fp16_that_the_branch_answers_stays_finite(backend, name, packs):
    packed, x = cancelling(name), gaussian(6, N_IN).half()
    dense = run(PackedWeight(parse_scheme(name.split("+")[0] + "-h0"), packed.main), "reference", x)
    assert dense.isinf().any()
    expected = run(packed, "reference", x)
    assert expected.isfinite().all()
    assert run(packed, backend, x).isfinite().all()


def massive(n: int, size: float) -> Tensor:
    """Tokens with one channel that is `size` times as large as the others."""
    x = gaussian(n, N_IN)
    x[:, 7] = size
    return x


def error(packed: PackedWeight, backend: str, x: Tensor) -> float:
    y, expected = run(packed, backend, x).double(), run(packed, "reference", x).double()
    return ((y - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("backend", "name"),
    [(b, n) for b, names in SCHEMES.items() for n in names if b != "reference"],
)
def test_a_massive_channel_that_reaches_the_output_costs_no_bound(backend, name):
    for size in (1e2, 1e4, 1e6):
        for dtype in (torch.float32, torch.bfloat16):
            bound = BACKENDS[backend].bound(parse_scheme(name), dtype)
            assert error(packed_of(name), backend, massive(24, size).to(dtype)) <= bound


@pytest.mark.parametrize("name", SCHEMES["fp8_row"])
def test_one_exponent_a_token_is_enough_up_to_twelve_binades_and_that_is_needed(name):
    weight = 64 * dit_like(N_OUT, N_IN)
    weight[:, 7] = 0  # the worst case: what decides the token's scale does not reach the output
    scheme = parse_scheme(name)
    method = "rtn" if scheme.branch is None else "svdquant"
    packed, bound = quantize_weight(weight, scheme, method=method).packed, 2e-2
    for size in (1.0, 2.0**6, 2.0**12):
        assert error(packed, "fp8_row", massive(24, size)) <= bound, size
    if name.startswith("mxfp4-amxfp8"):
        assert error(packed, "fp8_row", massive(24, 1e5)) > bound
