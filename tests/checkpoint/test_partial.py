"""What is prepared beside a target: kept of a run that was cut off, private, and never in half."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraq import disk
from loraq.checkpoint.partial import (
    PartialFolder,
    atomic_file,
    atomic_folder,
    explain_interrupt,
    partial_path,
    remove_leftovers,
    resumable_folder,
)
from loraq.errors import CheckpointError, LayerError, LoraqWarning

RUN = {"recipe": {"seed": 0, "method": "loraq"}, "versions": {"loraq": "1"}}


class Cut(Exception):
    """Ends a run where a test wants it."""


def begin(
    target: Path, names: str = "ab", error: BaseException | None = None, **options
) -> PartialFolder:
    """Finish some layers, one file for each, and end with an error if one is given."""
    with resumable_folder(target, RUN, 4, **options) as partial:
        for name in names:
            if name not in partial.journal.layers:
                (partial.folder / name).write_text(name)
                partial.journal.note({"name": name, "n": 1})
        if error:
            raise error
    return partial


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_that_ends_well_leaves_only_the_target(tmp_path):
    begin(tmp_path / "deep" / "out")
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["a", "b"]


def test_finished_layers_are_kept_and_known_to_the_next_run(tmp_path):
    with pytest.raises(Cut):
        begin(tmp_path / "out", error=Cut())
    assert names(tmp_path) == [".out.partial"]
    with resumable_folder(tmp_path / "out", RUN, 4) as partial:
        assert list(partial.journal.layers) == ["a", "b"]
        (partial.folder / "c").touch()
    assert names(tmp_path / "out") == ["a", "b", "c"]


def test_nothing_is_kept_of_a_run_that_finished_nothing(tmp_path):
    with pytest.raises(Cut):
        begin(tmp_path / "out", "", Cut())
    assert names(tmp_path) == []


def test_other_settings_are_refused_and_named(tmp_path):
    with pytest.raises(Cut):
        begin(tmp_path / "out", error=Cut())
    other = {"recipe": {"seed": 7, "method": "loraq"}, "versions": {"loraq": "1"}}
    with (
        pytest.raises(
            CheckpointError,
            match=r"2 of 4 layers of a run with other settings\. Changed: recipe \(seed: 0 then, "
            r"7 now\)\. Use the old settings to go on, `--restart` to begin anew",
        ) as raised,
        resumable_folder(tmp_path / "out", other, 4),
    ):
        raise AssertionError
    assert "method" not in str(raised.value)
    assert "run the same command" not in str(raised.value)
    begin(tmp_path / "out")  # the old settings still go on


def test_of_many_changes_a_few_are_named(tmp_path):
    with (
        pytest.raises(Cut),
        resumable_folder(tmp_path / "out", {"schemes": dict.fromkeys("abcdefgh", 1)}, 4) as partial,
    ):
        raise (partial.journal.note({"name": "a"})) or Cut
    other = {"schemes": dict.fromkeys("abcdefgh", 2)}
    with (
        pytest.raises(CheckpointError, match="c: 1 then, 2 now, and 5 more"),
        resumable_folder(tmp_path / "out", other, 4),
    ):
        raise AssertionError


def test_settings_are_compared_as_they_are_read_back(tmp_path):
    run = {"recipe": {"options": {"factors": (0.9, 1.1)}}}
    with pytest.raises(Cut), resumable_folder(tmp_path / "out", run, 4) as partial:
        raise (partial.journal.note({"name": "a"})) or Cut
    with resumable_folder(tmp_path / "out", run, 4) as partial:
        assert list(partial.journal.layers) == ["a"]


def test_restart_forgets(tmp_path):
    with pytest.raises(Cut):
        begin(tmp_path / "out", error=Cut())
    with resumable_folder(tmp_path / "out", {"recipe": 1}, 4, restart=True) as partial:
        assert partial.journal.layers == {}
        assert names(partial.folder) == []


def test_a_damaged_journal_is_refused_by_name_and_restart_forgets_it(tmp_path):
    with pytest.raises(Cut):
        begin(tmp_path / "out", error=Cut())
    path = tmp_path / ".out.partial" / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"n": 1', b'"n": 2', 1))
    with pytest.raises(CheckpointError, match=r"journal\.jsonl' is damaged, .*`--restart`"):
        begin(tmp_path / "out")
    with pytest.raises(CheckpointError, match="is damaged"), atomic_folder(tmp_path / "out"):
        raise AssertionError
    begin(tmp_path / "out", restart=True)
    assert names(tmp_path) == ["out"]


def test_a_run_that_finished_nothing_does_not_bind_the_next(tmp_path):
    with resumable_folder(tmp_path / "out", {"recipe": "other"}, 4) as partial:
        shutil.copytree(partial.path, tmp_path / "copy")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "copy").rename(tmp_path / ".out.partial")
    begin(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_two_runs_on_one_target_are_refused(tmp_path):
    with resumable_folder(tmp_path / "out", RUN, 4):
        with pytest.raises(CheckpointError, match="is being written by another run"):
            begin(tmp_path / "out")
        begin(tmp_path / "other")
    assert names(tmp_path) == ["other", "out"]


@pytest.fixture(params=["exchange", "two steps"])
def way(request, monkeypatch):
    """How a target is replaced: at once, or as on systems that cannot exchange names."""
    if request.param == "two steps":
        monkeypatch.setattr(disk, "exchange", lambda *_: False)
    elif not _can_exchange():
        pytest.skip("this file system cannot exchange two names")
    return request.param


def _can_exchange() -> bool:
    return os.uname().sysname in ("Linux", "Darwin")


def model_at(folder: Path, content: str = "old") -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_class_name": "Net"}')
    (folder / "model.safetensors").write_text(content)


@contextmanager
def killed(monkeypatch, owner: object, *names: str, after: bool = False) -> Iterator[None]:
    """End the block at the next call of one of some functions, without any cleaning up."""
    with monkeypatch.context() as patch:
        patch.setattr(PartialFolder, "remove", lambda self: None)
        for name in names:
            real = getattr(owner, name)

            def end(*args, _real=real, **kwargs):
                if after:
                    _real(*args, **kwargs)
                raise Cut

            patch.setattr(owner, name, end)
        with pytest.raises(Cut):
            yield


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_was_killed_after_the_last_rename_is_published(
    tmp_path, monkeypatch, way, there
):
    if there:
        model_at(tmp_path / "out")
    with killed(monkeypatch, PartialFolder, "publish", after=True):
        begin(tmp_path / "out", overwrite=there)
    assert names(tmp_path) == [".out.partial", "out"]
    assert names(tmp_path / "out") == ["a", "b"]
    remove_leftovers(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a", "b"]


@pytest.mark.parametrize("there", [False, True])
def test_a_killed_run_whose_target_is_there_does_not_bind_the_next(
    tmp_path, monkeypatch, way, there
):
    if there:
        model_at(tmp_path / "out")
    with killed(monkeypatch, PartialFolder, "publish", after=True):
        begin(tmp_path / "out", overwrite=there)
    with pytest.raises(CheckpointError, match="the folder is not empty") as raised:
        begin(tmp_path / "out")
    assert "kept" not in str(raised.value)
    assert names(tmp_path) == ["out"]


def test_what_another_run_has_finished_is_no_leftover(tmp_path):
    with pytest.raises(Cut):
        begin(tmp_path / "out", error=Cut())
    remove_leftovers(tmp_path / "out")
    assert names(tmp_path) == [".out.partial"]
    (tmp_path / ".other.partial").touch()
    remove_leftovers(tmp_path / "other")
    assert names(tmp_path) == [".other.partial", ".out.partial"]


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_was_killed_before_the_last_rename_goes_on(tmp_path, monkeypatch, way, there):
    if there:
        model_at(tmp_path / "out")
    with (
        killed(monkeypatch, PartialFolder, "_replace_in_two_steps")
        if way == "two steps" and there
        else killed(monkeypatch, *((disk, "exchange") if there else (Path, "rename")))
    ):
        begin(tmp_path / "out", overwrite=there)
    assert partial_path(tmp_path / "out").is_dir()
    assert not there or names(tmp_path / "out") == ["config.json", "model.safetensors"]
    begin(tmp_path / "out", overwrite=there)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a", "b"]


def test_a_run_that_was_killed_after_its_end_is_forgotten_by_another(tmp_path, monkeypatch, way):
    """What it made is in the target; the partial folder has the old one, which is nobody's."""
    model_at(tmp_path / "out")
    with killed(monkeypatch, PartialFolder, "publish", after=True):
        begin(tmp_path / "out", overwrite=True)
    shutil.rmtree(tmp_path / "out")
    model_at(tmp_path / "out", "newer")
    with resumable_folder(tmp_path / "out", {"recipe": 2}, 4, overwrite=True) as partial:
        assert partial.journal.layers == {}
        assert names(partial.folder) == []
    assert names(tmp_path) == ["out"]


def test_a_run_that_was_killed_between_the_two_steps_gives_the_old_back(tmp_path, monkeypatch):
    model_at(tmp_path / "out")
    monkeypatch.setattr(disk, "exchange", lambda *_: False)
    with killed(monkeypatch, PartialFolder, "_replace_in_two_steps"):
        begin(tmp_path / "out", overwrite=True)
    (tmp_path / "out").rename(tmp_path / ".out.partial" / "replaced")
    with pytest.warns(LoraqWarning, match="is back as it was"), pytest.raises(Cut):
        begin(tmp_path / "out", error=Cut(), overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"
    begin(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]


def test_a_failing_second_step_gives_the_old_back(tmp_path, monkeypatch):
    model_at(tmp_path / "out")
    rename = os.rename

    def failing(one, other):
        if Path(one).name == "files":
            raise OSError(errno.EIO, "Input/output error")
        rename(one, other)

    monkeypatch.setattr(disk, "exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", failing)
    with (
        pytest.raises(CheckpointError, match="Input/output error"),
        atomic_folder(tmp_path / "out", overwrite=True),
    ):
        pass
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path):
    with (
        pytest.raises(CheckpointError, match="the folder is not empty"),
        atomic_folder(tmp_path / "out"),
    ):
        model_at(tmp_path / "out", "a neighbour's")
    assert (tmp_path / "out" / "model.safetensors").read_text() == "a neighbour's"
    assert names(tmp_path) == ["out"]


def test_a_folder_that_is_killed_while_it_is_saved_is_removed_by_the_next(tmp_path, monkeypatch):
    with killed(monkeypatch, PartialFolder, "publish"), atomic_folder(tmp_path / "out") as at:
        (at / "half").touch()
    with atomic_folder(tmp_path / "out") as at:
        assert names(at) == []
    assert names(tmp_path) == ["out"]


def test_saving_does_not_touch_what_an_interrupted_run_has_finished(tmp_path):
    with pytest.raises(Cut):
        begin(tmp_path / "out", error=Cut())
    with (
        pytest.raises(CheckpointError, match=r"holds 2 layers of a run .* that was interrupted"),
        atomic_folder(tmp_path / "out"),
    ):
        raise AssertionError
    begin(tmp_path / "out")


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(Cut), atomic_file(tmp_path / "file") as partial:
        raise partial.write_text("new") and Cut
    assert (tmp_path / "file").read_text() == "old"
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text("new")
        assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_a_name_may_be_as_long_as_a_file_system_takes(tmp_path):
    begin(tmp_path / ("n" * 255))
    assert names(tmp_path) == ["n" * 255]


@pytest.mark.parametrize("name", ["n" * 256, "nul\0"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="Choose another name"):
        begin(tmp_path / name)
    with pytest.raises(CheckpointError, match="Choose another name"), atomic_file(tmp_path / name):
        raise AssertionError


def test_the_partial_folder_is_for_this_user_alone(tmp_path):
    with resumable_folder(tmp_path / "out", RUN, 4) as partial:
        assert partial.path.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "out").stat().st_mode & 0o777 != 0o700  # others may read the model


def plant_link(partial: Path, victim: Path) -> None:
    partial.symlink_to(victim.parent)


def plant_file(partial: Path, victim: Path) -> None:
    partial.write_text("")


def plant_open_folder(partial: Path, victim: Path) -> None:
    partial.mkdir()
    partial.chmod(0o755)


def plant_journal_link(partial: Path, victim: Path) -> None:
    partial.mkdir(0o700)
    (partial / "journal.jsonl").symlink_to(victim)


def plant_files_link(partial: Path, victim: Path) -> None:
    partial.mkdir(0o700)
    (partial / "files").symlink_to(victim.parent)


def plant_second_name(partial: Path, victim: Path) -> None:
    partial.mkdir(0o700)
    (partial / "journal.jsonl").hardlink_to(victim)


def plant_journal_folder(partial: Path, victim: Path) -> None:
    (partial / "journal.jsonl").mkdir(parents=True)
    partial.chmod(0o700)


def plant_fifo(partial: Path, victim: Path) -> None:
    partial.mkdir(0o700)
    os.mkfifo(partial / "journal.jsonl")


def plant_other_files(partial: Path, victim: Path) -> None:
    partial.mkdir(0o700)
    (partial / "thesis.tex").write_text("mine")


PLANTS = {
    plant_link: "is not a folder, so it is not used",
    plant_file: "is not a folder, so it is not used",
    plant_open_folder: "is open to other users",
    plant_journal_link: "holds 'journal.jsonl', a link",
    plant_files_link: "holds 'files', a link",
    plant_second_name: "Cannot write",
    plant_journal_folder: "Cannot write",
    plant_fifo: "Cannot write",
    plant_other_files: "holds 'thesis.tex', which loraq did not write",
}


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("restart", [False, True])
def test_what_a_stranger_may_have_planted_is_refused_and_left_alone(tmp_path, plant, restart):
    victim = tmp_path / "home" / "journal.jsonl"
    victim.parent.mkdir()
    victim.write_text("precious")
    plant(tmp_path / ".out.partial", victim)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=PLANTS[plant]):
        begin(tmp_path / "out", restart=restart)
    with pytest.raises(CheckpointError, match=PLANTS[plant]), atomic_folder(tmp_path / "out"):
        raise AssertionError
    assert victim.read_text() == "precious"
    assert sorted(tmp_path.rglob("*")) == before


def test_another_users_partial_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / ".out.partial").mkdir(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(CheckpointError, match="belongs to another user"):
        begin(tmp_path / "out")


def test_a_file_system_without_modes_is_served(tmp_path, monkeypatch):
    """FAT and some network disks show every folder as open to all, whatever is asked for."""
    with pytest.raises(Cut):
        begin(tmp_path / "out", error=Cut())
    (tmp_path / ".out.partial").chmod(0o777)
    monkeypatch.setattr("loraq.checkpoint.private._has_modes", lambda folder: False)
    begin(tmp_path / "out")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_served(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    begin(tmp_path / "out")
    monkeypatch.setattr(disk, "fcntl", None)  # Windows
    begin(tmp_path / "other")


def test_a_target_that_is_there_is_refused_whatever_was_begun(tmp_path):
    with pytest.raises(Cut):
        begin(tmp_path / "out", error=Cut())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"_class_name": "Net"}')
    with pytest.raises(CheckpointError, match="the folder is not empty"):
        begin(tmp_path / "out")
    begin(tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == ["a", "b"]


KEPT = r"2 of 4 layers are kept; run the same command to go on\."


@pytest.mark.parametrize(
    ("error", "kind", "match"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            CheckpointError,
            f"the disk is full.* {KEPT}",
        ),
        (
            OSError(errno.EROFS, "Read-only file system"),
            CheckpointError,
            f"Read-only file system.* {KEPT}",
        ),
        (CheckpointError("The source is gone."), CheckpointError, rf"^The source is gone\. {KEPT}"),
        (LayerError("Layer 'x' failed."), LayerError, rf"^Layer 'x' failed\. {KEPT}"),
    ],
)
def test_an_error_says_what_is_kept(tmp_path, error, kind, match):
    with pytest.raises(kind, match=match):
        begin(tmp_path / "out", error=error)
    assert names(tmp_path) == [".out.partial"]


def test_an_interrupt_says_what_is_kept_whenever_it_comes(tmp_path):
    nothing, kept = r"^Interrupted\. Nothing was left\.$", rf"^Interrupted\. {KEPT}"
    with pytest.raises(KeyboardInterrupt, match=nothing), explain_interrupt(tmp_path / "out", 4):
        begin(tmp_path / "out", "", KeyboardInterrupt())
    assert names(tmp_path) == []
    with pytest.raises(KeyboardInterrupt, match=kept), explain_interrupt(tmp_path / "out", 4):
        begin(tmp_path / "out", error=KeyboardInterrupt())
    # While the next run still looks at its source.
    with pytest.raises(KeyboardInterrupt, match=kept), explain_interrupt(tmp_path / "out", 4):
        raise KeyboardInterrupt
    (tmp_path / ".out.partial" / "journal.jsonl").write_text("damaged\n")
    with pytest.raises(KeyboardInterrupt, match=nothing), explain_interrupt(tmp_path / "out", 4):
        raise KeyboardInterrupt
