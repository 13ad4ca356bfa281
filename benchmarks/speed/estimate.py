"""How near is the time that is said before a run to the time that it takes?

Reading guide: "said" is what `loraq quantize` says by a trial of at most 1024 rows and columns,
"plan" what `loraq plan --time` says by one of the largest layer, "took" what the layers then took,
all in seconds on one thread; near 1 is right. Other work on the machine moves all of them.

    python -m benchmarks.speed.estimate --save
"""

import torch
from torch import nn

from benchmarks.record import options, report
from loraq.pipeline.estimate import TRIAL_SIDE, estimate_seconds
from loraq.pipeline.module import plan_model, quantize_
from loraq.recipe import Recipe

WIDTHS = (1152, 1152, 4608)
RECIPES = ("int4-a16+w6a6", "mxfp4-a8+w6a8")
CPU = torch.device("cpu")


def main() -> None:
    """Print a table and the JSON line."""
    chosen = options(__doc__, effort=("fast", "effort of the solver (default: fast)"))
    rows = [measure(name, chosen.effort) for name in RECIPES]
    for row in rows:
        said, plan, took = row["said"], row["plan"], row["took"]
        print(
            f"{row['recipe']:16}said {said:6.1f} s ({said / took:.2f} of {took:.1f} s), "
            f"plan {plan:6.1f} s ({plan / took:.2f})"
        )
    report(rows, save=chosen.save)


def measure(name: str, effort: str) -> dict:
    """Return what is said of one recipe before it, and what it takes."""
    model = nn.Sequential(*(nn.Linear(width, 1152, bias=False) for width in WIDTHS))
    recipe = Recipe.named(name).adjusted(effort=effort)
    jobs = plan_model(model, recipe).quantized
    said = estimate_seconds(jobs, CPU, most_side=TRIAL_SIDE)
    plan = estimate_seconds(jobs, CPU)
    done = quantize_(model, recipe, progress=False)
    took = sum(layer.seconds for layer in done.layers)
    return {"recipe": name, "effort": effort, "said": said, "plan": plan, "took": took}


if __name__ == "__main__":
    main()
