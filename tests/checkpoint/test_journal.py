"""The journal: what is read back is what was written, or an error."""

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraq import disk
from loraq.checkpoint.journal import Journal
from loraq.errors import CheckpointError

RUN = {"recipe": {"seed": 0, "method": "loraq"}, "versions": {"loraq": "1"}}


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    descriptor = disk.open_file(path, create=True)
    try:
        yield Journal(descriptor, path)
    finally:
        os.close(descriptor)


@pytest.fixture
def path(tmp_path) -> Path:
    """A journal of three layers and the end."""
    path = tmp_path / "journal.jsonl"
    with open_journal(path) as journal:
        journal.begin(RUN)
        for name in "abc":
            journal.note({"name": name, "relative_error": 0.125})
        journal.finish("f00d")
    return path


def test_what_was_written_is_read_back(path):
    with open_journal(path) as journal:
        assert journal.fingerprint == RUN
        assert journal.layers["b"] == {"name": "b", "relative_error": 0.125}
        assert list(journal.layers) == ["a", "b", "c"]
        assert journal.whole == "f00d"


@pytest.mark.parametrize("torn", [1, 7, 20])
def test_a_torn_last_line_does_not_count(path, torn):
    path.write_bytes(path.read_bytes()[:-torn])
    with open_journal(path) as journal:
        assert not journal.whole
        journal.note({"name": "d"})
    with open_journal(path) as journal:
        assert list(journal.layers) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("content", [b"", b"{", b"0123456789abcdef {"])
def test_a_journal_without_a_whole_line_is_new(path, content):
    path.write_bytes(content)
    with open_journal(path) as journal:
        assert journal.fingerprint is None
        assert journal.layers == {}


@pytest.mark.parametrize(
    "content", [b"nonsense\n", b"{}\n", b"[]\n", b"\xff\n", b"\n", b'{"recipe": "old style"}\n']
)
def test_a_line_of_another_program_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"journal\.jsonl' is damaged, .*line 1"):
        open_journal(path).__enter__()


def test_a_line_with_a_right_checksum_and_a_wrong_content_is_refused(path):
    for entry, match in (([], "not an object"), ({"other": 1}, "neither a layer nor the end")):
        with open_journal(path) as journal:
            journal._write(entry)
        with pytest.raises(CheckpointError, match=match):
            open_journal(path).__enter__()
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def test_lines_cannot_be_left_out_exchanged_or_taken_from_another_journal(path, tmp_path):
    lines = path.read_bytes().splitlines(keepends=True)
    with open_journal(tmp_path / "other") as journal:
        journal.begin({**RUN, "other": True})
        journal.note({"name": "a", "relative_error": 0.0})
    other = (tmp_path / "other").read_bytes().splitlines(keepends=True)
    for changed in (
        lines[:1] + lines[2:],
        lines[1:],
        [lines[0], lines[2], lines[1], *lines[3:]],
        [lines[0], other[1]],
        [other[0], *lines[1:]],
    ):
        path.write_bytes(b"".join(changed))
        with pytest.raises(CheckpointError, match="is not what was written"):
            open_journal(path).__enter__()


def test_a_damaged_journal_is_refused_or_read_as_it_was_up_to_a_line(path):
    """600 of them: no other error, no changed figure."""
    whole, chance = path.read_bytes(), random.Random(0)
    with open_journal(path) as journal:
        layers = list(journal.layers.items())
    refused = 0
    for _ in range(600):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(len(content))
            kind = chance.randrange(4)
            if kind == 0:
                content[place] ^= 1 << chance.randrange(8)
            elif kind == 1:
                content[place] = chance.randrange(256)
            elif kind == 2:
                del content[place : place + chance.randrange(1, 40)]
            else:
                content[place:place] = chance.choice((b"0", b"\n", b"9e9", b"\x00" * 9))
        path.write_bytes(content)
        try:
            with open_journal(path) as journal:
                assert list(journal.layers.items()) == layers[: len(journal.layers)]
        except CheckpointError:
            refused += 1
    assert 300 < refused < 600


def test_a_line_is_written_whole_even_in_parts(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, raw: write(descriptor, raw[:5]))
    with open_journal(tmp_path / "journal.jsonl") as journal:
        journal.begin(RUN)
        journal.note({"name": "a"})
    with open_journal(tmp_path / "journal.jsonl") as journal:
        assert list(journal.layers) == ["a"]


def test_a_line_that_the_disk_refuses_leaves_no_half_of_it(path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_journal(path) as journal:
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(OSError, match="No space"):
                journal.note({"name": "d"})
        journal.note({"name": "e"})
    with open_journal(path) as journal:
        assert list(journal.layers) == ["a", "b", "c", "e"]


def test_a_journal_that_nobody_can_have_written_is_not_read(path, monkeypatch):
    monkeypatch.setattr("loraq.checkpoint.journal._MOST_BYTES", 10)
    with pytest.raises(CheckpointError, match=r"it has \d+ bytes"):
        open_journal(path).__enter__()
