"""Target `torchao`: NVFP4 tensors of torchao in a folder of diffusers, the branch as a LoRA."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loraq.exports.codes import e2m1_values, per_block, split_low_first
from loraq.exports.layer import Head, Layer, Specs, Tensors
from loraq.exports.lora import OF_DIFFUSERS, BranchBeside
from loraq.exports.target import EXACT_IN_16_BITS, LOAD_FOLDER, About
from loraq.safetensors.header import TensorSpec

_PARTS = {"qdata": "_weight_qdata", "scale": "_weight_scale"}
_PER_TENSOR = "_weight_per_tensor_scale"
#: Values that share a block scale.
_BLOCK = 16
#: Lines that bring the rows of every input together.
_CONTIGUOUS = """for layer in model.modules():
    if isinstance(layer, torch.nn.Linear):
        layer.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))"""


class Torchao(BranchBeside):
    """A folder of diffusers with `quant_method: torchao`."""

    about = About(
        name="torchao",
        loaded_by="diffusers with torchao 0.18, and PEFT for classes that take no LoRA (PixArt)",
        holds="NVFP4; any rank in each layer; no 1×1 convolutions",
        exact=EXACT_IN_16_BITS,
        activations="16 bits",
        verified="whole models (FLUX, SANA, PixArt) by diffusers, torchao and PEFT on a CPU",
        unverified="GPU kernels, and 4-bit activations on Blackwell, which are not written",
        load=f"{LOAD_FOLDER}\n{_CONTIGUOUS}",
        traps=(
            "torchao has no product of these tensors with an input whose rows are apart in memory, "
            "which SANA, SD3, FLUX.2 and others make: the loop above is for them.",
            "torchao calls these tensors a prototype: another minor version may not read them.",
        ),
        branch_file=OF_DIFFUSERS,
    )

    def refuses(self, head: Head) -> str:
        """Return why a layer is dense."""
        if head.scheme.weight != "nvfp4":
            return f"torchao runs NVFP4 weights here, and this is {head.scheme.weight}"
        return ""

    def specs(self, head: Head) -> Specs:
        """Return the parts of one tensor."""
        n, k = head.shape
        return {
            f"{head.name}.{_PARTS['qdata']}": TensorSpec("U8", (n, k // 2)),
            f"{head.name}.{_PARTS['scale']}": TensorSpec("F8_E4M3", (n, k // _BLOCK)),
            f"{head.name}.{_PER_TENSOR}": TensorSpec("F32", ()),
        }

    def main_tensors(self, layer: Layer) -> dict[str, Tensor]:
        """Return our own bytes under their names."""
        name = layer.head.name
        return {
            f"{name}.{_PARTS['qdata']}": layer.main.packed,
            f"{name}.{_PARTS['scale']}": layer.block_scale.view(torch.float8_e4m3fn),
            f"{name}.{_PER_TENSOR}": layer.global_scale,
        }

    def decode_main(self, tensors: Tensors, head: Head) -> Tensor:
        """Return E2M1 · (scale · per-tensor scale)."""
        values = e2m1_values(split_low_first(tensors[f"{head.name}.{_PARTS['qdata']}"]))
        scale = tensors[f"{head.name}.{_PARTS['scale']}"].float()
        return per_block(values, scale * tensors[f"{head.name}.{_PER_TENSOR}"])

    def config(self) -> dict[str, Any]:
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

    def metadata(self, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
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
        parts = {name for head in self.held for name in self.specs(head)}
        entries: dict[str, Any] = {name: {"_type": "Tensor"} for name in specs if name not in parts}
        entries |= {f"{head.name}.weight": tensor for head in self.held}
        text = {name: json.dumps(entry) for name, entry in entries.items()}
        return {**text, "tensor_names": json.dumps(list(text))}
