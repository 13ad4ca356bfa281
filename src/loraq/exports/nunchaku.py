"""Target `nunchaku-lite`: layers of Nunchaku's engine in a folder of diffusers.

What a tensor core reads at once stands together; `Tiling`s say how, from the axes of a matrix
(N, K), N in tiles of 128, to the order in the file. Two kinds of layers: SVDQ (W4A4 with a branch)
and AWQ (W4A16 without one, for modulations).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraq.errors import ExportError
from loraq.exports.advice import recommend
from loraq.exports.codes import (
    Tiling,
    e2m1_values,
    join_low_first,
    offset_codes,
    per_block,
    signed_values,
    split_low_first,
)
from loraq.exports.factors import cast_factors, pad_rank
from loraq.exports.layer import Decoded, Factors, Head, Layer, Specs, Tensors
from loraq.exports.target import EXACT_IN_16_BITS, LOAD_FOLDER, About, Job, Target, most_common
from loraq.formats.scales import view_bytes
from loraq.safetensors.header import DTYPE_NAMES, TensorSpec

#: Values that share a scale, by the precision.
_GROUP = {"int4": 64, "nvfp4": 16}


def codes_tiling(n: int, k: int) -> Tiling:
    """Return the order of the codes of an SVDQ layer: rows nt·128 + a·16 + b·8 + c."""
    return Tiling((n // 128, 8, 2, 8, k // 64, 2, 4, 8), (0, 4, 1, 3, 6, 2, 5, 7))


def vector_tiling(n: int, groups: int = 1) -> Tiling:
    """Return the order of one value a row, or of each row's scales (N, groups)."""
    return Tiling((n // 128, 8, 2, 4, 2, groups), (0, 5, 1, 3, 2, 4))


def micro_tiling(n: int, groups: int) -> Tiling:
    """Return the order of the E4M3 scales (N, groups) of NVFP4."""
    return Tiling((n // 128, 4, 4, 8, groups // 4, 4), (0, 4, 3, 2, 1, 5))


def down_tiling(rank: int, k: int) -> Tiling:
    """Return the order of `proj_down` (R, K)."""
    return Tiling((rank // 16, 2, 8, k // 16, 2, 4, 2), (3, 0, 2, 5, 1, 4, 6))


def up_tiling(n: int, rank: int) -> Tiling:
    """Return the order of `proj_up` (N, R)."""
    return Tiling((n // 16, 2, 8, rank // 16, 2, 4, 2), (0, 3, 2, 5, 1, 4, 6))


def awq_tiling(n: int, k: int) -> Tiling:
    """Return the order of the codes of an AWQ layer."""
    return Tiling((n // 4, 4, k // 64, 2, 4, 8), (0, 2, 1, 3, 5, 4))


@dataclass(frozen=True, eq=False)
class Svdq:
    """What an SVDQ layer (N, K) is: `(x / smooth) Wᵀ + (x Dᵀ) Uᵀ`, W = code · scale · above."""

    #: (N, K), int32: nibbles in two's complement, or E2M1.
    codes: Tensor
    #: (N, groups): of 16 bits, or E4M3.
    scale: Tensor
    #: (N, 1), fp32: global scale times that of the row; `None` for INT4.
    above: Tensor | None
    #: (K,).
    smooth: Tensor
    branch: Factors


@dataclass(frozen=True, eq=False)
class Awq:
    """What an AWQ layer (N, K) is: W = code · scale + zero."""

    #: (N, K), int32, 0 … 15.
    codes: Tensor
    #: Both (N, groups).
    scale: Tensor
    zeros: Tensor


def read_svdq(tensors: Tensors, name: str, shape: tuple[int, int]) -> Svdq:
    """Return what the kernels make of the tensors of an SVDQ layer; NVFP4 has a `wtscale`."""
    (n, k), laid = shape, tensors[f"{name}.wscales"]
    nibbles = split_low_first(tensors[f"{name}.qweight"].view(torch.uint8).flatten())
    groups, rank, above = laid.shape[0], tensors[f"{name}.proj_up"].shape[1], None
    if f"{name}.wtscale" in tensors:
        scale = micro_tiling(n, groups).gather(laid.view(torch.uint8)).view(laid.dtype)
        rows = vector_tiling(n).gather(tensors[f"{name}.wcscales"]).float().view(n, 1)
        above = rows * tensors[f"{name}.wtscale"].float()
    else:
        scale = vector_tiling(n, groups).gather(laid)
    down = down_tiling(rank, k).gather(tensors[f"{name}.proj_down"]).view(rank, k)
    up = up_tiling(n, rank).gather(tensors[f"{name}.proj_up"]).view(n, rank)
    return Svdq(
        codes_tiling(n, k).gather(nibbles).view(n, k),
        scale.view(n, groups),
        above,
        vector_tiling(k).gather(tensors[f"{name}.smooth_factor"]),
        Factors(up.float(), down.float()),
    )


def read_awq(tensors: Tensors, name: str, shape: tuple[int, int]) -> Awq:
    """Return what the kernels make of the tensors of an AWQ layer."""
    (n, k), raw = shape, tensors[f"{name}.qweight"]
    codes = awq_tiling(n, k).gather(split_low_first(raw.view(torch.uint8).flatten())).view(n, k)
    return Awq(codes, tensors[f"{name}.wscales"].mT, tensors[f"{name}.wzeros"].mT)


class NunchakuLite(Target):
    """A folder of diffusers with `quant_method: nunchaku_lite`."""

    about = About(
        name="nunchaku-lite",
        loaded_by="diffusers 0.42 with the package kernels, on NVIDIA GPUs before Hopper and from "
        "Blackwell on",
        holds="INT4 (blocks of 64) or NVFP4, one of them a file, one rank, a multiple of 16; out "
        "and in multiples of 128; modulations as INT4 without a branch; no 1×1 convolutions",
        exact=EXACT_IN_16_BITS,
        activations="4 bits by the target's own rule (absmax / 7, or NVFP4 without a global scale)",
        verified="every permutation against cache-dit's packer; whole models (FLUX, SANA) by "
        "diffusers' loader and layers, the CUDA kernels emulated from their formulas",
        unverified="the CUDA kernels; signed INT4 scales, which loraq writes, on a card",
        load="# pip install kernels; DIFFUSERS_TRUST_REMOTE_KERNELS=true in the environment\n"
        + LOAD_FOLDER,
        traps=(
            "It does not run on Hopper (H100, H200), nor on a CPU.",
            "Run one prompt against loraq's own output first: no card was at hand for the kernels.",
        ),
    )
    dtypes = ("bfloat16", "float16")

    def __init__(self, job: Job) -> None:
        """Settle precision and rank of the file."""
        super().__init__(job)
        able = [head for head in self.within if not _misfit(head)]
        svdq = [head for head in able if not _is_awq(head)]
        self.precision: str | None = most_common(svdq, lambda head: head.scheme.weight)
        ranks = sorted({h.rank for h in svdq if h.scheme.weight == self.precision})
        largest = max(ranks, default=0)
        step = self.limits.rank_step
        self.rank = max(step, -(-largest // step) * step)
        if ranks and ranks != [self.rank] and not job.pads_rank:
            raise ExportError(
                f"Target 'nunchaku-lite' needs one rank for all layers, a multiple of {step}, and "
                f"there are {', '.join(map(str, ranks))}. Fill up to {self.rank} with zeros "
                f"(`--pad-rank`). {recommend(self.about.name, job.heads, type(job.model))}"
            )

    def refuses(self, head: Head) -> str:
        """Return why a layer is dense."""
        if reason := _misfit(head):
            return reason
        if not _is_awq(head) and head.scheme.weight != self.precision:
            return f"{head.scheme.weight} beside {self.precision}"
        return ""

    def notes(self) -> list[str]:
        """Return what is special of the model here."""
        svdq = [head for head in self.held if not _is_awq(head)]
        weight_only = [head for head in svdq if head.scheme.activation == "bf16"]
        if not weight_only:
            return []
        return [
            f"{len(weight_only)} layers were solved for 16-bit activations and run on 4-bit ones "
            "there: this costs quality that the weights do not show."
        ]

    def specs(self, head: Head) -> Specs:
        """Return the tensors of a layer but its bias."""
        (n, k), kind, name = head.shape, DTYPE_NAMES[self.job.new_dtype], head.name
        groups = k // _GROUP[head.scheme.weight]
        if _is_awq(head):
            return {
                f"{name}.qweight": TensorSpec("I32", (n // 4, k // 2)),
                f"{name}.wscales": TensorSpec(kind, (groups, n)),
                f"{name}.wzeros": TensorSpec(kind, (groups, n)),
            }
        specs = {
            f"{name}.qweight": TensorSpec("I8", (n, k // 2)),
            f"{name}.smooth_factor": TensorSpec(kind, (k,)),
            f"{name}.proj_down": TensorSpec(kind, (k, self.rank)),
            f"{name}.proj_up": TensorSpec(kind, (n, self.rank)),
            f"{name}.wscales": TensorSpec(
                kind if self.precision == "int4" else "F8_E4M3", (groups, n)
            ),
        }
        if self.precision == "nvfp4":
            specs[f"{name}.wtscale"] = TensorSpec(kind, (1,))
            specs[f"{name}.wcscales"] = TensorSpec(kind, (n,))
        return specs

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """Return the tensors of `specs`."""
        made = self._awq(layer) if _is_awq(layer.head) else self._svdq(layer)
        specs = self.specs(layer.head)
        return {
            name: made[name.rpartition(".")[2]].view(spec.shape) for name, spec in specs.items()
        }

    def _awq(self, layer: Layer) -> dict[str, Tensor]:
        (n, k), main, dtype = layer.head.shape, layer.main, self.job.new_dtype
        codes = split_low_first(offset_codes(main.packed)).to(torch.uint8)
        laid = join_low_first(awq_tiling(n, k).lay(codes))
        scale = view_bytes(layer.block_scale, torch.bfloat16).to(dtype).mT.contiguous()
        return {"qweight": laid.view(torch.int32), "wscales": scale, "wzeros": -8 * scale}

    def _svdq(self, layer: Layer) -> dict[str, Tensor]:
        (n, k), main, dtype = layer.head.shape, layer.main, self.job.new_dtype
        codes = split_low_first(main.packed).to(torch.uint8)
        padded = pad_rank(layer.branch, self.rank, layer.head.shape)
        branch = cast_factors(padded, dtype, layer.head.name)
        made = {
            "qweight": join_low_first(codes_tiling(n, k).lay(codes)).view(torch.int8),
            "smooth_factor": torch.ones(k, dtype=dtype),
            "proj_down": down_tiling(self.rank, k).lay(branch.down),
            "proj_up": up_tiling(n, self.rank).lay(branch.up),
        }
        if self.precision == "int4":
            scale = view_bytes(layer.block_scale, torch.bfloat16).to(dtype)
            return made | {"wscales": vector_tiling(n, k // _GROUP["int4"]).lay(scale)}
        tensor_scale, channel_scale = split_scale(layer.global_scale, dtype)
        micro = micro_tiling(n, k // _GROUP["nvfp4"]).lay(layer.block_scale)
        return made | {
            "wscales": micro.view(torch.float8_e4m3fn),
            "wtscale": tensor_scale,
            "wcscales": channel_scale.expand(n).contiguous(),
        }

    def decode(self, tensors: Tensors, head: Head) -> Decoded:
        """Return what the kernels compute with, by their formulas."""
        if _is_awq(head):
            awq = read_awq(tensors, head.name, head.shape)
            zeros = awq.zeros.float().repeat_interleave(_GROUP["int4"], 1)
            return Decoded(per_block(awq.codes.float(), awq.scale) + zeros)
        svdq = read_svdq(tensors, head.name, head.shape)
        values = signed_values if svdq.above is None else e2m1_values
        above = 1.0 if svdq.above is None else svdq.above
        return Decoded(per_block(values(svdq.codes), svdq.scale.float() * above), svdq.branch)

    def lay_bias(self, head: Head, bias: Tensor) -> Tensor:
        """Return the bias in the order of the rows; AWQ has it plain."""
        if _is_awq(head):
            return bias
        return vector_tiling(head.shape[0]).lay(bias)

    def config(self) -> dict[str, Any]:
        """Return `config.json`; a section without layers would be an error."""
        svdq = [head.name for head in self.held if not _is_awq(head)]
        awq = [head.name for head in self.held if _is_awq(head)]
        quantization: dict[str, Any] = {
            "quant_method": "nunchaku_lite",
            "compute_dtype": str(self.job.new_dtype).removeprefix("torch."),
        }
        if svdq and self.precision:
            quantization["svdq_w4a4"] = {
                "precision": self.precision,
                "group_size": _GROUP[self.precision],
                "rank": self.rank,
                "targets": svdq,
            }
        if awq:
            quantization["awq_w4a16"] = {"precision": "int4", "group_size": 64, "targets": awq}
        return {**self.job.config, "quantization_config": quantization}


def split_scale(scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two numbers of a dtype whose product is nearest to a positive fp32 number.

    NVFP4's global scale is one number of 16 bits for the matrix, times one for each row. A power of
    two is exact; the product of two numbers of bf16 hits any other within 3e-4.
    """
    steps = torch.arange(1, 2, torch.finfo(dtype).eps, dtype=torch.float64)
    rows = steps.to(dtype)
    whole = (scale.double() / rows.double()).to(dtype)
    error = (whole.double() * rows.double() - scale.double()).abs()
    best = int(error.argmin())
    return whole[best : best + 1].clone(), rows[best : best + 1].clone()


def _is_awq(head: Head) -> bool:
    """Return whether a layer runs on 16-bit activations there: INT4, no branch, none asked for."""
    return head.scheme.weight == "int4" and head.scheme.activation == "bf16" and not head.rank


def _misfit(head: Head) -> str:
    """Return why no file of Nunchaku holds the format of a layer."""
    if head.scheme.weight not in _GROUP:
        return f"{head.scheme.weight} is neither INT4 in blocks of 64 nor NVFP4"
    if head.is_modulation and not _is_awq(head):
        return "a modulation would run on 4-bit activations there, unless it has no branch"
    return ""
