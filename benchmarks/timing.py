"""How long something takes, on a machine that other programs use as well."""

import statistics
import time
from collections.abc import Callable

import torch

#: Calls of one turn on a GPU.
CALLS_ON_GPU = 10


def best_cpu_seconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Return the least process time of `repeats` runs, after one that does not count.

    Process time adds up all threads and leaves out the time other programs had the core. Read it as
    +- 10 %.
    """
    run()
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def interleaved_seconds(
    contenders: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the wall times of all runs of every contender, taken in turn.

    All see the same machine, and the first round does not count. Ratios of medians of one call are
    what to read; times differ between machines. On a GPU a turn is several calls, launched one
    after the other as a model launches its layers.
    """
    calls = CALLS_ON_GPU if device.type == "cuda" else 1
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            _synchronize(device)
            if turn:
                seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """Return the memory that a run takes beyond what is held before it; `None` but on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return low, middle, high


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
