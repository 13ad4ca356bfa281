"""A pipeline's other files: what is copied is what is hashed, and a change is found later."""

import hashlib
import os
from pathlib import Path

import pytest

from loraq.checkpoint import components
from loraq.checkpoint.components import (
    StoredFile,
    check_components,
    copy_components,
    parse_components,
)
from loraq.errors import CheckpointError
from tests.folders import components_of, files_of

CONTENT = {"vae/w.bin": bytes(range(256)) * 40, "vae/empty": b"", "index.json": b"{}"}


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    for name, content in CONTENT.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(content)
    (tmp_path / "target").mkdir()
    return {name: tmp_path / "source" / name for name in CONTENT}


def as_dict(stored: dict[str, StoredFile]) -> dict[str, object]:
    return {name: each.to_dict() for name, each in stored.items()}


@pytest.mark.parametrize("link", [False, True])
def test_what_is_noted_is_what_is_written(files, tmp_path, monkeypatch, link):
    monkeypatch.setattr(components, "_BLOCK", 1000)
    stored = copy_components(files, tmp_path / "target", link=link)
    assert files_of(tmp_path / "target") == CONTENT
    assert as_dict(stored) == components_of(CONTENT)
    check_components(tmp_path / "target", stored)
    same = (tmp_path / "target/vae/w.bin").samefile(files["vae/w.bin"])
    assert same is link


def test_a_copy_has_the_permissions_of_its_source(files, tmp_path):
    files["vae/w.bin"].chmod(0o400)
    copy_components(files, tmp_path / "target")
    assert (tmp_path / "target/vae/w.bin").stat().st_mode & 0o777 == 0o400
    copy_components(files, tmp_path / "target")


@pytest.mark.parametrize("change", ["source", "copy"])
def test_a_resumed_run_trusts_neither_size_nor_time(files, tmp_path, change):
    copy_components(files, tmp_path / "target")
    path = files["vae/w.bin"] if change == "source" else tmp_path / "target/vae/w.bin"
    before = path.stat()
    path.write_bytes(b"other".ljust(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    wanted = files_of(tmp_path / "source")
    stored = copy_components(files, tmp_path / "target")
    assert files_of(tmp_path / "target") == wanted
    assert as_dict(stored) == components_of(wanted)


def test_a_copy_that_is_whole_is_not_made_again(files, tmp_path):
    stored = copy_components(files, tmp_path / "target")
    before = (tmp_path / "target/vae/w.bin").stat().st_ino
    assert copy_components(files, tmp_path / "target") == stored
    assert (tmp_path / "target/vae/w.bin").stat().st_ino == before


@pytest.mark.parametrize("first", [False, True])
def test_a_copy_does_not_stay_a_second_name_nor_the_other_way_round(files, tmp_path, first):
    copy_components(files, tmp_path / "target", link=first)
    copy_components(files, tmp_path / "target", link=not first)
    assert (tmp_path / "target/vae/w.bin").samefile(files["vae/w.bin"]) is not first


def test_a_link_in_the_place_of_a_copy_is_not_written_through(files, tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "target/vae").mkdir()
    (tmp_path / "target/vae/w.bin").symlink_to(tmp_path / "precious")
    copy_components(files, tmp_path / "target")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert files_of(tmp_path / "target") == CONTENT


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("swap", ["link", "pipe"])
def test_a_file_that_is_swapped_after_it_was_found_is_refused(files, tmp_path, swap, link):
    files["vae/w.bin"].unlink()
    if swap == "link":
        (tmp_path / "secret").write_bytes(b"private")
        files["vae/w.bin"].symlink_to(tmp_path / "secret")
    else:
        os.mkfifo(files["vae/w.bin"])
    with pytest.raises(CheckpointError, match=r"Cannot read|is not a regular file"):
        copy_components(files, tmp_path / "target", link=link)
    assert b"private" not in files_of(tmp_path / "target").values()


def test_what_changes_while_it_is_copied_is_noted_as_it_was_written(files, tmp_path, monkeypatch):
    monkeypatch.setattr(components, "_BLOCK", 1000)
    read, calls = os.read, []

    def change(descriptor: int, n: int) -> bytes:
        block = read(descriptor, n)
        calls.append(len(block))
        if len(calls) == 2:
            with files["vae/w.bin"].open("r+b") as file:
                file.write(b"x" * 256 * 40)
        return block

    monkeypatch.setattr(os, "read", change)
    stored = copy_components(files, tmp_path / "target")
    monkeypatch.undo()
    written = files_of(tmp_path / "target")
    assert written["vae/w.bin"][:1500] == CONTENT["vae/w.bin"][:1500]
    assert written["vae/w.bin"][-1:] == b"x"
    assert as_dict(stored) == components_of(written)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "'vae/w.bin' is missing"),
        (lambda path: path.unlink() or path.mkdir(), "'vae/w.bin' is missing"),
        (lambda path: path.unlink() or os.mkfifo(path), "'vae/w.bin' is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "'vae/w.bin' was changed"),
        (lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), "'vae/w.bin' was changed"),
    ],
)
def test_a_change_is_found(files, tmp_path, damage, message):
    stored = copy_components(files, tmp_path / "target")
    damage(tmp_path / "target/vae/w.bin")
    with pytest.raises(
        CheckpointError, match=rf"Of 3 other files in .*, 1 are not .*: {message}\."
    ):
        check_components(tmp_path / "target", stored)


GOOD = {"bytes": 3, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "content",
    [
        [],
        "vae/w.bin",
        None,
        {"../w.bin": GOOD},
        {"vae/../../w.bin": GOOD},
        {"/etc/passwd": GOOD},
        {"": GOOD},
        {".": GOOD},
        {"a\0b": GOOD},
        {"w.bin": None},
        {"w.bin": {}},
        {"w.bin": [3, "0" * 64]},
        {"w.bin": GOOD | {"bytes": -1}},
        {"w.bin": GOOD | {"bytes": True}},
        {"w.bin": GOOD | {"bytes": 3.0}},
        {"w.bin": GOOD | {"bytes": "3"}},
        {"w.bin": GOOD | {"sha256": "0" * 63}},
        {"w.bin": GOOD | {"sha256": "G" * 64}},
        {"w.bin": GOOD | {"sha256": ["0" * 64]}},
        {"w.bin": GOOD | {"sha256": None}},
    ],
)
def test_a_table_of_another_kind_is_refused(content):
    with pytest.raises(ValueError, match="'components'"):
        parse_components(content)


def test_what_is_noted_is_read_back(files, tmp_path):
    stored = copy_components(files, tmp_path / "target")
    assert parse_components(as_dict(stored)) == stored
    assert stored["vae/empty"].sha256 == hashlib.sha256().hexdigest()
