"""What all runners share: read weights, quantize each in every variant, write what came out.

Runs inside the rival's own environment, so it needs torch and safetensors and nothing of loraq. A
runner is started as `python run_NAME.py IN OUT`: IN is a safetensors file of fp32 weights (out,
in), OUT a folder that gets `results.jsonl`, one line for each variant and weight, written as soon
as it is there, and one safetensors file for each line.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: The one weight that slow variants get.
SQUARE = "1152x1152"


@dataclass(frozen=True)
class Quantized:
    """What a package makes of one weight (out, in)."""

    #: Dequantized main weight; with `splits=False` the whole effective weight.
    main: Tensor
    #: Bytes of everything that is stored: codes, scales, zero points, factors.
    nbytes: int
    #: Product of the low-rank factors, or `None`.
    branch: Tensor | None = None
    #: Whether `main` multiplies the layer's own input. False if the package rotates it: then
    #: nothing can be said about rounded activations.
    splits: bool = True


@dataclass(frozen=True)
class Variant:
    """One way to use a package."""

    label: str
    #: From a weight and the rank of the branch, if there is one.
    quantize: Callable[[Tensor, int], Quantized]
    #: Family of the 4-bit codes, which is also that of the 4-bit activations: "int4" or "mxfp4".
    family: str = "int4"
    #: "stored" if the bytes are those of tensors that the package keeps; else how they were
    #: counted.
    counted: str = "stored"
    #: Only the square weight.
    slow: bool = False


def rank_of(weight: Tensor) -> int:
    """Return the rank that takes the share of bytes that 32 takes at width 1152."""
    return max(1, round(min(weight.shape) * 32 / 1152))


def nbytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors as they are stored."""
    return sum(t.numel() * t.element_size() for t in tensors)


def linear(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    """Return a layer without bias that holds the weight, by default in the models' usual dtype."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=dtype)
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return layer


@torch.no_grad()
def run(*variants: Variant) -> None:
    """Run all variants on all weights; a variant that fails is a line with its reason."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weights = load_file(source)
    with (target / "results.jsonl").open("w") as lines:
        for number, variant in enumerate(variants):
            for name, weight in weights.items():
                if variant.slow and name != SQUARE:
                    continue
                row = {
                    "variant": variant.label,
                    "family": variant.family,
                    "counted": variant.counted,
                    "weight": name,
                }
                begin = time.process_time()
                try:
                    quantized = variant.quantize(weight, rank_of(weight))
                except Exception as error:  # any package may fail in any way
                    row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                else:
                    row |= {"seconds": time.process_time() - begin, "nbytes": quantized.nbytes}
                    row |= {"splits": quantized.splits, "file": f"{number}-{name}.safetensors"}
                    parts = {"main": quantized.main, "branch": quantized.branch}
                    dense = {
                        key: part.float().contiguous()
                        for key, part in parts.items()
                        if part is not None
                    }
                    save_file(dense, target / row["file"])
                lines.write(json.dumps(row) + "\n")
                lines.flush()
