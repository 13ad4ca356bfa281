"""The command, held up: `python tests/gate.py FOLDER quantize …` begins a layer for each pass that
lies in FOLDER, and waits for more.

So a test kills a run that is certainly at work, and not at its end, however fast the machine is.
"""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loraq.cli import main
from loraq.pipeline.worker import LayerWork

#: Names the folder to the processes that this one starts.
_VARIABLE = "LORAQ_TEST_GATE"

_do = LayerWork._do


def add_passes(gate: Path, n_layers: int) -> None:
    """Let so many more layers be begun."""
    gate.mkdir(exist_ok=True)
    n_so_far = len(list(gate.iterdir()))
    for number in range(n_so_far, n_so_far + n_layers):
        (gate / f"{number}.pass").touch()


def ranks_at(gate: Path) -> set[str]:
    """Return the ranks that have come for a pass, whether they got one or not."""
    return {path.stem for path in gate.glob("*.rank")}


def _take_pass() -> None:
    gate = Path(os.environ[_VARIABLE])
    if rank := os.environ.get("RANK"):
        (gate / f"{rank}.rank").touch()
    while True:
        for free in gate.glob("*.pass"):
            try:
                free.rename(free.with_suffix(".taken"))
            except FileNotFoundError:  # another process has it
                continue
            return
        time.sleep(0.01)


def _do_with_pass(
    work: LayerWork, device: torch.device, data: Mapping[str, Any]
) -> Mapping[str, Any]:
    _take_pass()
    return _do(work, device, data)


# In workers, too: they import the program that started them.
if __name__ in ("__main__", "__mp_main__"):
    LayerWork._do = _do_with_pass  # type: ignore[method-assign, assignment]

if __name__ == "__main__":
    os.environ[_VARIABLE] = sys.argv.pop(1)
    main()
