"""How good are statistics that a model collects on samples of its own, without any data?

The shipped digits transformer is quantized with LoRaQ in the bytes of a 16-bit rank-5 branch, with
statistics of: nothing; noised training images (`loraq.collect_stats`); images that the float model
draws from noise in 20 steps, of all labels or of the empty one (what `loraq stats` does with and
without prompts), 128 of them or 8. `full` is with all second moments, `squares` with mean squares
only. The figure is the velocity error on noised training images of all labels, with other noise and
other choices of images than the statistics saw (mean over seeds 0 to 2). It moves by about 4 %
between solver seeds.

    python benchmarks/self_calibration.py [--recipe int4-a16+w6a8] [--effort default] [--text] [--save]
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from statistics import mean

import torch
from torch import nn

import loraq
from common import options, report
from loraq.evaluation.digits import NULL_LABEL, load_transformer, sample, velocity_probe
from loraq.evaluation.metrics import relative_error
from loraq.recipe import Recipe
from loraq.rules import Rule

HELD_OUT = (0, 1, 2)
STEPS, MANY, FEW = 20, 128, 8


def main() -> None:
    """Print the table and the JSON line."""
    args = options(
        __doc__,
        recipe=("int4-a16+w6a8", "name of a recipe"),
        effort=("fast", "effort of the solver"),
        text="quantize the text side of the cross-attention too, which the rules keep in 16 bits",
    )
    model = load_transformer(torch.float32)
    rules = (Rule("*.attn2.to_[kv]", skip=False),) if args.text else ()
    recipe = replace(Recipe.named(args.recipe), effort=args.effort, budget="r16=5", rules=rules)
    names = [layer.name for layer in loraq.plan_model(model, recipe).quantized]
    exact = {seed: velocity_probe(model, seed=seed) for seed in HELD_OUT}
    rows: list[dict[str, object]] = []
    print(f"{len(names)} layers\n{'statistics of':34} {'tokens':>7} {'full':>8} {'squares':>8}")
    for label, run in sources(model).items():
        row: dict[str, object] = {
            "recipe": args.recipe,
            "effort": args.effort,
            "text": args.text,
            "label": label,
        }
        for kind in ("full", "squares") if run else ("full",):
            stats = (
                loraq.collect_stats(model, run, names, second_moment=kind == "full")
                if run
                else None
            )
            quantized = copy.deepcopy(model)
            loraq.quantize_(quantized, recipe, stats=stats, progress=False)
            row["tokens"] = max(of_layer.tokens for of_layer in stats.values()) if stats else 0
            row[kind] = mean(
                relative_error(exact[s], velocity_probe(quantized, seed=s)) for s in HELD_OUT
            )
        rows.append(row)
        squares = f"{row['squares']:8.4f}" if run else ""
        print(f"{label:34} {row['tokens']:7} {row['full']:8.4f} {squares}", flush=True)
    report(rows, save=args.save)


def sources(model: nn.Module) -> dict[str, Callable[[], object] | None]:
    """Return what lets the model see inputs, by its label."""

    def noised_images() -> None:
        for seed in range(100, 105):
            velocity_probe(model, count=512, seed=seed)

    def own(labels: torch.Tensor) -> Callable[[], object]:
        return lambda: sample(model, labels, seed=100, steps=STEPS, guidance=1)

    every, empty = torch.arange(MANY) % 10, torch.full((MANY,), NULL_LABEL)
    return {
        "nothing": None,
        "noised training images": noised_images,
        f"own images, all labels, {MANY}": own(every),
        f"own images, all labels, {FEW}": own(every[:FEW]),
        f"own images, empty label, {MANY}": own(empty),
        f"own images, empty label, {FEW}": own(empty[:FEW]),
    }


if __name__ == "__main__":
    main()
