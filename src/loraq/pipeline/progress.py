"""Progress of long work on stderr: layer or image i of n, its error, the time left."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from loraq.errors import show as show_text

#: Called after each layer with (layers done, layers in all, layer name, relative error).
ProgressCallback = Callable[[int, int, str, float], None]

#: Called before the first image with 0 done and after each, with (images done, images in all, what
#: is going on).
ImageCallback = Callable[[int, int, str], None]


@contextmanager
def show_layers(
    progress: ProgressCallback | bool, title: str, costs: Sequence[int] = ()
) -> Iterator[ProgressCallback]:
    """Turn an argument `progress` into a function to call after each layer.

    Args:
        progress: what the caller of the caller wants.
        title: of the work.
        costs: what the layers cost that are still to do, in their order, in any unit; by them the
            time left is told. Without them all layers count the same.
    """
    if callable(progress):
        yield progress
    elif progress:
        with progress_bar(title, costs) as show:
            yield show
    else:
        yield lambda *_: None


def show_line(title: str, text: str) -> None:
    """Say what will be done, before a bar or lines show how it goes."""
    sys.stderr.write(f"{title}: {text}\n")


def show_images(progress: ImageCallback | bool, title: str) -> ImageCallback:
    """Turn an argument `progress` into a function to call after each image."""
    if callable(progress):
        return progress
    return _image_lines(title) if progress else lambda *_: None


@contextmanager
def progress_bar(title: str, costs: Sequence[int] = ()) -> Iterator[ProgressCallback]:
    """Show a bar on a terminal, and one plain line for each layer anywhere else.

    `costs` as for `show_layers`.
    """
    share_of = _Shares(costs)
    if not sys.stderr.isatty():
        yield _layer_lines(title, share_of)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[layer]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, count="", layer="")

        def show(done: int, total: int, name: str, error: float) -> None:
            layer = f"{show_text(name)} error {error:.4f}"
            share = share_of(done, total)
            bar.update(task, completed=share, total=1, count=f"{done}/{total}", layer=layer)

        yield show


class _Shares:
    """The share of a run's work that is done after each layer."""

    def __init__(self, costs: Sequence[int]) -> None:
        self._costs = costs
        self._kept: int | None = None

    def __call__(self, done: int, total: int) -> float:
        """Return it; layers that an earlier run finished are no part of this one's work."""
        if self._kept is None:
            self._kept = done - 1
        costs = self._costs or [1] * (total - self._kept)
        return sum(costs[: done - self._kept]) / sum(costs)


def _layer_lines(title: str, share_of: Callable[[int, int], float]) -> ProgressCallback:
    begin = time.monotonic()

    def show(done: int, total: int, name: str, error: float) -> None:
        share = share_of(done, total)
        left = (time.monotonic() - begin) / share * (1 - share)
        sys.stderr.write(
            f"{title}: layer {done} of {total}, error {error:.4f}, {left:.0f} s left, "
            f"{show_text(name)}\n"
        )

    return show


def _image_lines(title: str) -> ImageCallback:
    begin = time.monotonic()

    def show(done: int, total: int, what: str) -> None:
        nonlocal begin
        if not done:
            begin = time.monotonic()
            sys.stderr.write(f"{title}: {show_text(what)}\n")
            return
        left = (time.monotonic() - begin) / done * (total - done)
        sys.stderr.write(
            f"{title}: image {done} of {total}, {left:.0f} s left, {show_text(what)}\n"
        )

    return show
