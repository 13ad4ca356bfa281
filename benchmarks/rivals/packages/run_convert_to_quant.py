"""convert_to_quant (MIT): NVFP4 for ComfyUI, its rounding learned, and a branch of what that left.

The learned rounding minimizes the error in the leading singular directions of the weight, by the
package's own optimizer and number of steps; without it the same class rounds to nearest. The branch
is the LoRA of the error that the package extracts.
"""

from functools import partial

from contract import Quantized, Variant, nbytes_of, run
from convert_to_quant.converters import LearnedNVFP4Converter
from torch import Tensor, bfloat16, enable_grad, float32

COUNTED = "factors as 16 bits"


@enable_grad()
def nvfp4(weight: Tensor, rank: int, *, learned: bool, lora: bool) -> Quantized:
    """Quantize one weight; scales are counted without what pads them to whole tiles."""
    converter = LearnedNVFP4Converter(
        device="cpu",
        no_learned_rounding=not learned,
        extract_lora=lora,
        lora_rank=rank,
        lora_target=".",
    )
    codes, _scales, whole, main, extra = converter.convert(weight, key="weight")
    nbytes = nbytes_of([codes, whole]) + weight.numel() // converter.block_size
    if not lora:
        return Quantized(main.to(float32), nbytes)
    up, down = extra["lora_up"].to(bfloat16), extra["lora_down"].to(bfloat16)
    branch = up.float() @ down.float()
    return Quantized(main.to(float32), nbytes + nbytes_of([up, down]), branch)


run(
    *(
        Variant(
            f"NVFP4{', learned' * learned}{', LoRA' * lora}",
            partial(nvfp4, learned=learned, lora=lora),
            "nvfp4",
            COUNTED if lora else "stored",
            slow=learned,
        )
        for learned in (False, True)
        for lora in (False, True)
    )
)
