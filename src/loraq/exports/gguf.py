"""Target `gguf`: one GGUF file with the main weights, and the branch as a LoRA beside it."""

from functools import cached_property

import torch
from torch import Tensor

from loraq.errors import ExportError
from loraq.exports.ggml import BLOCK, Q4_0, Q5_0, Q8_0, BlockType
from loraq.exports.gguf_file import PLAIN_TYPES, GgufLayout, GgufTensor
from loraq.exports.layer import Head, Layer, Specs, Tensors
from loraq.exports.lora import OF_DIFFUSERS, BranchBeside
from loraq.exports.target import About, most_common
from loraq.formats.block import BlockFormat
from loraq.formats.packing import unpack
from loraq.formats.scales import FP32_SCALE
from loraq.safetensors.header import DTYPES, TensorSpec
from loraq.version import __version__

#: What other programs call the classes that they know; diffusers does not look.
_ARCHITECTURES = {
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "WanTransformer3DModel": "wan",
    "QwenImageTransformer2DModel": "qwen_image",
    "Lumina2Transformer2DModel": "lumina2",
    "LTXVideoTransformer3DModel": "ltxv",
    "HunyuanVideoTransformer3DModel": "hyvid",
    "CosmosTransformer3DModel": "cosmos",
}
#: By the bits of an integer code.
_TYPES = {4: Q4_0, 5: Q5_0, 8: Q8_0}
#: A block of zeros has the smallest scale that its format has, whatever that becomes.
_OF_ZEROS = 2.0**-126


class Gguf(BranchBeside):
    """A single file of ggml's blocks, in the names of diffusers."""

    about = About(
        name="gguf",
        loaded_by="diffusers (classes that it loads from a single file)",
        holds="INT4 and MXINT4 as Q4_0, INT5 as Q5_0, MXINT8 and INT8 as Q8_0, in blocks of a "
        "multiple of 32; any rank in each layer; no 1×1 convolutions, no FP4",
        exact="codes and scales (INT8 rows: scales rounded to fp16); branches of bf16, MX "
        "formats and NVFP4. diffusers multiplies codes and scales in fp16: exact for Q4_0 and "
        "MXINT8, rounded to 11 bits for INT5 and INT8",
        activations="16 bits",
        verified="every block by gguf-py; whole models (FLUX, SANA) by diffusers and PEFT on a CPU",
        unverified="ComfyUI-GGUF and stable-diffusion.cpp, which know the blocks but need a "
        "model's original names, which are not written",
        load="import diffusers\nimport torch\n\n"
        "config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.{dtype})\n"
        "model = diffusers.{model_class}.from_single_file(\n"
        '    "{folder}/model.gguf", config="{folder}", quantization_config=config,\n'
        "    torch_dtype=torch.{dtype},\n)",
        branch_file=OF_DIFFUSERS,
    )
    one_file = "model.gguf"

    def refuses(self, head: Head) -> str:
        """Return why a layer is dense."""
        fmt = head.main
        if fmt is None or fmt.element.is_float or fmt.bits not in _TYPES:
            return f"{head.scheme.weight} has no type in GGUF that diffusers reads"
        if head.block % BLOCK:
            return f"blocks of {head.block}: multiples of 32 are needed"
        if head.stored in self._out_of_range:
            return "a scale is no number of fp16"
        return ""

    @cached_property
    def _out_of_range(self) -> set[str]:
        """Layers with a scale that fp16 does not have; rows in fp32 are rounded instead."""
        found = set()
        for head in self.job.heads:
            fmt = head.main
            if fmt is None or fmt.element.is_float or fmt.scale_format is FP32_SCALE:
                continue
            scale = self.job.read_scale(head) * 2.0**-fmt.element.mantissa_bits
            if not ((scale.half().float() == scale) | (scale.abs() <= _OF_ZEROS)).all():
                found.add(head.stored)
        return found

    def explain_rounding(self, head: Head) -> str:
        """Return what of a layer is rounded."""
        if head.main is not None and head.main.scale_format is FP32_SCALE:
            return "scales rounded to fp16"
        return super().explain_rounding(head)

    def specs(self, head: Head) -> Specs:
        """Return the blocks, as raw bytes."""
        n, k = head.shape
        return {f"{head.name}.weight": TensorSpec("U8", (n, _type_of(head).row_bytes(k)))}

    def main_tensors(self, layer: Layer) -> dict[str, Tensor]:
        """Return the blocks."""
        head, main = layer.head, layer.main
        fmt, k = main.format, head.shape[1]
        assert isinstance(fmt, BlockFormat)
        codes = unpack(main.packed, k, fmt.bits).int()
        codes = torch.where(codes >= 1 << fmt.bits - 1, codes - (1 << fmt.bits), codes)
        scale = fmt.code_scales(main).squeeze(-1)
        scale = scale.repeat_interleave(head.block // BLOCK, 1)[:, : k // BLOCK]
        return {f"{head.name}.weight": _type_of(head).encode(codes, scale)}

    def decode_main(self, tensors: Tensors, head: Head) -> Tensor:
        """Return d · c."""
        return _type_of(head).decode(tensors[f"{head.name}.weight"])

    def dense_spec(self, head: Head) -> TensorSpec:
        """Return fp32 for a convolution, which cannot hold what GGUF calls quantized."""
        spec = super().dense_spec(head)
        return TensorSpec("F32", spec.shape) if head.is_conv else spec

    def kept_dtype(self, name: str, dtype: str, shape: tuple[int, ...]) -> str:
        """Return fp32, but for weights of linear layers.

        diffusers takes BF16 for quantized, and only linear layers hold that.
        """
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and self.job.floats.get(owner) == "Linear":
            return super().kept_dtype(name, dtype, shape)
        return "F32" if DTYPES[dtype].is_floating_point else dtype

    def layout(self, specs: Specs, shard_bytes: int) -> GgufLayout:
        """Lay out the one file."""
        held = {f"{head.name}.weight": head for head in self.held}
        tensors = {}
        for name, spec in specs.items():
            if name in held:
                kind, shape = _type_of(held[name]).number, held[name].shape
                tensors[name] = GgufTensor(kind, shape, spec.nbytes)
                continue
            if spec.dtype not in PLAIN_TYPES:
                raise ExportError(
                    f"Tensor '{name}' is {spec.dtype}, which GGUF does not have. Use `--to sdnq`."
                )
            tensors[name] = GgufTensor(PLAIN_TYPES[spec.dtype], spec.shape, spec.nbytes)
        chosen = most_common(self.held, _type_of)
        fields: dict[str, str | int] = {
            "general.architecture": _ARCHITECTURES.get(self.job.model_class, "diffusers"),
            "general.quantization_version": 2,
            "general.file_type": chosen.file_type if chosen else 0,
            "general.description": f"{self.job.model_class}, by loraq {__version__}; the model is "
            "whole only with branch.safetensors",
        }
        return GgufLayout.of(tensors, self.one_file, fields)


def _type_of(head: Head) -> BlockType:
    return _TYPES[head.scheme.weight_format.bits]
