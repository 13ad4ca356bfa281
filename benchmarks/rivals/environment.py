"""One virtual environment for each rival, and its runner started in it.

Nobody wants torch once for each rival: a `.pth` file in each environment puts the packages of the
running environment at the end of its path, so torch (whose version `constraints.txt` pins) and what
else is there need not be installed again, while what the rival's requirements ask for is installed
in front of it.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


class RivalError(Exception):
    """A rival cannot be installed or run; the text is one line."""


def environment(requirements: Path, cache: Path) -> Path:
    """Return the Python of the environment for a requirements file.

    It is made on first use, and again when the file changes.

    Raises:
        RivalError: an environment cannot be made, or a package not installed.
    """
    folder = cache / requirements.stem
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = f"{sys.version}\n{requirements.read_text()}{CONSTRAINTS.read_text()}"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    _checked([sys.executable, "-m", "venv", "--clear", "--without-pip", folder])
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "of_the_caller.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "--quiet",
        "--disable-pip-version-check",
    ]
    _checked([*pip, "install", "-c", CONSTRAINTS, "-r", requirements])
    stamp.write_text(wanted)
    return python


def run_runner(
    python: Path, script: Path, weights: Path, out: Path, limit: float
) -> tuple[list[dict], str | None]:
    """Return the lines that a runner wrote, and why it stopped early if it did.

    Args:
        python: of the rival's environment.
        script: the runner.
        weights: safetensors file that it reads.
        out: empty folder that it writes to.
        limit: wall time in seconds after which it is stopped.
    """
    reason = None
    try:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        _checked([python, script, weights, out], timeout=limit, env=environ)
    except RivalError as error:
        reason = str(error)
    results = out / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    return [json.loads(line) for line in lines], reason


def _checked(command: list[object], **options: object) -> None:
    try:
        subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=True, **options
        )
    except subprocess.TimeoutExpired as error:
        raise RivalError(f"stopped after {error.timeout:.0f} s") from error
    except subprocess.CalledProcessError as error:
        said = [line.strip() for line in error.stderr.splitlines() if line.strip()]
        errors = (
            [line for line in said if line.startswith("ERROR")] or said[-1:] or ["it said nothing"]
        )
        raise RivalError(f"exit code {error.returncode}: {errors[-1]}") from error
