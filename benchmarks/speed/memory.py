"""How many fp32 copies of a weight does the solver hold at its peak?

Reading guide: bytes of all tensors that are alive at once while one layer is solved, its bf16
weight included as long as it is there, over the bytes of the weight in fp32; counted at every
allocation, so that the number is the same on every machine. "bar" is what a worker may take of its
largest tensor. The memory of the process itself, about 0.3 GB with torch, comes on top. Few steps
are taken: all are alike. It takes a minute.

    python -m benchmarks.speed.memory --save
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.record import options, report
from benchmarks.worlds.matrices import dit_like
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.layer import quantize_layer
from loraq.recipe import Recipe

SHAPE = (1152, 4608)
RECIPES = (
    "default",
    "int4-a16+w6a6",
    "mxfp4-a8+w6a8",
    "int4-a4+w6a8-h32",
    "int4-a4+w4a8-h32",
    "nvfp4-a4+w4a8",
    "mxfp4-a16",
    "nvfp4-a16+w8a8",
)
BAR = 4.0


def main() -> None:
    """Print a table and the JSON line."""
    chosen = options(__doc__)
    rows = [
        {"recipe": name, "shape": list(SHAPE), "copies": copies_of(name), "bar": BAR}
        for name in RECIPES
    ]
    for row in rows:
        print(f"{row['recipe']:20}{row['copies']:6.2f} fp32 copies")
    report(rows, save=chosen.save)


def copies_of(recipe: str) -> float:
    """Return the peak for one layer, in fp32 copies of its weight."""
    named = Recipe.named(recipe)
    scheme = named.scheme_for("layer", SHAPE)
    assert scheme is not None
    options = {"steps": 2, "refine_steps": 1} if scheme.branch else {}
    job = LayerJob.of("layer", SHAPE, scheme, Recipe(scheme, options=options))
    weight = dit_like(*SHAPE).bfloat16()

    def read() -> Iterator[Tensor]:
        yield weight.clone()  # as from a file: nobody else has it

    return peak_bytes(lambda: quantize_layer(job, read())) / (2 * weight.nbytes)


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes of tensors that are alive at once while something runs."""
    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [
        event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


if __name__ == "__main__":
    main()
