"""Names that other trainers write: diffusers' own converters, which must not lose anything.

kohya, xlabs, OneTrainer, ComfyUI and others name layers as their own code calls them, and join what
diffusers splits. diffusers has one converter for each model; it is a class method of the pipeline's
LoRA mixin. A converter may drop with a warning what it does not know, and a LoRA that is absorbed
in part is a wrong one: so the tensors record a graph, which tells which of them reached the result.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraq.errors import CheckpointError
from loraq.integrations.diffusers import _quiet_diffusers

_MIXIN = "LoraLoaderMixin"
#: What the mixin is called after, for models whose own name does not begin so.
_CALLED_AFTER = {
    "ChromaTransformer2DModel": "Flux",
    "ChronoEditTransformer3DModel": "Wan",
    "MochiTransformer3DModel": "Mochi1",
    "UNet2DConditionModel": "StableDiffusionXL",  # it also reads all that StableDiffusion's does
    "UNetMotionModel": "StableDiffusionXL",
}


def convert_names(
    tensors: Mapping[str, Tensor], model: nn.Module, file: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a LoRA under diffusers' names, and those that the converter left out.

    Args:
        tensors: as they are in the file.
        model: what the LoRA is for; its class chooses the converter.
        file: where they are from, for messages.

    Returns:
        Tensors in fp32, with the scales multiplied in where the converter does so; and the names of
        factors that have no part in them. Without a converter for the model, all as it was.

    Raises:
        CheckpointError: the converter does not understand the names.
        LoraqError: diffusers is not installed.
    """
    with _quiet_diffusers():
        from diffusers.loaders import lora_pipeline
        from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

        mixin = find_mixin(vars(lora_pipeline), type(model).__name__)
        if mixin is None:
            return dict(tensors), []
        # fp32, because converters multiply, and 8-bit floats cannot. An alpha is read as a number,
        # which leaves the graph.
        marked = {
            name: tensor.detach()
            .float()
            .requires_grad_(tensor.ndim > 0 and not name.endswith(".alpha"))
            for name, tensor in tensors.items()
        }
        try:
            with torch.enable_grad():
                found = mixin.lora_state_dict(
                    dict(marked), return_alphas=True, unet_config=getattr(model, "config", None)
                )
        except Exception as error:  # converters raise what they like on files they do not know
            raise CheckpointError(
                f"'{file}': diffusers' converter of LoRAs for {type(model).__name__} does not "
                f"understand the names ({type(error).__name__}: {error}). Is the LoRA for this "
                "model? Only a plain LoRA can be absorbed or appended."
            ) from error
    weights, alphas = found if isinstance(found, tuple) else (found, None)
    alphas = alphas or {}
    if not any("lora_A" in name for name in weights):  # as diffusers does before it loads them
        weights, alphas = (convert_unet_state_dict_to_peft(part) for part in (weights, alphas))
    reached = _find_leaves(weights.values())
    left_out = [name for name, t in marked.items() if t.requires_grad and id(t) not in reached]
    converted = {name: tensor.detach() for name, tensor in weights.items()}
    for name, alpha in alphas.items():  # of a layer, or (UNets) of its first factor
        layer = name.removesuffix(".alpha").split(".lora_A.")[0]
        converted[f"{layer}.alpha"] = torch.as_tensor(alpha).detach()
    return converted, left_out


def find_mixin(names: Mapping[str, Any], model: str) -> Any:
    """Return the LoRA mixin of a model's class: that of the longest name which its own begins with.

    diffusers has no table of them; its names agree: `Flux2LoraLoaderMixin` is for
    `Flux2Transformer2DModel`. The few that do not are in a table here.

    Args:
        names: what `diffusers.loaders.lora_pipeline` has.
        model: name of the class.

    Returns:
        The mixin, or `None` if there is none for the class.
    """
    if model in _CALLED_AFTER:
        return names[_CALLED_AFTER[model] + _MIXIN]
    stems = [name.removesuffix(_MIXIN) for name in names if name.endswith(_MIXIN)]
    fitting = [stem for stem in stems if stem and model.startswith(stem)]
    return names[max(fitting, key=len) + _MIXIN] if fitting else None


def _find_leaves(results: Iterable[Tensor]) -> set[int]:
    """Return the ids of the tensors that results were computed from, or are."""
    leaves = set()
    todo = []
    for tensor in results:
        leaves.add(id(tensor))
        todo.append(tensor.grad_fn)
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where the graph ends, at a tensor that came in
            leaves.add(id(node.variable))
        todo += [before for before, _ in node.next_functions]
    return leaves
