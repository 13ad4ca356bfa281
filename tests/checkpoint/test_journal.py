"""The journal: what is kept of a run that was cut off, and when it is not continued."""

import errno
import json
from io import FileIO
from pathlib import Path

import pytest

from loraq.checkpoint.journal import Journal, resumable_folder
from loraq.errors import CheckpointError, LayerError

RUN = {"recipe": {"seed": 0, "method": "loraq"}, "versions": {"loraq": "1"}}


class Cut(Exception):
    """Ends a run where a test wants it."""


def begin(
    target: Path, names: str = "ab", error: BaseException | None = None, **options
) -> Journal:
    """Finish some layers, one file for each, and end with an error if one is given."""
    with resumable_folder(target, RUN, 4, **options) as journal:
        for name in names:
            if name not in journal.layers:
                (journal.folder / name).write_text(name)
                journal.note({"name": name, "n": 1})
        if error:
            raise error
    return journal


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
    with resumable_folder(tmp_path / "out", RUN, 4) as journal:
        assert list(journal.layers) == ["a", "b"]
        (journal.folder / "c").touch()
    assert names(tmp_path / "out") == ["a", "b", "c"]


def test_nothing_is_kept_of_a_run_that_finished_nothing(tmp_path):
    with pytest.raises(Cut):
        begin(tmp_path / "out", "", Cut())
    assert names(tmp_path) == []


@pytest.mark.parametrize("torn", [1, 7, 20])
def test_a_torn_last_line_does_not_count(tmp_path, torn):
    with pytest.raises(Cut):
        begin(tmp_path / "out", "abc", Cut())
    path = tmp_path / ".out.partial" / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-torn])
    with pytest.raises(Cut):
        begin(tmp_path / "out", "abd", Cut())
    assert [json.loads(line).get("name") for line in path.read_text().splitlines()] == [
        None,
        "a",
        "b",
        "d",
    ]


@pytest.mark.parametrize("content", [b"", b"{", b"nonsense\n", b"[]\n", b"\xff\n"])
def test_a_journal_without_a_first_line_is_begun_anew(tmp_path, content):
    (tmp_path / ".out.partial" / "files").mkdir(parents=True)
    (tmp_path / ".out.partial" / "files" / "left").touch()
    (tmp_path / ".out.partial" / "journal.jsonl").write_bytes(content)
    begin(tmp_path / "out", "a")
    assert names(tmp_path / "out") == ["a"]


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
        resumable_folder(tmp_path / "out", {"schemes": dict.fromkeys("abcdefgh", 1)}, 4) as journal,
    ):
        raise (journal.note({"name": "a"})) or Cut
    other = {"schemes": dict.fromkeys("abcdefgh", 2)}
    with (
        pytest.raises(CheckpointError, match="c: 1 then, 2 now, and 5 more"),
        resumable_folder(tmp_path / "out", other, 4),
    ):
        raise AssertionError


def test_settings_are_compared_as_they_are_read_back(tmp_path):
    run = {"recipe": {"options": {"factors": (0.9, 1.1)}}}
    with pytest.raises(Cut), resumable_folder(tmp_path / "out", run, 4) as journal:
        raise (journal.note({"name": "a"})) or Cut
    with resumable_folder(tmp_path / "out", run, 4) as journal:
        assert list(journal.layers) == ["a"]


def test_a_run_that_was_killed_while_it_replaced_its_target_cleans_up(tmp_path):
    with pytest.raises(Cut):
        begin(tmp_path / "out", error=Cut())
    (tmp_path / ".out.replaced").mkdir()
    begin(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_restart_forgets(tmp_path):
    with pytest.raises(Cut):
        begin(tmp_path / "out", error=Cut())
    with resumable_folder(tmp_path / "out", {"recipe": 1}, 4, restart=True) as journal:
        assert journal.layers == {}
        assert names(journal.folder) == []


def test_a_run_that_finished_nothing_does_not_bind_the_next(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "journal.jsonl").write_text('{"recipe": "other"}\n')
    begin(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_two_runs_on_one_target_are_refused(tmp_path):
    with resumable_folder(tmp_path / "out", RUN, 4):
        with pytest.raises(CheckpointError, match="is being written by another run"):
            begin(tmp_path / "out")
        begin(tmp_path / "other")
    assert names(tmp_path) == ["other", "out"]


def test_a_run_that_was_killed_after_the_last_rename_is_whole(tmp_path):
    with pytest.raises(Cut):
        begin(tmp_path / "out", error=Cut())
    partial = tmp_path / ".out.partial"
    with (partial / "journal.jsonl").open("a") as journal:
        journal.write('{"whole": true}\n')
    (partial / "files").rename(tmp_path / "out")
    with resumable_folder(tmp_path / "out", RUN, 4) as found:
        assert found.whole
        assert not found.folder.exists()
        assert list(found.layers) == ["a", "b"]
    assert names(tmp_path) == ["out"]


def test_a_run_that_was_killed_before_the_last_rename_goes_on(tmp_path):
    with pytest.raises(Cut):
        begin(tmp_path / "out", error=Cut())
    with (tmp_path / ".out.partial" / "journal.jsonl").open("a") as journal:
        journal.write('{"whole": true}\n')
    begin(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_a_target_that_is_there_is_refused_whatever_was_begun(tmp_path):
    with pytest.raises(Cut):
        begin(tmp_path / "out", error=Cut())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
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
        (KeyboardInterrupt(), KeyboardInterrupt, rf"^Interrupted\. {KEPT}"),
    ],
)
def test_an_error_says_what_is_kept(tmp_path, error, kind, match):
    with pytest.raises(kind, match=match):
        begin(tmp_path / "out", error=error)
    assert names(tmp_path) == [".out.partial"]


def test_an_interrupt_before_the_first_layer_says_so(tmp_path):
    with pytest.raises(KeyboardInterrupt, match=r"^Interrupted\. Nothing was left\.$"):
        begin(tmp_path / "out", "", KeyboardInterrupt())
    assert names(tmp_path) == []


def test_a_line_is_written_whole_even_in_parts(tmp_path):
    class Reluctant(FileIO):
        def write(self, content):
            return super().write(content[:5])

    with Reluctant(tmp_path / "journal.jsonl", "a+b") as file:
        journal = Journal(file, tmp_path / "files")
        journal.begin(RUN)
        journal.note({"name": "a"})
        assert list(Journal(file, tmp_path / "files").layers) == ["a"]


def test_a_line_that_the_disk_refuses_leaves_no_half_of_it(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    with path.open("a+b", buffering=0) as file:
        journal = Journal(file, tmp_path / "files")
        journal.begin(RUN)

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(OSError, match="No space"):
                journal.note({"name": "a"})
        journal.note({"name": "b"})
        assert list(Journal(file, tmp_path / "files").layers) == ["b"]
