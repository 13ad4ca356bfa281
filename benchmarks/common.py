"""What all benchmarks share: options, timing, the record of the environment, the JSON line at the end."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

HERE = Path(__file__).parent


def options(description: str | None, **flags: str | tuple[object, str]) -> argparse.Namespace:
    """Read the options every benchmark has and set the number of threads.

    Args:
        description: the text of `--help`.
        flags: further options of one benchmark: a switch is its line for `--help`, an option with a
            value is its default (whose type it takes; a tuple for several values) and that line.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument(
        "--repeats", type=int, default=7, help="runs of which the fastest counts (default: 7)"
    )
    parser.add_argument(
        "--save",
        action="store_true",
        help="also write benchmarks/results/<device>/<date>-<commit>.json",
    )
    for name, meaning in flags.items():
        if isinstance(meaning, str):
            parser.add_argument(f"--{name}", action="store_true", help=meaning)
            continue
        default, line = meaning
        many = isinstance(default, tuple)
        kind = type(default[0]) if isinstance(default, tuple) else type(default)
        parser.add_argument(
            f"--{name}", type=kind, nargs="+" if many else None, default=default, help=line
        )
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


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
    """Return the wall times of all runs of every contender, taken in turn so that all see the same machine.

    The first round does not count. Ratios of medians of one call are what to read; times differ
    between machines.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return low, middle, high


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment() -> dict[str, object]:
    """Return what a number depends on besides the code."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability()
        + (" + AMX" if _has_amx() else ""),
        "onednn_limit": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "threads": torch.get_num_threads(),
    }


def report(rows: list[dict[str, object]], *, save: bool, device: str = "cpu") -> None:
    """Print one JSON line with the environment and all rows; with `save`, write it to a file as well.

    A second benchmark saved at the same commit on the same day is added to the same file, one line
    each.
    """
    record = {"benchmark": Path(sys.argv[0]).stem, "device": device, **environment(), "rows": rows}
    line = json.dumps(record)
    print(line)
    if save:
        path = HERE / "results" / device / f"{str(record['date'])[:10]}-{record['commit']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(line + "\n")


def _has_amx() -> bool:
    """Whether the CPU has matrix units; `ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16` keeps torch from using them."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " amx_tile" in cpuinfo.read_text()


def _git(*arguments: str) -> str:
    """Output of a git command in this repository, or an empty string where there is none."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
