"""The journals of workers: what the leader of a run did not hear of is not lost."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from loraq import disk
from loraq.checkpoint import journals
from loraq.checkpoint.journals import open_own
from loraq.checkpoint.partial import (
    PartialFolder,
    partial_path,
    resumable_folder,
    work_folders,
)
from loraq.errors import CheckpointError, LayerError

RUN = {"recipe": "a", "numbers": [1, 2]}


def leave(target: Path, worker: int, *names: str, run: dict = RUN) -> None:
    """Do what a worker does that is killed afterwards."""
    journal = open_own(work_folders(target)[1], worker, run)
    for name in names:
        journal.note({"name": name, "error": 0.5})
    os.close(journal._descriptor)


def begin(target: Path, *names: str, run: dict = RUN, **options: bool) -> set[str]:
    """Begin a run, or go on with it; it finishes layers, and fails. Return what it found."""
    found: set[str] = set()

    def work(partial: PartialFolder) -> None:
        found.update(partial.journal.layers)
        for name in names:
            partial.journal.note({"name": name})

    fail(target, work, run, **options)
    return found


def fail(
    target: Path, work: Callable[[PartialFolder], None], run: dict = RUN, **options: bool
) -> None:
    """Let a run fail after some work."""
    with suppress(LayerError), resumable_folder(target, run, 9, **options) as partial:
        work(partial)
        raise LayerError("stop")


def test_the_next_run_gathers_what_workers_have_noted(tmp_path):
    target = tmp_path / "out"
    begin(target, "a")
    leave(target, 0, "a", "b")
    leave(target, 3, "c")
    assert begin(target) == {"a", "b", "c"}
    assert not list(work_folders(target)[1].iterdir())
    assert begin(target) == {"a", "b", "c"}, "it is in the journal of the run now"


def test_what_only_workers_have_noted_is_kept_when_the_leader_fails(tmp_path):
    target = tmp_path / "out"
    fail(target, lambda _: leave(target, 1, "b"))
    assert begin(target) == {"b"}


@pytest.mark.parametrize("damage", [b"0 5\n", b"0 []\n", b"0 {}\n", b"0 \xff\n", b"0\n", None])
def test_a_damaged_journal_of_a_worker_does_not_hide_why_the_leader_failed(tmp_path, damage):
    target = tmp_path / "out"

    def work(_: PartialFolder) -> None:
        leave(target, 0, "a")
        leave(target, 1, "b")
        path = work_folders(target)[1] / "1.jsonl"
        if damage is None:  # it is going away just now
            path.unlink()
            path.symlink_to("nowhere")
        else:
            path.write_bytes(b"first\n" + damage)
        raise LayerError("the reason")

    with (
        pytest.raises(LayerError, match=r"the reason.*1 of 9"),
        resumable_folder(target, RUN, 9) as partial,
    ):
        work(partial)


def test_workers_that_noted_nothing_keep_nothing(tmp_path):
    fail(tmp_path / "out", lambda _: leave(tmp_path / "out", 1))
    assert not partial_path(tmp_path / "out").exists()


def test_what_workers_of_other_settings_have_noted_does_not_count(tmp_path):
    target = tmp_path / "out"
    begin(target, "a")
    leave(target, 0, "b", run={"recipe": "another"})
    assert begin(target) == {"a"}


def test_a_rank_that_is_started_again_goes_on_with_its_journal(tmp_path):
    target = tmp_path / "out"
    begin(target, "a")
    leave(target, 0, "b")
    leave(target, 0, "c")
    assert begin(target) == {"a", "b", "c"}


def test_a_run_waits_for_the_workers_of_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "_PATIENCE", 0.2)
    target = tmp_path / "out"
    begin(target, "a")
    journal = open_own(work_folders(target)[1], 0, RUN)
    with pytest.raises(CheckpointError, match="written by a worker of another run"):
        open_own(work_folders(target)[1], 0, RUN)
    with (
        pytest.raises(CheckpointError, match="written by a worker of another run"),
        resumable_folder(target, RUN, 9),
    ):
        pass
    os.close(journal._descriptor)
    assert begin(target) == {"a"}


def test_a_restart_does_not_read_them(tmp_path):
    target = tmp_path / "out"
    begin(target, "a")
    leave(target, 0, "b")
    path = work_folders(target)[1] / "0.jsonl"
    path.write_bytes(b"0" * 16 + path.read_bytes()[16:])
    with pytest.raises(CheckpointError, match="is damaged"), resumable_folder(target, RUN, 9):
        pass
    assert begin(target, restart=True) == set()


def test_a_finished_run_leaves_none(tmp_path):
    target = tmp_path / "out"
    with resumable_folder(target, RUN, 9) as partial:
        leave(target, 0, "a")
        disk.write_file(partial.folder / "model", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
