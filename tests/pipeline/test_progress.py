"""Progress on stderr: lines in a file, a bar on a terminal, nothing on stdout."""

import io
import subprocess
import sys

import pytest

from loraq.pipeline import progress
from loraq.pipeline.progress import progress_bar, show_images


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_than_on_a_terminal_each_layer_is_a_line(capsys, monkeypatch):
    clock = iter([100.0, 102.0, 106.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress_bar("quantize") as show:
        show(1, 4, "blocks.0.ff", 0.0712)
        show(2, 4, "blocks.1.ff", 0.5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "quantize: layer 1 of 4, error 0.0712, 6 s left, blocks.0.ff",
        "quantize: layer 2 of 4, error 0.5000, 6 s left, blocks.1.ff",
    ]


def test_the_time_left_counts_what_layers_cost(capsys, monkeypatch):
    clock = iter([100.0, 108.0, 116.0, 118.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress_bar("quantize", [4, 4, 1, 1]) as show:
        show(3, 6, "a", 0.0)  # an earlier run did two
        show(4, 6, "b", 0.0)
        show(5, 6, "c", 0.0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[2] for line in lines] == ["12 s left", "4 s left", "2 s left"]


def test_each_image_is_a_line_with_the_time_left(capsys, monkeypatch):
    clock = iter([90.0, 100.0, 102.0, 106.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    show = show_images(True, "stats")
    show(0, 4, "loading")
    show(1, 4, "run 1 of 2")
    show(3, 4, "run 2 of 2")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "stats: loading",
        "stats: image 1 of 4, 6 s left, run 1 of 2",
        "stats: image 3 of 4, 2 s left, run 2 of 2",
    ]


def test_on_a_terminal_there_is_a_bar_that_goes_away(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("quantize") as show:
        show(1, 2, "blocks.0.ff", 0.0712)
        show(2, 2, "blocks.1.ff", 0.0834)
    text = terminal.getvalue()
    assert "quantize" in text
    assert "2/2" in text
    assert "blocks.1.ff error 0.0834" in text
    assert text.endswith("\x1b[2K")  # the line of the bar is erased
    assert capsys.readouterr().out == ""


def test_names_are_shown_escaped_and_are_no_markup(capsys, monkeypatch):
    with progress_bar("quantize") as show:
        show(1, 2, "a\x1b[2J\nquantize: done", 0.5)
    show_images(True, "stats")(0, 1, "\x1b[2J")
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert err.count("\n") == 2
    assert r"a\x1b[2J\nquantize: done" in err
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with progress_bar("quantize") as show:
        show(1, 2, "[red]a[/red]\x07", 0.5)
    assert r"[red]a[/red]\x07 error" in terminal.getvalue()


@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_an_error_passes_through(monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr())
    with pytest.raises(KeyboardInterrupt), progress_bar("quantize"):
        raise KeyboardInterrupt


def test_rich_is_loaded_only_for_a_bar():
    program = (
        "import sys\nfrom loraq.pipeline.progress import progress_bar\n"
        "with progress_bar('a') as show: show(1, 1, 'b', 0.0)\nassert 'rich' not in sys.modules"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert finished.stderr == "a: layer 1 of 1, error 0.0000, 0 s left, b\n"
    assert finished.stdout == ""
