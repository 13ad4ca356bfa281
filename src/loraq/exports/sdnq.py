"""Target `sdnq`: SD.Next's quantizer, which diffusers loads and which has a low-rank branch.

By tensor, for a layer (N, K) in blocks of B:

    weight      uint8, flat      int4: code + 8; float4_e2m1fn: the code; element 2j in the low half
    scale       (N, K/B, 1), of a 1×1 convolution (N, K/B, 1, 1, 1)
    svd_up      (N, R)
    svd_down    (R, K)
"""

from typing import Any

from torch import Tensor

from loraq.exports.codes import e2m1_values, offset_codes, per_block, split_low_first
from loraq.exports.factors import cast_factors, pad_rank
from loraq.exports.layer import Decoded, Factors, Head, Layer, Specs, Tensors
from loraq.exports.target import EXACT_IN_16_BITS, LOAD_FOLDER, About, Job, Target, most_common
from loraq.formats.block import BlockFormat
from loraq.formats.element import E2M1
from loraq.safetensors.header import DTYPE_NAMES, TensorSpec

#: The release whose files were compared.
VERSION = "0.2.8"


class Sdnq(Target):
    """A folder of diffusers with `quant_method: sdnq`."""

    about = About(
        name="sdnq",
        loaded_by="diffusers 0.40 and newer with the package sdnq, SD.Next",
        holds="INT4 (any block), MXINT4, MXFP4, NVFP4; any rank in each layer; 1×1 convolutions; "
        "one format and block size a file",
        exact=f"{EXACT_IN_16_BITS}; int8 and fp16 branches are rounded to bf16 (`--dtype float32` "
        "holds them)",
        activations="16 bits; sdnq can be told to use INT8 matrices",
        verified="whole models (FLUX, SANA, PixArt) by diffusers and sdnq 0.2.8 on a CPU",
        unverified="GPU kernels",
        load=f"# pip install sdnq\n{LOAD_FOLDER}",
        traps=(
            f"The file is that of sdnq {VERSION}; other releases may read it another way.",
            "MXFP4 and NVFP4 take fp32 block scales there, 0.75 and 1.5 bits more a weight than "
            "INT4 has: quantize as INT4 for this target.",
        ),
    )

    def __init__(self, job: Job) -> None:
        """Settle the one format of the file: that of most weights."""
        super().__init__(job)
        able = [head for head in self.within if not _misfit(head)]
        self.chosen = most_common(able, _kind_of)

    def refuses(self, head: Head) -> str:
        """Return why a layer is dense."""
        if reason := _misfit(head):
            return reason
        kind, block = _kind_of(head)
        if (kind, block) != self.chosen:
            return f"{kind} in blocks of {block} beside {self.chosen[0]} of {self.chosen[1]}"
        return ""

    def specs(self, head: Head) -> Specs:
        """Return the tensors of a layer; one without a branch has one of rank 1 and zeros."""
        (n, k), rank, kind = head.shape, max(1, head.rank), DTYPE_NAMES[self.job.new_dtype]
        ones = (1, 1, 1) if head.is_conv else (1,)
        scale = "BF16" if _kind_of(head)[0] == "int4" else "F32"
        return {
            f"{head.name}.weight": TensorSpec("U8", (n * k // 2,)),
            f"{head.name}.scale": TensorSpec(scale, (n, k // head.block, *ones)),
            f"{head.name}.svd_up": TensorSpec(kind, (n, rank)),
            f"{head.name}.svd_down": TensorSpec(kind, (rank, k)),
        }

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """Return codes, scales and factors."""
        head, main = layer.head, layer.main
        assert isinstance(main.format, BlockFormat)
        scale = main.format.scales(main)
        packed = main.packed
        if _kind_of(head)[0] == "int4":
            packed = offset_codes(packed)
            # The codes of an MX integer have digits after the point; a bf16 or E8M0 scale is
            # a number of bf16, and so is its product with a power of two.
            scale = (scale * 2.0**-main.format.element.mantissa_bits).bfloat16()
        rank = max(1, head.rank)
        branch = cast_factors(
            pad_rank(layer.branch, rank, head.shape), self.job.new_dtype, head.name
        )
        shape = self.specs(head)[f"{head.name}.scale"].shape
        return {
            f"{head.name}.weight": packed.flatten(),
            f"{head.name}.scale": scale.reshape(shape),
            f"{head.name}.svd_up": branch.up,
            f"{head.name}.svd_down": branch.down,
        }

    def decode(self, tensors: Tensors, head: Head) -> Decoded:
        """Return (code − 8) · scale or E2M1 · scale, and the branch."""
        (n, k), name = head.shape, head.name
        codes = split_low_first(tensors[f"{name}.weight"]).view(n, k)
        values = (codes - 8).float() if _kind_of(head)[0] == "int4" else e2m1_values(codes)
        main = per_block(values, tensors[f"{name}.scale"].view(n, -1))
        up, down = tensors[f"{name}.svd_up"], tensors[f"{name}.svd_down"]
        return Decoded(main, Factors(up.float(), down.float()))

    def config(self) -> dict[str, Any]:
        """Return `config.json` with what sdnq reads.

        sdnq quantizes whatever its own lists and its smallest size do not leave out, so that both
        are switched off, and every layer that is float is named.
        """
        kind, block = self.chosen or ("int4", 64)
        names = {head.name for head in self.held}
        dense = [head.name for head in self.job.heads if head.name not in names]
        kept = sorted({*self.job.floats, *dense})
        quantization = {
            "quant_method": "sdnq",
            "sdnq_version": VERSION,
            "weights_dtype": kind,
            "group_size": block,
            "use_svd": True,
            "svd_rank": most_common(self.held, lambda head: max(1, head.rank)) or 1,
            "use_quantized_matmul": False,
            "quant_conv": any(head.is_conv for head in self.held),
            "add_skip_keys": False,
            "minimum_allowed_numel": 0,
            "minimum_allowed_channel_size": 0,
            "is_integer": kind == "int4",
            "is_unsigned": False,
            "dequantize_fp32": True,
            "modules_to_not_convert": [f"{name}.weight" for name in kept],
        }
        return {**self.job.config, "quantization_config": quantization}


def _kind_of(head: Head) -> tuple[str, int]:
    """Return sdnq's name for the elements of a layer, and the values that share a scale."""
    fmt = head.main
    return ("float4_e2m1fn" if fmt is not None and fmt.element == E2M1 else "int4"), head.block


def _misfit(head: Head) -> str:
    """Return why no file of sdnq holds the format of a layer."""
    fmt = head.main
    if fmt is None or fmt.bits != 4:
        return f"{head.scheme.weight} is not a 4-bit format"
    return ""
