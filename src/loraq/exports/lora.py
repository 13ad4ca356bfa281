"""The branch as a LoRA file, for targets that hold the main weight and put adapters beside it."""

import json
import re

from torch import Tensor

from loraq.exports.factors import cast_factors
from loraq.exports.layer import Decoded, Factors, Head, Layer, Specs, Tensors
from loraq.exports.target import BranchFile, Target
from loraq.safetensors.header import DTYPE_NAMES, TensorSpec

_INCOMPLETE = "Without `{}` the model runs and is wrong. Its strength is 1.0, always."
_MERGED = (
    "Never fuse or merge it ({}): the sum is rounded to 4 bits again, which is worse than having "
    "no branch."
)
#: What diffusers puts beside the layers of a model.
OF_DIFFUSERS = BranchFile(
    "branch.safetensors",
    "transformer",
    load='model.load_lora_adapter("{folder}/branch.safetensors", prefix="transformer", '
    'adapter_name="loraq")',
    traps=(
        _INCOMPLETE.format("branch.safetensors"),
        _MERGED.format("`fuse_lora`, `merge_and_unload`, a loader that merges"),
        "diffusers: a LoRA that is loaded later becomes the only active one, which switches the "
        'branch off without an error. Then call `set_adapters(["loraq", "other"])`, with every '
        "adapter named; or let `loraq export --lora FILE` put the other one into the branch.",
    ),
)
#: The same by PEFT alone, for classes of diffusers that take no LoRA, such as PixArt's.
OF_PEFT = BranchFile(
    "adapter_model.safetensors",
    "base_model.model",
    load="\nimport peft\n\n"
    'peft.PeftModel.from_pretrained(model, "{folder}", autocast_adapter_dtype=False)',
    traps=(
        _INCOMPLETE.format("adapter_model.safetensors"),
        _MERGED.format("`merge_adapter`, `merge_and_unload`"),
        "PEFT changes the layers of `model` itself, which stays what a pipeline takes.",
    ),
)


class BranchBeside(Target):
    """Base of targets that hold the main weight; the branch is a LoRA in a file of its own."""

    @property
    def branch_file(self) -> BranchFile | None:
        """The file of the branch, unless no layer has one."""
        if not any(head.rank for head in self.held):
            return None
        file = self.about.branch_file
        is_taken = file is not OF_DIFFUSERS or hasattr(self.job.model, "load_lora_adapter")
        return file if is_taken else OF_PEFT

    def main_tensors(self, layer: Layer) -> dict[str, Tensor]:
        """Return the tensors of `specs`."""
        raise NotImplementedError

    def decode_main(self, tensors: Tensors, head: Head) -> Tensor:
        """Return the main weight that the target computes with."""
        raise NotImplementedError

    def branch_specs(self, head: Head) -> Specs:
        """Return the factors in the LoRA file; none for a layer without a branch."""
        if not head.rank:
            return {}
        (n, k), (down, up) = head.shape, self._names(head)
        kind = DTYPE_NAMES[self.job.new_dtype]
        return {down: TensorSpec(kind, (head.rank, k)), up: TensorSpec(kind, (n, head.rank))}

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """Return the main weight, and the factors; without alphas the scale is 1."""
        made = self.main_tensors(layer)
        if layer.branch is None:
            return made
        down, up = self._names(layer.head)
        cast = cast_factors(layer.branch, self.job.new_dtype, layer.head.name)
        return {**made, down: cast.down, up: cast.up}

    def decode(self, tensors: Tensors, head: Head) -> Decoded:
        """Return the main weight, and what a LoRA adds: x Aᵀ Bᵀ beside the layer, alpha = rank."""
        main = self.decode_main(tensors, head)
        if not head.rank:
            return Decoded(main)
        down, up = (tensors[name].float() for name in self._names(head))
        return Decoded(main, Factors(up, down))

    def texts(self, folder: str) -> dict[str, str]:
        """Return what PEFT reads beside the factors: the rank of each layer, which is its alpha."""
        if self.branch_file is not OF_PEFT:
            return {}
        ranks = {head.name: head.rank for head in self.held if head.rank}
        largest = max(ranks.values())
        exact = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
        config = {
            "peft_type": "LORA",
            "r": largest,
            "lora_alpha": largest,
            "target_modules": list(ranks),
            "rank_pattern": exact,
            "alpha_pattern": exact,
            "inference_mode": True,
        }
        return {"adapter_config.json": json.dumps(config, indent=2) + "\n"}

    def _names(self, head: Head) -> tuple[str, str]:
        assert self.branch_file is not None, "a layer with a branch has a file for it"
        owner = f"{self.branch_file.prefix}.{head.name}"
        return f"{owner}.lora_A.weight", f"{owner}.lora_B.weight"
