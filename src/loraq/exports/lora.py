"""The branch as a LoRA file, for targets that hold the main weight and put adapters beside it."""

import torch
from torch import Tensor

from loraq.exports.factors import cast_factors
from loraq.exports.layer import Factors, Head, Layer, Specs, Tensors
from loraq.safetensors.header import DTYPE_NAMES, TensorSpec

#: Name of the file, without its extension.
STEM = "branch"

#: What a model card must say of it.
#: Python that puts the branch beside the layers of `model`.
LOAD = (
    'model.load_lora_adapter("{folder}/branch.safetensors", prefix="transformer", '
    'adapter_name="loraq")'
)
TRAPS = (
    "Without `branch.safetensors` the model runs and is wrong. Its strength is 1.0, always.",
    "Never fuse or merge it (`fuse_lora`, `merge_and_unload`, a loader that merges): the sum is "
    "rounded to 4 bits again, which is worse than having no branch.",
    "diffusers: a LoRA that is loaded later becomes the only active one, which switches the branch "
    'off without an error. Then call `set_adapters(["loraq", "other"])`, with every adapter named; '
    "or let `loraq export --lora FILE` put the other one into the branch.",
)


def lora_specs(head: Head, dtype: torch.dtype, model: str = "transformer") -> Specs:
    """Return the tensors of a layer's branch; none for a layer without one.

    Args:
        head: the layer.
        dtype: of both factors.
        model: what the loader calls the model, in front of the layer's name.
    """
    if not head.rank:
        return {}
    down, up = _names(head.name, model)
    kind = DTYPE_NAMES[dtype]
    return {
        down: TensorSpec(kind, (head.rank, head.shape[1])),
        up: TensorSpec(kind, (head.shape[0], head.rank)),
    }


def lora_tensors(layer: Layer, dtype: torch.dtype, model: str = "transformer") -> dict[str, Tensor]:
    """Return the factors of `lora_specs`; without alphas the scale is 1."""
    if layer.branch is None:
        return {}
    down, up = _names(layer.head.name, model)
    cast = cast_factors(layer.branch, dtype, layer.head.name)
    return {down: cast.down, up: cast.up}


def decode_lora(tensors: Tensors, name: str, model: str = "transformer") -> Factors | None:
    """Return what a loader of LoRAs computes with: x Aᵀ Bᵀ beside the layer, alpha = rank."""
    down, up = _names(name, model)
    return Factors(tensors[up].float(), tensors[down].float()) if up in tensors else None


def _names(layer: str, model: str) -> tuple[str, str]:
    return f"{model}.{layer}.lora_A.weight", f"{model}.{layer}.lora_B.weight"
