"""What all benchmarks share: options, the record of the environment, the JSON line at the end."""

import argparse
import json
import os
import platform
import subprocess
import sys
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
        nargs="?",
        type=Path,
        const=HERE / "results",
        metavar="FOLDER",
        help="also write <device>/<date>-<commit>.json, in benchmarks/results or a folder",
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


def benchmark_name() -> str:
    """Return the module that was started with `python -m`, without the name of this package."""
    return sys.modules["__main__"].__spec__.name.removeprefix("benchmarks.")


def environment() -> dict[str, object]:
    """Return what a number depends on besides the code."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": " ".join(["python -m", f"benchmarks.{benchmark_name()}", *sys.argv[1:]]),
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


def device_of(name: str) -> torch.device:
    """Return the device of an option `--device`; "" is the first GPU, or the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


#: The option, for `options`.
DEVICE = ("", "device to measure on (default: the first GPU, or the CPU)")


def report(rows: list[dict[str, object]], *, save: Path | None, device: str = "cpu") -> None:
    """Print one JSON line with the environment and all rows; in a folder `save`, write it too.

    A second benchmark saved at the same commit on the same day is added to the same file, one line
    each.
    """
    record = {"benchmark": benchmark_name(), "device": device, **environment(), "rows": rows}
    line = json.dumps(record)
    print(line)
    if save:
        path = save / device / f"{str(record['date'])[:10]}-{record['commit']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(line + "\n")


def _has_amx() -> bool:
    """Whether the CPU has matrix units.

    `ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16` keeps torch from using them.
    """
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
