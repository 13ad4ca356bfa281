"""Target `dense`: every layer as a float weight again."""

from loraq.exports.layer import Head
from loraq.exports.target import LOAD_FOLDER, About, Target


class Dense(Target):
    """Effective weights, main plus branch, transformed back, in the source's own layout."""

    about = About(
        name="dense",
        loaded_by="diffusers, and whatever reads float weights",
        holds="every format, rank, rotation and smoothing; 1×1 convolutions, stacked experts",
        exact="rounded once to bf16 or fp16, as any checkpoint is; `--dtype float32` is not",
        activations="16 or 32 bits, nothing is rounded",
        verified="whole models by diffusers, against the exact weight-only forward",
        unverified="nothing",
        load=LOAD_FOLDER,
        traps=(
            "It takes the memory of the float model: this is for evaluation, training and "
            "programs that read nothing else.",
        ),
    )
    takes_transforms = True
    is_dense = True

    def refuses(self, head: Head) -> str:
        """Return why a layer is dense: that is what was asked for."""
        return "as asked"
