"""Run every Triton kernel in Triton's interpreter on a CPU, and print how far it is from the
reference, as JSON.

A program of its own: see `compile_triton.py`. It must be started with TRITON_INTERPRET=1.
"""

import json
from dataclasses import replace

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from loraq.formats import FORMATS, BlockFormat, QTensor, get_format
from loraq.kernels import get_backend
from loraq.kernels.base import Operands
from loraq.kernels.fp8_row import fold
from loraq.kernels.low_memory import decode_by_table
from loraq.kernels.resident import merge
from loraq.kernels.triton import fused
from loraq.kernels.triton.decode import decode
from loraq.kernels.triton.gemm_up import gemm_up
from loraq.kernels.triton.quant_down import quant_down
from loraq.kernels.triton.small_m import small_m
from loraq.nn import QuantizedLinear
from loraq.packed import LowRankBranch, PackedWeight
from loraq.recipe_names import parse_scheme
from triton_mx_gemm_up import mx_gemm_up_kernel

MXFP8 = get_format("mxfp8_e4m3")
#: Every format of blocks, and sizes of blocks that fill no tile.
DECODED = [name for name, fmt in FORMATS.items() if isinstance(fmt, BlockFormat)]
DECODED += ["int4_b24", "int5_b256", "int8_b64"]


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokens(m: int, k: int) -> Tensor:
    """Tokens of very different sizes, with outlier channels; and a token of zeros."""
    x = gaussian(m, k) * torch.exp(2 * gaussian(m, 1)) * torch.exp(1.5 * gaussian(1, k))
    x[-1] = 0
    return x.bfloat16()


def distance(y: Tensor, expected: Tensor) -> float:
    y, expected = y.double(), expected.double()
    return ((y - expected).norm() / expected.norm()).item()


def main() -> dict[str, float]:
    found: dict[str, float] = {}
    for m, k, rank in ((5, 96, 32), (33, 160, 24), (17, 256, 64)):
        x, down = tokens(m, k), MXFP8.round(gaussian(rank, k)).bfloat16()
        codes, scale, inner = quant_down(x, down)
        rounded = MXFP8.round(x)
        found[f"quant {m}x{k}"] = distance(codes.float() * scale[:, None], rounded)
        expected = MXFP8.round(rounded @ down.float().T)
        found[f"down {m}x{k} r{rank}"] = distance(inner, expected)
        for n, with_bias in ((40, True), (130, False)):
            weight, weight_scale = fold(get_format("mxfp4").round(gaussian(n, k)))
            up, bias = MXFP8.round(gaussian(n, rank)).bfloat16(), gaussian(n) if with_bias else None
            y = gemm_up(
                (codes, scale), (weight, weight_scale.view(-1)), (inner, up), bias, torch.float32
            )
            dense = (codes.double() * scale[:, None]) @ (
                weight.double() * weight_scale
            ).T + inner.double() @ up.double().T
            found[f"gemm {m}x{k}x{n}"] = distance(y, dense if bias is None else dense + bias)
    for name in DECODED:
        q, x = get_format(name).quantize(gaussian(37, 333)), gaussian(3, 333)
        found[f"small_m {name}"] = distance(small_m(x, q), x @ q.dequantize().T)
        for n in (160, 203):
            found |= decoded(name, n)
    found |= fused_operands()
    found["mx_gemm"] = mx_gemm()
    for name in (
        "mxfp4-amxfp8_e4m3+mxfp8_e4m3-r24",
        "mxfp4-amxfp8_e4m3",
        "mxint4-a16+w8a8-r24",
        "mxfp4-a16",
        "nvfp4-a16+w8a8-r24",
        "int5-a16",
    ):
        for n_tokens in (3, 20):
            found[f"layer {name} {n_tokens}"] = layer(name, n_tokens)
    for name in ("mxfp4-amxfp8_e4m3+mxfp8_e4m3-r24", "mxint4-a16+w8a8-r24"):
        found[f"compiled {name}"] = compiled(name)
    found["gradient"] = gradient()
    return found | odd_inputs()


def decoded(name: str, n: int) -> dict[str, float]:
    """Number of values whose bits are not the reference's: of a matrix, and of random bytes, among
    which is every code and every scale.
    """
    fmt, found = get_format(name), {}
    q = fmt.quantize(gaussian(33, n) * torch.exp(3 * gaussian(33, 1)))
    assert q.scale is not None
    random = torch.Generator().manual_seed(0)
    packed, scale = (
        torch.randint(0, 256, tensor.shape, generator=random, dtype=torch.uint8)
        for tensor in (q.packed, q.scale)
    )
    if fmt.scale_format.n_bytes > 1:  # any two bytes would be no scale that was ever stored
        scale = q.scale
    for kind, one in (("fitted", q), ("random", replace(q, packed=packed, scale=scale))):
        for dtype in (torch.float32, torch.bfloat16):
            expected, y = one.dequantize().to(dtype), decode(one, dtype)
            wrong = (y != expected) & ~(y.isnan() & expected.isnan())
            found[f"decode {name} {n} {kind} {dtype}"] = float(wrong.sum())
    return found


def fused_operands() -> dict[str, float]:
    """Decoding with the branch and the rotation inside, against both in separate passes."""
    found: dict[str, float] = {}
    for name in (
        "int4-a4+w6a6-r24-h32",
        "mxfp4-a4+w8a8-r40-h64",
        "nvfp4-a16+bf16-r8",
        "int5-a8",
        "mxint4-a4-h128",
    ):
        packed = packed_of(name, 48, 384)
        for merged in (True, False):
            for dtype in (torch.float32, torch.bfloat16):
                assert fused.takes(packed, dtype), name
                y = fused.decode(packed, dtype, merged=merged)
                expected = decode_by_table(packed, torch.float32, 0)
                expected = merge(expected) if merged else expected
                for what, one, other in zip(Operands._fields, y, expected, strict=True):
                    assert (one is None) == (other is None)
                    if one is not None:
                        found[f"fused {name} {merged} {dtype} {what}"] = (
                            distance(one, other) / fused._ORDER_OF_SUMS[dtype]
                        )
    return found


def odd_inputs() -> dict[str, float]:
    found: dict[str, float] = {}
    for name in ("mxfp4-amxfp8_e4m3+mxfp8_e4m3-r24", "mxfp4-amxfp8_e4m3", "mxfp4-a16+w8a8-r24"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for value in (torch.nan, torch.inf):
                found[f"odd {name} {dtype} {value}"] = odd(name, dtype, value)
    for name in ("mxfp4-amxfp8_e4m3+mxfp8_e4m3-r24", "mxfp4-a16+bf16-r24"):
        found[f"fp16 {name}"] = beyond_fp16(name)
    return found


def mx_gemm() -> float:
    m, k, n, rank = 20, 128, 40, 32
    x, weight = MXFP8.quantize(tokens(m, k).float()), get_format("mxfp4").quantize(gaussian(n, k))
    inner, up, y = gaussian(m, rank).bfloat16(), gaussian(n, rank).bfloat16(), torch.empty(m, n)
    mx_gemm_up_kernel[(2,)](
        x.packed.view(torch.float8_e4m3fn),
        x.scale,
        weight.packed,
        weight.scale,
        inner,
        up,
        y,
        m,
        n,
        k,
        rank,
        RANK=32,
        BLOCK_M=16,
        BLOCK_N=64,
        BLOCK_K=64,
        DOT32=True,
    )
    return distance(y, x.dequantize() @ weight.dequantize().T + inner.float() @ up.float().T)


def packed_of(name: str, n_out: int = 48, n_in: int = 96) -> PackedWeight:
    scheme = parse_scheme(name)
    branch = None
    if scheme.branch is not None:
        fmt, rank = scheme.branch.weight_format, scheme.branch.rank
        branch = LowRankBranch(
            fmt.quantize(0.1 * gaussian(n_out, rank)), fmt.quantize(0.1 * gaussian(rank, n_in))
        )
    main: QTensor = scheme.weight_format.quantize(0.1 * gaussian(n_out, n_in))
    return PackedWeight(scheme, main, branch)


def layer_of(name: str) -> QuantizedLinear:
    made = QuantizedLinear.from_packed(packed_of(name), gaussian(48))
    made.backend = "triton"
    return made


def layer(name: str, n_tokens: int) -> float:
    """The back end as a layer, against its stated bound: at most 1."""
    made, x = layer_of(name), gaussian(1, n_tokens, 96)
    with torch.no_grad():
        y = made(x)
        made.backend = "reference"
        return distance(y, made(x)) / get_backend("triton").bound(made.scheme, x.dtype)


def compiled(name: str) -> float:
    """Largest difference between the compiled layer and the layer; two graphs must do for any
    number of tokens.
    """
    made, counter = layer_of(name), CompileCounterWithBackend("aot_eager")
    made.prepare(torch.float32)
    run = torch.compile(made, backend=counter, fullgraph=True)
    inputs = [gaussian(n_tokens, 96) for n_tokens in (3, 5, 7)]
    with torch.no_grad():
        differences = [(run(x) - made(x)).abs().max().item() for x in inputs]
    assert counter.frame_count <= 2
    return max(differences)


def gradient() -> float:
    made, x, toward = (
        layer_of("mxfp4-amxfp8_e4m3+mxfp8_e4m3-r24"),
        gaussian(4, 96).requires_grad_(),
        gaussian(4, 48),
    )
    (made(x) * toward).sum().backward()
    assert x.grad is not None
    return distance(x.grad, toward @ made.reconstruct())


def odd(name: str, dtype: torch.dtype, value: float) -> float:
    """Number of outputs that are NaN here and not in the reference, or the other way round; and of
    outputs of other tokens that changed.
    """
    made, x = layer_of(name), gaussian(4, 96).to(dtype)
    spoilt = x.clone()
    spoilt[2, 7] = value
    with torch.no_grad():
        y, clean = made(spoilt), made(x)
        made.backend = "reference"
        expected = made(spoilt)
    if value == torch.inf and "-a16" in name:  # no rounding saturates it: inf or NaN
        wrong = (y.isfinite() != expected.isfinite())[2]
    else:
        wrong = (y.isnan() != expected.isnan())[2]
    others = [0, 1, 3]
    return float(wrong.sum() + (y[others] != clean[others]).sum())


def beyond_fp16(name: str) -> float:
    """Number of outputs that are infinite, where a main product beyond fp16 is answered by the
    branch.
    """
    scheme, up, down = parse_scheme(name), gaussian(48, 24), gaussian(24, 96)
    assert scheme.branch is not None
    factor = scheme.branch.weight_format
    branch = LowRankBranch(factor.quantize(-1000 * up), factor.quantize(down))
    main = scheme.weight_format.quantize(1000 * up @ down)
    made = QuantizedLinear.from_packed(PackedWeight(scheme, main, branch), gaussian(48))
    made.backend = "triton"
    with torch.no_grad():
        return float((~made(gaussian(4, 96).half()).isfinite()).sum())


if __name__ == "__main__":
    print(json.dumps(main()))
