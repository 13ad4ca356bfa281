"""Progress of long work on stderr: layer i of n, its error, and the time left."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called after each layer with (layers done, layers in all, layer name, relative error).
ProgressCallback = Callable[[int, int, str, float], None]


@contextmanager
def progress_bar(title: str) -> Iterator[ProgressCallback]:
    """Show a bar on a terminal, and one plain line for each layer anywhere else."""
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[layer]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, layer="")

        def show(done: int, total: int, name: str, error: float) -> None:
            bar.update(task, completed=done, total=total, layer=f"{name} error {error:.4f}")

        yield show


def _lines(title: str) -> ProgressCallback:
    begin = time.monotonic()
    kept: int | None = None

    def show(done: int, total: int, name: str, error: float) -> None:
        nonlocal kept
        kept = done - 1 if kept is None else kept  # layers that an earlier run finished took no time of this one
        left = (time.monotonic() - begin) / (done - kept) * (total - done)
        sys.stderr.write(f"{title}: layer {done} of {total}, error {error:.4f}, {left:.0f} s left, {name}\n")

    return show
