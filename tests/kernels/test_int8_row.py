"""`int8_row`: its codes are those of the format, its sums are
exact, and it refuses what it cannot keep.
"""

import copy
import logging
import pickle
import platform
import shutil

import pytest
import torch
from torch import nn

from benchmarks.worlds.matrices import dit_like, gaussian, heavy_tailed
from loraq.errors import KernelError
from loraq.formats import get_format
from loraq.kernels import LayerSpec, choose, dispatch, int8_matrix, int8_row
from loraq.kernels.int8_matrix import (
    UNSIGNED,
    Rows,
    can_pack,
    encode_rows,
    pack_rows,
    packed_product,
    rows_of,
)
from loraq.kernels.int8_row import Int8Row
from loraq.linalg import relative_error
from loraq.nn import QuantizedLinear
from loraq.packed import PackedWeight
from loraq.pipeline.module import quantize_weight
from loraq.recipe_names import parse_scheme
from loraq.scheme import Branch, Scheme

CPU = torch.device("cpu")
ALL_INT8 = Scheme("int8", "int8", Branch(16, "int8", "int8"))


needs_packing = pytest.mark.skipif(
    not can_pack(CPU), reason="this CPU, or this build of torch, packs no INT8"
)


@pytest.fixture(
    params=[pytest.param(True, marks=needs_packing, id="packed"), pytest.param(False, id="int_mm")]
)
def product(request, monkeypatch):
    """Run a test with both products."""
    if not request.param:
        monkeypatch.setattr(int8_row, "can_pack", lambda device: False)
    return request.param


def layer_of(
    scheme: Scheme, backend: str = "int8_row", shape: tuple[int, int] = (48, 96)
) -> QuantizedLinear:
    solved = quantize_weight(dit_like(*shape), scheme, method="svdquant")
    layer = QuantizedLinear.from_packed(solved.packed, gaussian(1, shape[0], 5)[0])
    layer.backend = backend
    return layer


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_codes_and_scales_are_those_of_the_format(dtype):
    x = torch.cat(
        [
            heavy_tailed(700, 300),
            1e-30 * heavy_tailed(3, 300),
            torch.zeros(2, 300),
            torch.full((1, 300), -2.5),
        ]
    )
    x = x.to(dtype)
    expected = get_format("int8").quantize(x)
    codes, scale = encode_rows(x)
    assert torch.equal(codes.view(torch.uint8), expected.packed)
    assert torch.equal(scale.view(-1, 1).view(torch.uint8), expected.scale)


@pytest.mark.parametrize("largest", [127 * 2.0**-126, 0.99 * torch.finfo(torch.float32).max])
def test_tokens_at_the_edges_of_fp32_are_those_of_the_format(largest):
    shape = torch.tensor([1.0, -0.5, 0.3, 0.004])
    for factor in (0.5, 0.999, 1.0, 1.001, 1.009):
        x = (factor * largest * shape.double()).float()[None]
        expected = get_format("int8").quantize(x)
        codes, scale = encode_rows(x)
        assert torch.equal(codes.view(torch.uint8), expected.packed), factor
        assert torch.equal(scale.view(-1, 1).view(torch.uint8), expected.scale), factor


@pytest.mark.parametrize("offset", [0, UNSIGNED])
def test_codes_are_those_of_the_format_for_every_number_of_16_bits_and_every_tie(offset):
    patterns = torch.arange(2**16).to(torch.int16)
    numbers = [patterns.view(dtype) for dtype in (torch.bfloat16, torch.float16)]
    cases = [x[x.isfinite()].view(-1, 16) for x in numbers]  # neighbours share a row
    ties = torch.cat([torch.tensor([127.0]), torch.arange(-127, 127) + 0.5])
    cases += [
        ties[None],
        -ties[None],
        ties.nextafter(torch.zeros(1))[None],
        ties.nextafter(2 * ties)[None],
    ]
    for x in (*cases, cases[0].float()):
        expected = get_format("int8").quantize(x)
        codes, scale = encode_rows(x, offset)
        assert torch.equal((codes.int() - offset).to(torch.int8).view(torch.uint8), expected.packed)
        assert torch.equal(scale.view(-1, 1).view(torch.uint8), expected.scale)


def test_an_infinity_saturates_and_a_nan_stays_in_its_token(product):
    layer, x = layer_of(ALL_INT8), gaussian(4, 96)
    expected = layer(x)
    x[1, 5], x[2, 7] = torch.inf, torch.nan
    y = layer(x)
    assert torch.equal(y[[0, 3]], expected[[0, 3]])
    assert not y[1].isnan().any()
    assert y[2].isnan().all()


def test_with_int8_throughout_the_sums_are_those_of_double_precision(product):
    layer, x = layer_of(ALL_INT8), gaussian(33, 96)
    fmt = get_format("int8")
    weight, down, up = (fmt.dequantize(q).double() for q in (layer.packed.main, *_factors(layer)))
    tokens = fmt.round(x).double()
    inner = fmt.round((tokens @ down.T).float()).double()
    torch.testing.assert_close(
        layer(x).double(), tokens @ weight.T + inner @ up.T + layer.bias, rtol=1e-5, atol=1e-5
    )


def _factors(layer):
    return layer.packed.branch.proj_down, layer.packed.branch.proj_up


@pytest.mark.parametrize("name", ["mxfp4", "mxint4", "mxint8", "mxfp6_e2m3"])
def test_mx_rows_of_similar_scales_fit_exactly(name):
    w = get_format(name).round(gaussian(64, 128))
    stored = get_format(name).quantize(w)
    rows, error = rows_of(stored)
    scales = stored.scale.int()
    spread = int((scales.amax(-1) - scales.amin(-1)).max())
    if error == 0:
        assert torch.equal(rows.codes * rows.scale[:, None], stored.dequantize())
    assert (error == 0) == (spread <= {"mxfp4": 3, "mxint4": 4, "mxint8": 0, "mxfp6_e2m3": 1}[name])


@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**-100, 2.0**-115])
def test_what_a_tiny_weight_loses_is_seen(scale):
    # Squares of such numbers leave fp32, where a loss would look like none.
    weight = gaussian(48, 64)
    weight[:, 32:] *= 2.0**-5  # blocks further apart than INT8 rows can hold
    stored = get_format("mxfp4").quantize(scale * weight)
    rows, error = rows_of(stored)
    exact = stored.dequantize().double()
    lost = (rows.codes * rows.scale[:, None].double() - exact).norm() / exact.norm()
    assert error == pytest.approx(lost.item(), rel=1e-5)
    assert error > 1e-3
    packed = PackedWeight(parse_scheme("mxfp4-aint8"), stored)
    with pytest.raises(KernelError, match="INT8 rows change the weight in 'mxfp4' by 0"):
        Int8Row(weight_error=0.0).prepare(packed, packed.scheme, torch.float32)


def test_mxfp4_fits_exactly_up_to_three_binades_and_not_with_seven():
    def stored(binades):
        w = torch.full((2, 64), 6.0)
        w[:, ::2] = 0.5
        w[:, 32:] *= 2.0**-binades
        return get_format("mxfp4").quantize(w)

    rows, error = rows_of(stored(3))
    assert error == 0
    assert torch.equal(rows.codes * rows.scale[:, None], stored(3).dequantize())
    assert rows_of(stored(7))[1] > 0


def test_a_zero_row_stays_zero():
    stored = get_format("mxfp4").quantize(torch.cat([torch.zeros(1, 64), gaussian(1, 64)]))
    rows, _ = rows_of(stored)
    assert not (rows.codes * rows.scale[:, None])[0].any()


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("mxfp4-a8", "its activations are 'mxint8'"),
        ("int4-a4", "its activations are 'int4'"),
        ("int4-a16", "its activations are 'bf16'"),
        ("int4-aint8_b64", "its activations are 'int8_b64'"),
    ],
)
def test_it_refuses_other_activations_by_name(scheme, reason):
    with pytest.raises(
        KernelError,
        match=rf"The back end 'int8_row' cannot run a layer 8×64 .*{reason}.*'resident'",
    ):
        choose("int8_row", LayerSpec((parse_scheme(scheme),), (8, 64), CPU))


def test_it_refuses_sizes_that_a_gpu_cannot_multiply_and_other_devices():
    assert "not all multiples of 8" in Int8Row().refusal(ALL_INT8, (12, 64), torch.device("cuda"))
    assert Int8Row().refusal(ALL_INT8, (12, 64), CPU) is None
    assert "not on 'mps'" in Int8Row().refusal(ALL_INT8, (16, 64), torch.device("mps"))


def test_it_refuses_a_weight_that_rows_would_change_too_much():
    w = gaussian(16, 64)
    w[:, :32] *= 1e3  # one scale a row leaves the other half at 1 % of a step
    w[:, 32:48] = 0
    packed = PackedWeight(Scheme("int4_b16", "int8"), get_format("int4_b16").quantize(w))
    with pytest.raises(
        KernelError, match=r"INT8 rows change the weight in 'int4_b16' by 0\.00\d\d of its norm"
    ):
        Int8Row(weight_error=1e-3).prepare(packed, packed.scheme, torch.float32)


# --- packed operands ------------------------------------------------------------------------------


@needs_packing
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (17, 33), (48, 96), (8, 5000)], ids=str)
def test_the_packed_product_is_exact_and_its_codes_come_back(shape):
    n_out, n_in = shape
    codes = torch.randint(
        -127, 128, (n_out + 3, n_in), generator=torch.Generator().manual_seed(0), dtype=torch.int8
    )
    # The largest sum there is, which VNNI's predecessors would saturate.
    codes[0], codes[n_out] = (
        127,
        127,
    )
    weight, tokens = codes[:n_out], codes[n_out:]
    scale = torch.rand(n_out) + 0.5
    rows = pack_rows(Rows(weight.contiguous(), scale))
    assert torch.equal(rows.codes.to_dense().t(), weight)
    sums = (tokens.long() @ weight.long().t()).float()
    assert torch.equal(
        packed_product((tokens.int() + UNSIGNED).to(torch.uint8), rows, torch.float32), sums * scale
    )


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["int8-a8", "int4-a8+int8-r16", "int8-a8+bf16-r8"])
def test_packed_or_not_the_results_are_equal_up_to_rounding_of_the_output(name, dtype, monkeypatch):
    layer, x = layer_of(parse_scheme(name)), gaussian(2100, 96).to(dtype)
    fast = layer(x)
    monkeypatch.setattr(int8_row, "can_pack", lambda device: False)
    layer.invalidate()
    slow = layer(x)
    bound = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert (fast.float() - slow.float()).norm() <= bound * slow.float().norm()
    if dtype == torch.float32 and name == "int8-a8":
        layer.bias = None
        slow = layer(x)
        monkeypatch.undo()
        layer.invalidate()
        assert torch.equal(layer(x), slow)


@needs_packing
def test_large_values_in_fp16_do_not_overflow_before_the_scale():
    layer, x = layer_of(parse_scheme("int4-a8+int8-r16")), (1e-3 * gaussian(5, 96)).half()
    layer.bias = None
    y = layer(x)
    layer.backend = "reference"
    assert (y - layer(x)).float().norm() <= 2e-2 * y.float().norm()


@needs_packing
def test_packed_operands_take_what_onednn_says_and_no_copy_travels_with_the_layer():
    layer, x = layer_of(parse_scheme("int4-a8+int8-r16")), gaussian(3, 96)
    y = layer(x)
    operands = layer._prepared.operands
    packed = [rows.codes for rows in (operands.weight, operands.branch[0])]
    # proj_up, and the scale of the weight; that of proj_down is the stored one.
    rest = 4 * 48 * 16 + 4 * 48
    assert layer.kept_nbytes == sum(map(torch.ops.mkldnn._nbytes, packed)) + rest
    # Small matrices are filled up to whole blocks.
    assert 48 * 96 + 16 * 96 + rest < layer.kept_nbytes < 3 * (48 * 96 + 16 * 96) + rest
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.kept_nbytes == 0
        assert torch.equal(twin(x), y)


@pytest.mark.parametrize(
    ("limit", "packs"),
    [
        ("AVX2", False),
        ("avx512_core", False),
        ("AVX512_CORE_VNNI", True),
        ("all", True),
        ("", True),
    ],
)
def test_a_limit_below_vnni_means_no_packing(limit, packs, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert can_pack(CPU) == packs
    assert not can_pack(torch.device("cuda"))


def test_a_cpu_whose_sums_overflow_is_refused(monkeypatch):
    layer = layer_of(ALL_INT8)
    monkeypatch.setattr(int8_matrix, "has_vnni", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert int8_matrix.saturates(torch.device("cpu")) is False
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert int8_matrix.saturates(torch.device("cuda")) is False
    with pytest.raises(KernelError, match="overflow on an x86 CPU without AVX-512 VNNI"):
        layer.backend = "int8_row"
    layer.backend = "auto"
    assert layer.backend == "low_memory"


def test_without_onednn_it_is_the_product_of_torch(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    layer, x = layer_of(parse_scheme("int8-a8")), gaussian(3, 96)
    layer(x)
    assert layer.kept_nbytes == 0  # the stored bytes themselves
    assert not layer._prepared.operands.weight.codes.is_mkldnn


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("int8-a8", "int8_row"),
        ("int8-a8+int8-r16", "int8_row"),
        ("int4-a8", "low_memory"),  # would have to be encoded anew
        ("nvfp4-aint8", "low_memory"),
        ("mxfp4-a8", "low_memory"),
    ],
)
def test_the_automatic_choice_encodes_no_weight_anew(scheme, name):
    assert layer_of(parse_scheme(scheme), "auto").backend == name


def test_without_a_loss_a_weight_is_taken_as_its_values_allow():
    scheme, exact = Scheme("mxfp4", "int8"), Int8Row(weight_error=0.0)
    near, far = torch.ones(4, 64), torch.ones(4, 64)
    far[:, :32] = 1.5 * 2**-12
    exact.prepare(quantize_weight(near, scheme).packed, scheme, torch.float32)
    with pytest.raises(KernelError, match=r"change the weight in 'mxfp4' by 0\.\d+ of its norm"):
        exact.prepare(quantize_weight(far, scheme).packed, scheme, torch.float32)


@pytest.mark.parametrize("scheme", ["int8-a8", "int8-a8+int8-r16"])
def test_the_automatic_choice_keeps_nothing_beside_the_packed_bytes(scheme):
    layer, x = layer_of(parse_scheme(scheme), "auto"), gaussian(5, 96)
    y = layer(x)
    assert (layer.backend, layer.kept_nbytes, layer._prepared.operands) == ("int8_row", 0, None)
    layer.backend = "reference"
    assert relative_error(layer(x), y) <= Int8Row().bound(layer.scheme, torch.float32)


def test_the_choice_is_logged_once_with_its_reason(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    layer = layer_of(parse_scheme("int4-a8"), "auto")
    with caplog.at_level(logging.INFO, logger="loraq.kernels"):
        for dtype in (torch.float32, torch.bfloat16):
            layer(gaussian(2, 96).to(dtype))
    (record,) = (record for record in caplog.records if record.levelno == logging.INFO)
    assert "on cpu: low_memory (not int8_row: 'int4' is not stored as INT8 rows" in (
        record.getMessage()
    )


def test_the_environment_takes_the_place_of_the_automatic_choice(monkeypatch):
    monkeypatch.setenv("LORAQ_BACKEND", "reference")
    layer = QuantizedLinear.from_packed(quantize_weight(gaussian(8, 64), "mxfp4-a8").packed)
    assert layer.backend == "reference"
    layer.backend = "resident"
    assert layer.backend == "resident"
    monkeypatch.setenv("LORAQ_BACKEND", "fast")
    with pytest.raises(KernelError, match=r"Unknown back end 'fast'.*Known: auto"):
        QuantizedLinear(64, 8, Scheme("mxfp4"))


# --- as a layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3), (2, 0, 3)], ids=str)
def test_any_leading_shape(leading, product):
    layer = layer_of(ALL_INT8)
    x = torch.randn((*leading, 96), generator=torch.Generator().manual_seed(0))
    y = layer(x)
    layer.backend = "reference"
    assert y.shape == (*leading, 48)
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheme", [ALL_INT8, parse_scheme("int8-a8+bf16-r8")], ids=["int8 branch", "bf16 branch"]
)
def test_the_gradient_is_that_of_the_reconstruction(scheme, product):
    layer, x = layer_of(scheme), gaussian(3, 96).requires_grad_()
    toward = gaussian(3, 48, 8)
    (layer(x) * toward).sum().backward()
    bound = 1e-5 if scheme is ALL_INT8 else 1e-2
    assert (x.grad - toward @ layer.reconstruct()).norm() <= bound * x.grad.norm()
    torch.testing.assert_close(layer.bias.grad, toward.sum(0))


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's own compiler
@pytest.mark.parametrize("backend", ["int8_row", "low_memory"])
def test_compiled_it_is_one_graph_for_any_number_of_tokens(backend):
    layer = layer_of(ALL_INT8, backend)
    model = nn.Sequential(layer, nn.SiLU())
    layer.prepare(torch.float32)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n_tokens in (5, 17, 160):
            x = gaussian(n_tokens, 96)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
