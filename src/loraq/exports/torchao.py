"""Target `torchao`: NVFP4 tensors of torchao in a folder of diffusers, the branch as a LoRA."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraq.exports import lora
from loraq.exports.codes import e2m1_values, per_block, split_low_first
from loraq.exports.factors import explain_rounding
from loraq.exports.layer import Decoded, Head, Layer, Specs, Tensors
from loraq.exports.target import LOAD_IN_16_BITS, About, Target
from loraq.formats.scales import view_bytes
from loraq.safetensors.header import TensorSpec

_PARTS = {"qdata": "_weight_qdata", "scale": "_weight_scale"}
_PER_TENSOR = "_weight_per_tensor_scale"
#: Values that share a block scale.
_BLOCK = 16


class Torchao(Target):
    """A folder of diffusers with `quant_method: torchao`."""

    about = About(
        name="torchao",
        loaded_by="diffusers with torchao 0.18",
        holds="NVFP4; any rank in each layer; no 1×1 convolutions",
        exact="codes and scales; branches of bf16, MX formats and NVFP4",
        activations="16 bits",
        verified="whole models (FLUX) by diffusers, torchao and PEFT on a CPU",
        unverified="GPU kernels, and 4-bit activations on Blackwell, which are not written",
        load=f"{LOAD_IN_16_BITS}\n{lora.LOAD}",
        traps=(
            *lora.TRAPS,
            "torchao calls these tensors a prototype: another minor version may not read them.",
        ),
    )
    has_branch_file = True

    def refuses(self, head: Head) -> str:
        """Return why a layer is dense."""
        if head.scheme.weight != "nvfp4":
            return f"torchao runs NVFP4 weights here, and this is {head.scheme.weight}"
        return ""

    def explain_rounding(self, head: Head) -> str:
        """Return what of the branch is rounded."""
        return explain_rounding(head, self.job.new_dtype)

    def specs(self, head: Head) -> Specs:
        """Return the parts of one tensor."""
        n, k = head.shape
        return {
            f"{head.name}.{_PARTS['qdata']}": TensorSpec("U8", (n, k // 2)),
            f"{head.name}.{_PARTS['scale']}": TensorSpec("F8_E4M3", (n, k // _BLOCK)),
            f"{head.name}.{_PER_TENSOR}": TensorSpec("F32", ()),
        }

    def branch_specs(self, head: Head) -> Specs:
        """Return the factors in the LoRA file."""
        return lora.lora_specs(head, self.job.new_dtype)

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """Return our own bytes under their names, and the factors."""
        name, main = layer.head.name, layer.main
        assert main.scale is not None, "NVFP4 has block scales"
        assert main.global_scale is not None, "NVFP4 has a global scale"
        return {
            f"{name}.{_PARTS['qdata']}": main.packed,
            f"{name}.{_PARTS['scale']}": main.scale.view(torch.float8_e4m3fn),
            f"{name}.{_PER_TENSOR}": view_bytes(main.global_scale, torch.float32)[0].clone(),
            **lora.lora_tensors(layer, self.job.new_dtype),
        }

    def decode(self, tensors: Tensors, head: Head) -> Decoded:
        """Return E2M1 · (scale · per-tensor scale), and the LoRA."""
        values = e2m1_values(split_low_first(tensors[f"{head.name}.{_PARTS['qdata']}"]))
        scale = tensors[f"{head.name}.{_PARTS['scale']}"].float()
        main = per_block(values, scale * tensors[f"{head.name}.{_PER_TENSOR}"])
        return Decoded(main, lora.decode_lora(tensors, head.name))

    def config(self, held: Sequence[Head]) -> dict[str, Any]:
        """Return `config.json`."""
        kind = {
            "_type": "NVFP4WeightOnlyConfig",
            "_version": 1,
            "_data": {"use_dynamic_per_tensor_scale": True},
        }
        quantization = {
            "quant_method": "torchao",
            "quant_type": {"default": kind},
            "modules_to_not_convert": None,
        }
        return {**self.job.config, "quantization_config": quantization}

    def metadata(self, specs: Mapping[str, TensorSpec], held: Sequence[Head]) -> dict[str, str]:
        """Return what torchao builds its tensors from: an entry for every tensor."""
        dtype = str(self.job.new_dtype).removeprefix("torch.")
        tensor = {
            "_type": "NVFP4Tensor",
            "_data": {
                "is_swizzled_scales": False,
                "use_triton_kernel": False,
                "act_quant_kwargs": None,
                "block_size": _BLOCK,
                "orig_dtype": {"_type": "torch.dtype", "_data": dtype},
            },
            "_tensor_data_names": ["per_tensor_scale", *_PARTS],
        }
        parts = {name for head in held for name in self.specs(head)}
        entries: dict[str, Any] = {name: {"_type": "Tensor"} for name in specs if name not in parts}
        entries |= {f"{head.name}.weight": tensor for head in held}
        text = {name: json.dumps(entry) for name, entry in entries.items()}
        return {**text, "tensor_names": json.dumps(list(text))}
