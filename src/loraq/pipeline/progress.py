"""Progress of long work on stderr: layer or image i of n, its error, the time left."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loraq.errors import show as show_text

#: Called after each layer with (layers done, layers in all, layer name, relative error).
ProgressCallback = Callable[[int, int, str, float], None]

#: Called before the first image with 0 done and after each, with (images done, images in all, what
#: is going on).
ImageCallback = Callable[[int, int, str], None]


@contextmanager
def show_layers(progress: ProgressCallback | bool, title: str) -> Iterator[ProgressCallback]:
    """Turn an argument `progress` into a function to call after each layer."""
    if callable(progress):
        yield progress
    elif progress:
        with progress_bar(title) as show:
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
def progress_bar(title: str) -> Iterator[ProgressCallback]:
    """Show a bar on a terminal, and one plain line for each layer anywhere else."""
    if not sys.stderr.isatty():
        yield _layer_lines(title)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[layer]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, layer="")

        def show(done: int, total: int, name: str, error: float) -> None:
            bar.update(
                task, completed=done, total=total, layer=f"{show_text(name)} error {error:.4f}"
            )

        yield show


def _layer_lines(title: str) -> ProgressCallback:
    begin = time.monotonic()
    kept: int | None = None

    def show(done: int, total: int, name: str, error: float) -> None:
        nonlocal kept
        # Layers that an earlier run finished took no time of this one.
        kept = done - 1 if kept is None else kept
        left = (time.monotonic() - begin) / (done - kept) * (total - done)
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
