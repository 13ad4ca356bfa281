"""What a run will take, said before it: memory by counting, time by a short trial."""

import math
from dataclasses import replace

import torch

from loraq.methods import LoRaQ
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.layer import solve_layer
from loraq.pipeline.plan import Plan
from loraq.stats import ActivationStats

#: Matrices as large as a layer's that a worker holds at its peak, in fp32 and without statistics
#: (`benchmarks.speed.memory`).
_COPIES = 5
#: Steps of each phase in the two trials of method "loraq".
_FEW, _MORE = 1, 4


def worker_nbytes(plan: Plan) -> int:
    """Return what a worker holds at its peak, beside the program, while it solves a plan."""
    return 4 * _COPIES * max((math.prod(job.matrix) for job in plan.quantized), default=0)


def estimate_seconds(plan: Plan, device: torch.device) -> float:
    """Return how long the layers of a plan take one after the other; on a CPU on one thread.

    Random weights as large as the largest layer are solved, and a layer is taken to need time as it
    has weights. Of method "loraq" a few steps are tried, because all take as long.
    """
    largest: dict[object, LayerJob] = {}
    for job in sorted(plan.quantized, key=lambda job: math.prod(job.matrix)):
        largest[job.method] = job
    return sum(
        _try(job, device)
        / math.prod(job.matrix)
        * sum(math.prod(each.shape) for each in plan.quantized if each.method == method)
        for method, job in largest.items()
    )


def _try(job: LayerJob, device: torch.device) -> float:
    """Return the seconds that a layer takes."""
    method = job.method
    if not isinstance(method, LoRaQ):
        return _solve(job, device)
    few, more = (
        _solve(replace(job, method=replace(method, steps=n, refine_steps=n)), device)
        for n in (_FEW, _MORE)
    )
    step = max(0.0, more - few) / (2 * (_MORE - _FEW))
    return few + step * max(0, method.steps + method.refine_steps - 2 * _FEW)


def _solve(job: LayerJob, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(job.matrix, generator=generator, device="cpu").to(device)
    stats = None
    if job.method.use_of_stats == "required":
        n = job.matrix[1]
        white = torch.eye(n) if job.method.needs_full_moment else torch.ones(n)
        stats = ActivationStats(1, white)
    return solve_layer(replace(job, shape=job.matrix), weight, stats).seconds
