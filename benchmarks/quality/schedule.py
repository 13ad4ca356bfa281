"""What does it buy to run the first and the last steps with more precise activations?

    python -m benchmarks.quality.schedule --save

The digits transformer is quantized once for each seed and recipe, and draws the same digits in ten
steps under each schedule of `loraq.ActivationSchedule`: activations of the steps between, and how
many steps at the beginning and at the end run in 16 bits instead. Rounded activations are
simulated. Read "error": the distance of the samples from those of the model as trained, from the
same noise, as a share of their norm, the mean over seeds with a 95 % interval; and "/ 16 bits", its
ratio to that of 16-bit activations in every step, seed by seed.
"""

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pages import folded, source, table
from benchmarks.quality.ranking import interval
from benchmarks.record import options, report
from benchmarks.results import Record
from benchmarks.worlds.world import WORLDS
from loraq import ActivationSchedule, quantize_
from loraq.evaluation import digits
from loraq.evaluation.contender import Contender, simulate
from loraq.evaluation.metrics import relative_error

STEPS, N_IMAGES = 10, 100
#: All in INT8, which was the default, and rows that LoRaQ was or is judged by.
RECIPES = ("int4-a8+int8-h0", "int4-aint8+w6a8-h0", "nvfp4-a4+w4a8-h0")
#: Activations of the steps between, and how many at the beginning and at the end run in 16 bits.
SCHEDULES = (
    ("a16", 0, 0),
    ("a8", 0, 0),
    ("a8", 1, 1),
    ("a4", 0, 0),
    ("a4", 1, 0),
    ("a4", 0, 1),
    ("a4", 1, 1),
    ("a4", 2, 2),
    ("a4", 3, 3),
)


INTRO = f"""## Activations step by step

The same stored bytes draw the digits in {STEPS} steps; activations of the steps between, and the
numbers of steps at the beginning and at the end that run in 16 bits (`loraq.ActivationSchedule`).
"error" is the distance of the samples from those of the model as trained, from the same noise, as a
share of their norm; "/ 16 bits" its ratio to that of 16-bit activations throughout, seed by seed.
"""


def main() -> None:
    """Print a row for each recipe and schedule."""
    chosen = options(
        __doc__,
        seeds=((0, 1, 2), "seeds of the solver and of the noise (default: 0 1 2)"),
        recipes=(RECIPES, "what is quantized to (default: three)"),
    )
    rows = [row for recipe in chosen.recipes for row in measure(recipe, chosen.seeds)]
    report(rows, save=chosen.save)


def measure(recipe: str, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return a row for each schedule on one recipe."""
    labels = torch.arange(N_IMAGES) % digits.NULL_LABEL
    errors: dict[tuple[str, int, int], list[float]] = {schedule: [] for schedule in SCHEDULES}
    for seed in seeds:
        model = digits.load_transformer(torch.float32)
        exact = digits.sample(model, labels, seed=seed, steps=STEPS, guidance=1.0)
        contender = Contender("LoRaQ", recipe)
        settled = contender.to_recipe(effort="fast", budget=WORLDS["digits"].budget)
        quantize_(model, replace(settled, seed=seed), progress=False)
        simulate(model)
        for schedule, found in errors.items():
            found.append(relative_error(exact, draw(model, schedule, labels, seed)))
    rows = []
    for (inner, first, last), found in errors.items():
        ratios = [mine / best for mine, best in zip(found, errors[SCHEDULES[0]], strict=True)]
        print(
            f"{recipe:20} {inner:4} {first} + {last}  {interval(found, 4)}  {interval(ratios, 2)}",
            flush=True,
        )
        rows.append(
            {
                "recipe": recipe,
                "inner": inner,
                "first": first,
                "last": last,
                "steps": STEPS,
                "seeds": list(seeds),
                "errors": found,
                "ratios": ratios,
            }
        )
    return rows


def section(records: Iterable[Record]) -> str:
    """Return the section of docs/quality.md for records sorted by date; empty without one."""
    found = [record for record in records if record["benchmark"] == "quality.schedule"]
    if not found:
        return ""
    body = [
        [
            f"`{row['recipe']}`",
            row["inner"],
            f"{row['first']} + {row['last']}",
            interval(row["errors"], 4),
            interval(row["ratios"], 2),
        ]
        for row in found[-1]["rows"]
    ]
    headings = ("", "steps between", "first + last in a16", "error", "/ 16 bits")
    raw = folded(f"All {len(body)} schedules", table(headings, body, "lllrr"))
    return "\n".join([INTRO, source(found[-1]), "", *raw])


def draw(model: nn.Module, schedule: tuple[str, int, int], labels: Tensor, seed: int) -> Tensor:
    """Return samples whose steps follow a schedule."""
    inner, first, last = schedule
    pipeline = SimpleNamespace(components={"transformer": model}, num_timesteps=STEPS)
    switch = ActivationSchedule(pipeline, inner, first=first, last=last, simulate=True)
    steps = iter(range(STEPS))

    def end_step(*_: object) -> None:
        switch(pipeline, next(steps), None, {})

    hook = model.register_forward_hook(end_step)
    try:
        return digits.sample(model, labels, seed=seed, steps=STEPS, guidance=1.0)
    finally:
        hook.remove()


if __name__ == "__main__":
    main()
