"""Target `dense`: every layer as a float weight again."""

from torch import Tensor

from loraq.exports.layer import Decoded, Head, Layer, Specs, Tensors
from loraq.exports.target import About, Target


class Dense(Target):
    """Effective weights, main plus branch, rotated back, in the source's own layout."""

    about = About(
        name="dense",
        loaded_by="diffusers, and whatever reads float weights",
        holds="every format, rank and rotation",
        exact="rounded once to bf16 or fp16, as any checkpoint is; `--dtype float32` is not",
        activations="16 or 32 bits, nothing is rounded",
        verified="whole models by diffusers, against the exact weight-only forward",
        unverified="nothing",
        recipe="any",
        load='import diffusers\n\nmodel = diffusers.{model_class}.from_pretrained("{folder}")',
        traps=(
            "It takes the memory of the float model: this is for evaluation, training and "
            "programs that read nothing else.",
        ),
    )
    takes_rotation = True
    is_dense = True

    def refuses(self, head: Head) -> str:
        """Return why a layer is dense: that is what was asked for."""
        return "as asked"

    def specs(self, head: Head) -> Specs:
        """Return the one tensor of a layer."""
        return {f"{head.name}.weight": self.dense_spec(head)}

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """Return the effective weight."""
        head = layer.head
        weight = layer.dense.to(self.job.new_dtype).view(head.dense_shape)
        return {f"{head.name}.weight": weight}

    def decode(self, tensors: Tensors, head: Head) -> Decoded:
        """Return the weight."""
        return Decoded(tensors[f"{head.name}.weight"].float().flatten(1))
