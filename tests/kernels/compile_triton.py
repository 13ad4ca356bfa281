"""Compile every Triton kernel ahead of time for GPUs that are
not here; print what came out, as JSON.

A program of its own, because the tests of numbers run the same kernels in Triton's interpreter, and
a process can only do one of the two. Registers and local memory are read by the tools inside the
Triton wheel.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraq.formats import FORMATS, BlockFormat, get_format
from loraq.kernels.triton.decode import decode_kernel, layout
from loraq.kernels.triton.gemm_up import gemm_up_kernel
from loraq.kernels.triton.quant_down import quant_down_kernel
from loraq.kernels.triton.small_m import small_m_kernel
from triton_mx_gemm_up import mx_gemm_up_kernel

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
FP8, BF16, F32, U8 = "*fp8e4nv", "*bf16", "*fp32", "*u8"
GEMM_POINTERS = {"codes": FP8, "scale": F32, "weight": FP8, "weight_scale": F32}
GEMM_POINTERS |= {"inner": BF16, "up": BF16, "bias": BF16, "y": BF16}
GEMM = {
    "HAS_BRANCH": True,
    "HAS_BIAS": True,
    "RANK": 64,
    "BLOCK_M": 128,
    "BLOCK_K": 128,
    "GROUP": 8,
    "WHOLE_K": True,
}
GEMM |= {"DOT32": False}
GEMM_OPTIONS = {"num_warps": 8, "num_stages": 3}
#: Every format of blocks, the 16-bit ones left out.
DECODED = [name for name, fmt in FORMATS.items() if isinstance(fmt, BlockFormat)]


def stored(name: str) -> dict[str, str]:
    """Return the types of the pointers to what a matrix of this format stores."""
    scale = {"bf16": BF16, "fp32": F32}.get(get_format(name).scale_format.name, U8)
    return {"packed": U8, "scale": scale, "global": F32}


def layout_of(name: str) -> dict[str, object]:
    """Return what a kernel is compiled for by the format."""
    return layout(get_format(name))


#: Kernel, types of its pointers, constants, options.
KERNELS = {
    "quant_down": (
        quant_down_kernel,
        {"x": BF16, "down": BF16, "codes": FP8, "scale": F32, "inner": BF16},
        {"HAS_BRANCH": True, "RANK": 64, "BLOCK_M": 32, "BLOCK_K": 128, "DOT32": False},
        {"num_warps": 4},
    ),
    "gemm_up wide": (
        gemm_up_kernel,
        GEMM_POINTERS,
        {**GEMM, "BLOCK_N": 256, "PROMOTE": False},
        GEMM_OPTIONS,
    ),
    "gemm_up": (
        gemm_up_kernel,
        GEMM_POINTERS,
        {**GEMM, "BLOCK_N": 128, "PROMOTE": False},
        GEMM_OPTIONS,
    ),
    "gemm_up promoted": (
        gemm_up_kernel,
        GEMM_POINTERS,
        {**GEMM, "BLOCK_N": 128, "PROMOTE": True},
        GEMM_OPTIONS,
    ),
    "mx_gemm_up": (
        mx_gemm_up_kernel,
        {
            "codes": FP8,
            "scale": U8,
            "packed": U8,
            "weight_scale": U8,
            "inner": BF16,
            "up": BF16,
            "y": BF16,
        },
        {"RANK": 64, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "DOT32": False},
        {"num_warps": 8, "num_stages": 2},
    ),
    **{
        f"small_m {name}": (
            small_m_kernel,
            {"x": BF16, **stored(name), "y": BF16},
            {**layout_of(name), "BLOCK_N": 16, "BLOCK_K": 256, "DOT32": False},
            {"num_warps": 4},
        )
        for name in ("mxfp4", "nvfp4", "int5")
    },
    **{
        f"decode {name}{' merged' * with_branch}{' rotated' * rotated}": (
            decode_kernel,
            {**stored(name), "up": BF16, "down": BF16, "rotation": F32, "out": BF16},
            {
                **layout_of(name),
                "HAS_BRANCH": with_branch,
                "SIDE": 32 * rotated,
                "BLOCK_N": 32,
                "BLOCK_K": 128,
                "BLOCK_R": 32,
                "DOT32": False,
            },
            {"num_warps": 4},
        )
        for name in DECODED
        for with_branch, rotated in ((False, False), (True, False), (True, True))
    },
}
#: The matrix instructions to look for.
INSTRUCTIONS = {
    "wgmma e4m3": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3",
    "wgmma bf16": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16",
    "mma bf16": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    "tcgen05": r"tcgen05\.mma",
    "tcgen05 block scale": r"tcgen05\.mma\.cta_group::\d\.kind::mxf8f6f4\.block_scale",
    "mfma fp8": r"v_mfma_f32_\d+x\d+x\d+_(f8f6f4|fp8_fp8)",
    "mfma bf16": r"v_mfma_f32_\d+x\d+x\d+_bf16",
    "mfma scale": r"v_mfma_scale_f32_\d+x\d+x\d+_f8f6f4",
}


def compiled(name: str, target: GPUTarget) -> dict[str, object]:
    """Compile one kernel for one target and count what matters."""
    kernel, pointers, constants, options = KERNELS[name]
    kinds = {f"{pointer}_ptr": kind for pointer, kind in pointers.items()}
    signature = {
        arg: kinds.get(arg, "constexpr" if arg in constants else "i32") for arg in kernel.arg_names
    }
    # The wrappers pass sizes that are multiples of 16, and torch's memory is aligned: so would a
    # launch be compiled.
    aligned = [[("tt.divisibility", 16)]] * len(kernel.arg_names)
    attributes = {
        (i,): aligned[i] for i, arg in enumerate(kernel.arg_names) if arg not in constants
    }
    values = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    built = triton.compile(source, target=target, options=options)
    text = built.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    row: dict[str, object] = {
        key: len(re.findall(pattern, text)) for key, pattern in INSTRUCTIONS.items()
    }
    return {**row, **(cuda_use(built.asm["cubin"]) if target.backend == "cuda" else amd_use(text))}


def cuda_use(cubin: bytes) -> dict[str, int]:
    """Return the registers and the local memory (spills) of a cubin."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", shown.stdout + shown.stderr))
    return {"registers": int(usage["REG"]), "stack": int(usage["STACK"]) + int(usage["LOCAL"])}


def amd_use(text: str) -> dict[str, int]:
    """Return the registers and the scratch memory (spills) that the assembler's notes give."""
    (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", text)
    (spills,) = re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)
    return {"registers": int(registers), "stack": int(spills)}


if __name__ == "__main__":
    wanted = [line.split("@") for line in sys.argv[1:]]
    print(
        json.dumps({f"{name}@{target}": compiled(name, TARGETS[target]) for name, target in wanted})
    )
