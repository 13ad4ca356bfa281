"""Everything that a GPU has to confirm, in one command of at most 25 minutes: `make gpu`.

Each step is a process of its own with a time limit of its own, so that one that crashes or hangs
takes nothing along; what it has printed is in a log, what it has measured in a result file, which
`make docs` shows. At the end stands what failed, and the exit code is 1 if something did.

    python -m benchmarks.gpu.run                  on the first GPU
    python -m benchmarks.gpu.run --rehearse       the same steps on the CPU, tiny: does it run?
    python -m benchmarks.gpu.run --only graphs    the steps whose names begin so

Without a network, run it in any environment that has a CUDA build of torch, click, rich and
jaxtyping, with PYTHONPATH=src; a step that misses a package fails, and the others run.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.record import HERE, report

#: Of the whole run, in seconds.
LIMIT = 25 * 60
#: Where each step's output goes.
LOGS = HERE.parent / "gpu-logs"
#: Seconds that a step may take in a rehearsal.
REHEARSAL_LIMIT = 120
#: Seconds in which a process that was killed is expected to end.
GRACE = 10
#: Lines of a failed step's output in the summary.
SHOWN = 12


class Step(NamedTuple):
    """One process."""

    name: str
    #: Seconds.
    limit: int
    #: Module and arguments of `python -m`.
    command: tuple[str, ...]
    #: Arguments that make it tiny.
    tiny: tuple[str, ...] = ()
    #: Whether it writes a result file.
    saves: bool = True


#: Back ends made of torch's own products; a crash in a kernel of Triton then costs only its steps.
OF_TORCH = ("--backends", "resident", "low_memory", "int8_row", "fp8_row")
TRITON = ("--backends", "triton")
#: Those with tests that need a GPU.
TESTS = (
    "tests/kernels",
    "tests/formats",
    "tests/checkpoint/test_roundtrip.py",
    "tests/integrations/test_on_devices.py",
)

STEPS = (
    Step("tests", 240, ("pytest", "-m", "gpu", "-rs", *TESTS), saves=False),
    Step("doctor", 60, ("loraq", "doctor"), saves=False),
    Step("solver", 240, ("benchmarks.speed.solver", "--label", "after"), ("--tiny",)),
    *(
        Step(
            f"layers {model}{name}",
            limit,
            ("benchmarks.speed.layer", f"--{model}", *backends),
            ("--quick",),
        )
        for model, limits in {"pixart": (90, 60), "sana": (90, 60), "flux": (150, 90)}.items()
        for name, limit, backends in (("", limits[0], OF_TORCH), (" triton", limits[1], TRITON))
    ),
    Step("block", 120, ("benchmarks.speed.block", "--step", *OF_TORCH), ("--quick",)),
    Step("block triton", 90, ("benchmarks.speed.block", "--step", *TRITON), ("--quick",)),
    *(
        Step(
            f"graphs {backend}",
            30,
            ("benchmarks.gpu.graphs", "--backends", backend),
            ("--quick",),
        )
        for backend in ("low_memory", "resident", "int8_row", "fp8_row", "triton", "reference")
    ),
)


class Outcome(NamedTuple):
    """What became of a step."""

    name: str
    seconds: float
    #: Why it failed, or "".
    failure: str
    log: Path


def main() -> None:
    """Run the steps, and say what failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--only", default="", help="beginning of the names of the steps to run")
    parser.add_argument(
        "--results",
        type=lambda text: Path(text).resolve(),
        help="folder for result files (default: benchmarks/results)",
    )
    chosen = parser.parse_args()
    if not chosen.rehearse and not torch.cuda.is_available():
        sys.exit(
            f"torch {torch.__version__} sees no GPU here. Give `make gpu` a Python whose torch "
            "does (make gpu PYTHON=...), or try the steps on the CPU: "
            "python -m benchmarks.gpu.run --rehearse."
        )
    if not (steps := [step for step in STEPS if step.name.startswith(chosen.only)]):
        sys.exit(f"No step begins with {chosen.only!r}. Steps: {', '.join(s.name for s in STEPS)}.")
    with tempfile.TemporaryDirectory() as place:
        rehearsal = Path(place) if chosen.rehearse else None
        results = chosen.results or rehearsal or HERE / "results"
        logs = LOGS if rehearsal is None else rehearsal / "logs"
        outcomes = list(run_all(steps, results, logs, rehearse=chosen.rehearse))
        failed = [outcome for outcome in outcomes if outcome.failure]
        for outcome in failed:
            lines = outcome.log.read_text(errors="replace").splitlines()[-SHOWN:]
            print(
                f"\n{outcome.name}: {outcome.failure}", *(f"  {line}" for line in lines), sep="\n"
            )
    rows = [{"step": o.name, "seconds": o.seconds, "failure": o.failure} for o in outcomes]
    device = "cpu" if chosen.rehearse else "cuda"
    if not chosen.only:
        report(rows, save=results if chosen.results or not chosen.rehearse else None, device=device)
    print(
        f"\n{len(outcomes) - len(failed)} of {len(outcomes)} steps succeeded in "
        f"{sum(outcome.seconds for outcome in outcomes) / 60:.1f} minutes."
        + (f" FAILED: {', '.join(outcome.name for outcome in failed)}." if failed else "")
    )
    if not chosen.rehearse:
        print(f"Result files: {results}. Logs: {logs}. `make docs` shows the results.")
    sys.exit(1 if failed else 0)


def run_all(steps: list[Step], results: Path, logs: Path, *, rehearse: bool) -> Iterator[Outcome]:
    """Run one step after the other, and say how each went."""
    logs.mkdir(parents=True, exist_ok=True)
    for step in steps:
        command = [sys.executable, "-m", *step.command]
        if step.command[0].startswith("benchmarks."):
            command += [*(step.tiny if rehearse else ()), "--device", "cpu" if rehearse else "cuda"]
            command += ["--repeats", "1"] if rehearse else []
        if step.saves:
            command += ["--save", str(results)] if results != HERE / "results" else ["--save"]
        limit = REHEARSAL_LIMIT if rehearse else step.limit
        outcome = run_step(step.name, command, limit, logs, rehearse=rehearse)
        print(
            f"{outcome.name:20}{outcome.seconds:7.1f} s  {outcome.failure or 'ok'}",
            flush=True,
        )
        yield outcome


def run_step(name: str, command: list[str], limit: int, logs: Path, *, rehearse: bool) -> Outcome:
    """Run one process, and stop it and all that it has started when its time is over."""
    log = logs / f"{name.replace(' ', '-')}.txt"
    environment = dict(os.environ)
    if rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
        if name.endswith("triton"):  # others would decode in its interpreter too, which takes long
            environment |= {"TRITON_INTERPRET": "1"}
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=HERE.parent,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            failure = f"not done after {limit} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        else:
            failure = f"exit code {code}" if code else ""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a hung driver may hold it for ever
                process.wait(GRACE)
    return Outcome(name, time.monotonic() - begin, failure, log)


if __name__ == "__main__":
    main()
