"""What is no plain file is refused at once, and a file that is too long is not read."""

import os

import pytest

from loraq.errors import CheckpointError, LoraqError
from loraq.json_files import read_json
from loraq.recipe import Recipe
from loraq.regular_file import is_plain_name, is_plain_path, open_regular, read_regular
from loraq.safetensors.reader import ShardReader
from tests.patience import at_once


def test_a_file_and_a_link_to_it_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "b", 3) == b"abc"
    with open_regular(tmp_path / "a") as file:
        assert file.read() == b"abc"


def test_a_file_that_is_too_long_is_not_read(tmp_path):
    (tmp_path / "a").write_bytes(b"abcd")
    with pytest.raises(OSError, match="more than 3 bytes"):
        read_regular(tmp_path / "a", 3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "nothing"])
def test_what_is_no_file_is_refused_at_once_by_every_reader(tmp_path, kind):
    paths = [tmp_path / name for name in ("model.safetensors", "config.json", "recipe.toml")]
    for path in paths:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind != "nothing":
            path.symlink_to({"device": "/dev/zero", "loop": path.name}[kind])
    with at_once():
        for read, path in zip((ShardReader, read_json, Recipe.read), paths, strict=True):
            with pytest.raises(LoraqError, match=path.name):
                read(path)
        with pytest.raises(CheckpointError):
            ShardReader(tmp_path)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.safetensors", True),
        ("größe", True),
        ("x" * 255, True),
        ("x" * 256, False),
        ("é" * 128, False),
        ("", False),
        (".", False),
        ("..", False),
        ("a/b", False),
        ("/a", False),
        ("a\\b", False),
        ("a\0b", False),
        ("a\nb", False),
        ("\x1b[2J", False),
        ("\udcff", False),
    ],
)
def test_names_of_files(name, plain):
    assert is_plain_name(name) is plain
    assert is_plain_path(f"vae/{name}") is plain or name == "a/b"


def test_paths_in_a_folder():
    assert is_plain_path("a/b/c.json")
    for path in ("/a", "a//b", "a/", "a/../b", "./a", "", "a/" * 501 + "a", "a/\x1b[2J"):
        assert not is_plain_path(path)
