"""What do the activation formats cost end to end, and what does the rotation in rank space buy?

The shipped digits transformer is quantized once with and once without the rotation (8-bit and 6-bit
branch, MXFP4 main weight, the bytes of a 16-bit rank-5 branch), then run with different formats for
the main path's input, the branch's input and the rank-space intermediate. Read the velocity error:
one forward on noised real images against the model as trained. The weights are the same in every
row of one table, so every difference is activation rounding.

    python benchmarks/activation_formats.py [--fast] [--save]
"""

import copy
from dataclasses import replace

import torch

from common import options, report
from loraq.evaluation.digits import load_transformer, velocity_probe
from loraq.evaluation.metrics import relative_error
from loraq.layers import quantized_layers
from loraq.pipeline.module import quantize_
from loraq.recipe import Recipe

#: (main input, branch input, intermediate)
FORMATS = (
    ("bf16", "bf16", "bf16"),
    ("mxint8", "bf16", "bf16"),
    ("mxfp8_e4m3", "bf16", "bf16"),
    ("int8", "bf16", "bf16"),
    ("bf16", "mxint8", "bf16"),
    ("bf16", "mxfp6_e2m3", "bf16"),
    ("bf16", "bf16", "mxint8"),
    ("bf16", "bf16", "mxfp6_e2m3"),
    ("mxint8", "mxint8", "mxint8"),
    ("mxint8", "mxfp6_e2m3", "mxint8"),
    ("mxint8", "mxfp6_e2m3", "mxfp6_e2m3"),
)


def main() -> None:
    """Print one table for each branch, and the JSON line."""
    args = options(__doc__, fast="use the effort level 'fast'")
    effort = "fast" if args.fast else "default"
    trained = load_transformer(torch.float32)
    velocity = velocity_probe(trained)
    rows: list[dict[str, object]] = []
    for name in ("mxfp4-a16+w8a8", "mxfp4-a16+w6a6"):
        models = {}
        for rotate in (True, False):
            recipe = replace(
                Recipe.named(name), budget="r16=5", effort=effort, options={"rotate": rotate}
            )
            models[rotate] = copy.deepcopy(trained)
            quantize_(models[rotate], recipe, progress=False)
        print(
            f"\n{name}: velocity error\nmain input   branch input  intermediate  rotated  not "
            f"rotated"
        )
        for formats in FORMATS:
            errors = {}
            for rotate, model in models.items():
                for layer in quantized_layers(model).values():
                    branch = replace(
                        layer.scheme.branch, activation=formats[1], intermediate=formats[2]
                    )
                    layer.scheme = replace(layer.scheme, activation=formats[0], branch=branch)
                errors[rotate] = relative_error(velocity, velocity_probe(model))
            print(
                f"{formats[0]:12} {formats[1]:13} {formats[2]:13} {errors[True]:.4f}   "
                f"{errors[False]:.4f}"
            )
            named = dict(zip(("main", "branch", "intermediate"), formats, strict=True))
            rows.append(
                {"recipe": name, **named, "rotated": errors[True], "not_rotated": errors[False]}
            )
    report(rows, save=args.save)


if __name__ == "__main__":
    main()
