"""The Triton kernels without a GPU: numbers from the interpreter, instructions from compiling
ahead of time.
"""

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.worlds.matrices import dit_like, gaussian
from loraq.errors import KernelError
from loraq.formats import FORMATS, BlockFormat
from loraq.kernels import LayerSpec, choose
from loraq.kernels.triton import fused
from loraq.kernels.triton.backend import TritonRow
from loraq.nn import QuantizedLinear
from loraq.pipeline.module import quantize_weight
from loraq.recipe_names import parse_scheme
from loraq.scheme import Scheme

HERE = Path(__file__).parent
#: Where a kernel waits for a GPU to be measured on.
EXPERIMENTS = HERE.parents[1] / "experiments"

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason='Triton is missing: pip install "loraq[triton]"'
)

#: The matrix instruction that a kernel must be made of, by kernel and target.
EXPECTED = {
    "quant_down@sm_90": "mma bf16",
    "gemm_up wide@sm_90": "wgmma e4m3",
    "gemm_up promoted@sm_90": "wgmma e4m3",
    "small_m mxfp4@sm_90": "mma bf16",
    "small_m nvfp4@sm_90": "mma bf16",
    "small_m int5@sm_90": "mma bf16",
    "decode mxfp4 merged rotated@sm_90": "mma bf16",
    "decode int4 merged rotated@sm_90": "mma bf16",
    "decode mxfp4 merged@sm_100": "mma bf16",
    "gemm_up@sm_100": "tcgen05",
    "mx_gemm_up@sm_100": "tcgen05 block scale",
    "quant_down@gfx950": "mfma bf16",
    "gemm_up@gfx950": "mfma fp8",
    "mx_gemm_up@gfx950": "mfma scale",
    "decode mxfp4 merged@gfx950": "mfma bf16",
    "decode int4 merged rotated@gfx950": "mfma bf16",
}
#: Decoding alone needs none.
DECODED = [
    *(f"decode {name}@sm_90" for name, fmt in FORMATS.items() if isinstance(fmt, BlockFormat)),
    "decode nvfp4@sm_100",
    "decode mxfp6_e3m2@gfx950",
]


def printed(script: str, *arguments: str, **environment: str) -> dict:
    """Return what a program beside this file prints as its last line."""
    path = os.pathsep.join([str(EXPERIMENTS), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TRITON_DEFAULT_FP_FUSION": "1", **environment},
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, dict[str, int]]:
    folder = str(tmp_path_factory.mktemp("triton"))
    return printed(
        "compile_triton.py", *EXPECTED, *DECODED, TRITON_CACHE_DIR=folder, TRITON_INTERPRET="0"
    )


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    return printed("interpret_triton.py", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_a_kernel_compiles_to_matrix_instructions_without_spills(built, name):
    assert built[name][EXPECTED[name]] > 0
    assert 0 < built[name]["registers"] <= 255
    assert built[name]["stack"] == 0


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", DECODED)
def test_decoding_compiles_for_every_format_without_spills(built, name):
    assert 0 < built[name]["registers"] <= 128
    assert built[name]["stack"] == 0


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemm_up wide@sm_90", "gemm_up promoted@sm_90"])
def test_on_hopper_the_branch_rides_in_the_same_kernel(built, name):
    assert built[name]["wgmma bf16"] > 0


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "bound"),
    [
        ("quant", 1e-5),  # codes below e4m3's normal numbers lose bits: more than 100 dB down
        ("down", 1e-3),  # a code may flip where fp32 sums in another order land on a tie
        ("gemm", 1e-6),
        ("small_m", 1e-6),
        ("decode", 0.0),
        ("fused", 1.0),  # in units of what sums in another order change
        ("mx_gemm", 1e-6),
        ("layer", 1.0),  # in units of the stated bound
        ("compiled", 0.0),  # the same kernels
        ("gradient", 1e-5),
        ("odd", 0.0),
        ("fp16", 0.0),
    ],
)
def test_an_interpreted_kernel_is_the_reference(interpreted, kernel, bound):
    mine = {name: value for name, value in interpreted.items() if name.split()[0] == kernel}
    assert mine
    assert max(mine.values()) <= bound, mine


@needs_triton
@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (parse_scheme("mxfp4-a8"), r"its activations are \['mxint8'\]"),
        (
            parse_scheme("mxfp4-amxfp8_e4m3+w8a8-r16"),
            r"its activations are \['int8', 'mxfp8_e4m3', 'mxint8'\]",
        ),
        (Scheme("bf16", "bf16"), "it reads packed weights, not 'bf16'"),
    ],
)
def test_it_refuses_what_its_kernels_do_not_compute(scheme, reason, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelError, match=reason):
        choose("triton", LayerSpec((scheme,), (16, 64), torch.device("cpu")))


def test_without_triton_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("loraq.kernels.triton.presence.find_spec", lambda _: None)
    with pytest.raises(
        KernelError, match=r"triton is not installed \(pip install \"loraq\[triton\]\"\)"
    ):
        choose("triton", LayerSpec((parse_scheme("mxfp4-a16"),), (16, 64), torch.device("cuda")))


@needs_triton
def test_on_a_cpu_it_refuses_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs its interpreter" in TritonRow().refusal(
        parse_scheme("mxfp4-a16"), (16, 64), torch.device("cpu")
    )


def test_a_kernel_that_does_not_run_is_not_used_and_a_warning_says_why(monkeypatch, caplog):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # after Triton was imported: it does not interpret
    fused._is_right.cache_clear()
    packed = quantize_weight(gaussian(16, 64), "mxfp4-a16", method="rtn").packed
    with caplog.at_level(logging.WARNING, logger="loraq.kernels"):
        assert not fused.takes(packed, torch.bfloat16)
        assert not fused.takes(packed, torch.bfloat16)
    fused._is_right.cache_clear()
    (record,) = caplog.records
    assert "Weights in 'mxfp4' are decoded on cpu by torch's operators" in record.getMessage()
    assert "it does not run here" in record.getMessage()


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch, caplog):
    module = ModuleType("loraq.kernels.triton.decode")
    module.BLOCK_K, module.SMALLEST_SIDE = 128, 16
    module.decode = lambda q, dtype, branch, rotation: 1.01 * q.dequantize().to(dtype)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fused, "absence", lambda device: None)
    fused._is_right.cache_clear()
    packed = quantize_weight(gaussian(16, 64), "mxfp4-a16", method="rtn").packed
    with caplog.at_level(logging.WARNING, logger="loraq.kernels"):
        assert not fused.takes(packed, torch.bfloat16)
    fused._is_right.cache_clear()
    assert "its values are not those of the reference" in caplog.text


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", [n for n, fmt in FORMATS.items() if isinstance(fmt, BlockFormat)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu_every_format_is_decoded_by_the_kernel(name, dtype):
    for recipe in (f"{name}-a16", f"{name}-a16+w8a8-r32"):
        packed = quantize_weight(
            dit_like(96, 1152), recipe, method="svdquant" if "+" in recipe else "rtn"
        ).packed
        assert fused.takes(packed.to("cuda"), dtype)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", ["mxfp4-amxfp8_e4m3+mxfp8_e4m3-r64", "mxfp4-a16+w8a8-r32"])
@pytest.mark.parametrize(("n_in", "n_out"), [(1152, 4608), (3072, 3072), (6144, 1152)])
@pytest.mark.parametrize("n_tokens", [1, 130, 1024])
def test_on_a_gpu_it_keeps_its_bound(name, n_in, n_out, n_tokens):
    layer = QuantizedLinear.from_packed(
        quantize_weight(dit_like(n_out, n_in), name, method="svdquant").packed
    ).cuda()
    layer.backend = "triton"
    x = gaussian(n_tokens, n_in).bfloat16().cuda()
    with torch.no_grad():
        y = layer(x).double()
        layer.backend = "reference"
        expected = layer(x).double()
    assert (y - expected).norm() <= TritonRow().bound(layer.scheme, x.dtype) * expected.norm()
