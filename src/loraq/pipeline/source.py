"""What is quantized: a float checkpoint, its tensors checked, its layers planned."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from loraq.errors import CheckpointError, RecipeError
from loraq.pipeline.layer import hash_tensor
from loraq.pipeline.plan import Plan
from loraq.safetensors.reader import ShardReader, TensorReader


@dataclass(frozen=True)
class Source:
    """A float checkpoint: its tensors, checked against its configuration, and what goes along."""

    #: The files as they are.
    files: ShardReader
    #: The tensors under the names of the model.
    reader: TensorReader
    #: Names of all tensors to write, in the order of the model.
    names: tuple[str, ...]
    #: Names that share the tensor of another name.
    tied: dict[str, str]
    #: What `config.json` of the target says; empty for none.
    config: dict[str, Any]
    #: What its linear layers get.
    plan: Plan
    #: Files to copy, by their path in the target: the other components of a pipeline.
    others: dict[str, Path] = field(default_factory=dict)
    #: Where the transformer goes in the target: a folder's name, or "" for the target itself.
    component: str = ""

    def require_layers(self) -> None:
        """Raise `RecipeError` if no layer is quantized."""
        if not self.plan.quantized:
            raise RecipeError(
                f"Nothing to quantize: {len(self.plan.layers)} linear layers were found, and all "
                "are skipped. `loraq plan` shows why; a rule with `skip = false` overrides."
            )

    def hash_weights(self) -> dict[str, str]:
        """Read every tensor once, and return the hash of the weight of every quantized layer.

        Raises:
            CheckpointError: a number is not finite, or a tensor cannot be read.
        """
        layers = {f"{job.name}.weight": job.name for job in self.plan.quantized}
        hashes = {}
        for name in self.names:
            tensor = self.reader.read(name)
            _require_finite(name, tensor)
            if name in layers:
                hashes[layers[name]] = hash_tensor(tensor)
        return hashes


def _require_finite(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # A NaN makes both the smallest and the largest value NaN; this runs at the memory's speed.
    least, most = tensor.aminmax()
    if least.isfinite() and most.isfinite():
        return
    index = tuple(int(i) for i in (~tensor.isfinite()).nonzero()[0])
    raise CheckpointError(
        f"Tensor '{name}' has a value that is not a finite number: {tensor[index].item()} at "
        f"{index}. Repair the source, or download it again."
    )
