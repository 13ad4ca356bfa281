"""What a run will take, said before it: memory by counting, time by a short trial."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from loraq.methods import LoRaQ
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.layer import solve_layer
from loraq.stats import ActivationStats

#: Matrices as large as a layer's that a worker holds at its peak, in fp32 and without statistics
#: (`benchmarks.speed.memory`).
_COPIES = 4
#: Anonymous memory of a process that builds the model by its library, and of a child that only
#: solves, with their layers left out: the peaks of `loraq quantize` on x86-64 with torch 2.13 for
#: the CPU, diffusers 0.42 and Python 3.11 were 376 to 388 MB and 170 to 173 MB where layers are
#: tiny; of PixArt-Σ, 741 to 797 MB are left for one of the first and two of the second
#: (`benchmarks.speed.stream`).
_PROGRAM_NBYTES, _CHILD_NBYTES = 380_000_000, 200_000_000
#: Steps of each phase in the two trials of method "loraq".
_FEW, _MORE = 1, 4
#: Most rows and columns of a trial before a run; the time of a layer follows its weights.
TRIAL_SIDE = 1024


def worker_nbytes(jobs: Sequence[LayerJob]) -> int:
    """Return what a worker holds at its peak, beside the program, while it solves layers."""
    return 4 * _COPIES * max((math.prod(job.matrix) for job in jobs), default=0)


def run_nbytes(
    jobs: Sequence[LayerJob], devices: Sequence[torch.device], workers: int, *, leads: bool
) -> int:
    """Return what a run holds at its peak: all its processes, or on another device than the CPU it.

    Args:
        jobs: of the layers.
        devices: on which the workers take turns.
        workers: how many layers are solved at a time.
        leads: whether there is a process that starts them, and solves none.
    """
    workers, each = min(workers, len(jobs)), worker_nbytes(jobs)
    if devices[0].type != "cpu":
        return -(-workers // len(devices)) * each
    if leads:
        return _PROGRAM_NBYTES + workers * (each + _CHILD_NBYTES)
    return max(1, workers) * (each + _PROGRAM_NBYTES)


def estimate_seconds(
    jobs: Sequence[LayerJob],
    device: torch.device,
    *,
    workers: int = 1,
    most_side: int | None = None,
) -> float:
    """Return how long layers take; on a CPU each on one thread.

    Random weights as large as the largest layer are solved, and a layer is taken to need time as it
    has weights. Of method "loraq" a few steps are tried, because all take as long.

    Args:
        jobs: of the layers.
        device: where they are solved.
        workers: how many are solved at a time; each takes as long as alone.
        most_side: most rows and columns of a trial, for one that must not take long.
    """
    largest: dict[object, LayerJob] = {}
    for job in sorted(jobs, key=lambda job: math.prod(job.matrix)):
        largest[job.method] = job
    seconds = 0.0
    for method, job in largest.items():
        weights = sum(math.prod(each.shape) for each in jobs if each.method == method)
        trial = replace(job, shape=_shape_of_trial(job, most_side))
        seconds += _try(trial, device) / math.prod(trial.shape) * weights
    return seconds / max(1, min(workers, len(jobs)))


def describe_run(
    jobs: Sequence[LayerJob], devices: Sequence[torch.device], workers: int, *, leads: bool
) -> str:
    """Return what the layers of a run will take, in a line for people; it is tried for a moment.

    Args:
        jobs: of the layers that are still to do.
        devices: on which the workers take turns.
        workers: how many layers are solved at a time.
        leads: whether there is a process that starts them, and solves none.
    """
    seconds = estimate_seconds(jobs, devices[0], workers=workers, most_side=TRIAL_SIDE)
    memory = run_nbytes(jobs, devices, workers, leads=leads)
    return f"about {show_time(seconds)}, {memory / 1e9:.1f} GB peak{name_place(devices)}"


def name_place(devices: Sequence[torch.device]) -> str:
    """Return where the memory of a run is that `run_nbytes` tells; "" for the CPU's."""
    return "" if devices[0].type == "cpu" else f" on each {devices[0].type} device"


def show_time(seconds: float) -> str:
    """Return a time for people, in seconds, minutes or hours."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _shape_of_trial(job: LayerJob, most_side: int | None) -> tuple[int, int]:
    n_out, n_in = job.matrix
    if most_side is None:
        return n_out, n_in
    # A branch of a high rank takes its time of a weight in a matrix that is much larger, too.
    most = max(most_side, 4 * job.scheme.branch.rank if job.scheme.branch else 0)
    return min(n_out, most), min(n_in, most)


def _try(job: LayerJob, device: torch.device) -> float:
    """Return the seconds that a layer takes."""
    method = job.method
    if not isinstance(method, LoRaQ):
        return _solve(job, device)
    # The first solve of a process also loads and allocates, which must not pass for what is before
    # and after the steps.
    _, few, more = (
        _solve(replace(job, method=replace(method, steps=n, refine_steps=n)), device)
        for n in (_FEW, _FEW, _MORE)
    )
    step = max(0.0, more - few) / (2 * (_MORE - _FEW))
    return few + step * max(0, method.steps + method.refine_steps - 2 * _FEW)


def _solve(job: LayerJob, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(job.matrix, generator=generator, device="cpu").to(device)
    stats = None
    if job.needs_stats:
        n = job.matrix[1]
        white = torch.eye(n) if job.method.needs_full_moment else torch.ones(n)
        stats = ActivationStats(1, white)
    return solve_layer(job, weight, stats).seconds
