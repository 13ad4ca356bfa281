"""Does a Hadamard rotation of the input axis pay with 4-bit activations, and how large must its blocks be?

The shipped digits transformer is quantized with each 4-bit format and each side of the blocks (the
bytes of a 16-bit rank-5 branch; 0 is no rotation). Read the velocity error: one forward on noised
real images against the model as trained; it moves by about 4 % between solver seeds. A rotation
stores nothing and costs `side` multiplications for each value of the input.

    python benchmarks/rotation.py [--fast] [--save]
"""

import copy
from dataclasses import replace

import torch

from common import options, report
from loraq.evaluation.digits import load_transformer, velocity_probe
from loraq.evaluation.metrics import relative_error
from loraq.pipeline.module import quantize_
from loraq.recipe import Recipe

SIDES = (0, 16, 32, 64, 128)
CASES = (
    ("mxfp4+bf16", "svdquant"),
    ("mxfp4+w8a8", "loraq"),
    ("mxfp4+w6a8", "loraq"),
    ("mxfp4+w4a8", "loraq"),
    ("mxint4+w8a8", "loraq"),
    ("int4+bf16", "svdquant"),
    ("int4+w8a8", "loraq"),
    ("nvfp4+bf16", "svdquant"),
    ("nvfp4+w8a8", "loraq"),
)


def main() -> None:
    """Print the table and the JSON line."""
    args = options(__doc__, fast="use the effort level 'fast'")
    trained = load_transformer(torch.float32)
    velocity = velocity_probe(trained)
    rows: list[dict[str, object]] = []
    print(
        f"{'-a4, side of the blocks':24}"
        + "".join(f"{side:>9}" for side in SIDES)
        + "   velocity error"
    )
    for name, method in CASES:
        line = f"{name} {method}".ljust(24)
        for side in SIDES:
            recipe = replace(Recipe.named(f"{name}-h{side}"), method=method, budget="r16=5")
            model = copy.deepcopy(trained)
            weights = quantize_(
                model, replace(recipe, effort="fast" if args.fast else "default"), progress=False
            ).mean_relative_error
            error = relative_error(velocity, velocity_probe(model))
            line += f"{error:9.4f}"
            rows.append(
                {
                    "recipe": name,
                    "method": method,
                    "side": side,
                    "velocity": error,
                    "weight": weights,
                }
            )
        print(line, flush=True)
    report(rows, save=args.save)


if __name__ == "__main__":
    main()
