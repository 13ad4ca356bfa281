"""Which files of a folder are its own, whatever stands in it; and nothing hangs."""

import os
import socket
from pathlib import Path

import pytest

from loraq.checkpoint import links
from loraq.checkpoint.links import find_files, require_own_weights
from loraq.errors import CheckpointError


@pytest.fixture
def root(tmp_path) -> Path:
    """A pipeline, and a secret beside it."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "id_rsa").write_bytes(b"private")
    for name in ("model_index.json", "transformer/config.json", "vae/config.json", "vae/w.bin"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(name)
    return tmp_path / "root"


def test_files_are_found_in_order_and_one_folder_is_left_out(root):
    assert list(find_files(root)) == [
        "model_index.json",
        "transformer/config.json",
        "vae/config.json",
        "vae/w.bin",
    ]
    assert "transformer/config.json" not in find_files(root, without={"transformer"})


def test_links_inside_are_followed_to_the_file_they_lead_to(root):
    (root / "vae" / "again.bin").symlink_to("w.bin")
    (root / "vae" / "chain.bin").symlink_to("again.bin")
    (root / "vae_2").symlink_to("vae")
    (root / "absolute.bin").symlink_to((root / "vae" / "w.bin").resolve())
    files = find_files(root)
    for name in ("vae/again.bin", "vae/chain.bin", "vae_2/w.bin", "absolute.bin"):
        assert files[name] == root.resolve() / "vae" / "w.bin"
    assert "vae_2/config.json" in files


def test_a_source_may_be_named_by_a_link(root, tmp_path):
    (tmp_path / "named").symlink_to(root)
    (root / "vae" / "again.bin").symlink_to("w.bin")
    assert find_files(tmp_path / "named") == find_files(root)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


OUT = "a link out of it, to '.*id_rsa'"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda root: (root / "vae/x").symlink_to("../../secret/id_rsa"), OUT),
        (lambda root: (root / "vae/x").symlink_to(root.parent / "secret/id_rsa"), OUT),
        (lambda root: (root / "vae/x").symlink_to("y") or (root / "vae/y").symlink_to(
            "../../secret/id_rsa"), OUT),
        (lambda root: (root / "vae/x").symlink_to("../up/id_rsa") or (root / "up").symlink_to(
            "../secret"), OUT),
        (lambda root: (root / "vae/x").symlink_to("../../secret"), "a link out of it, to"),
        (lambda root: (root / "vae/x").symlink_to(".."), "a link to a folder that it is in"),
        (lambda root: (root / "vae/x").symlink_to("."), "a link to a folder that it is in"),
        (lambda root: (root / "vae/x").symlink_to("../.."), "a link out of it"),
        (lambda root: (root / "vae/x").symlink_to("x"), "a link that leads nowhere"),
        (lambda root: (root / "vae/x").symlink_to("nothing"), "a link that leads nowhere"),
        (lambda root: (root / "vae/x").symlink_to("/dev/zero"), "a link out of it"),
        (lambda root: os.mkfifo(root / "vae/x"), "a pipe"),
        (lambda root: os.mkfifo(root / "vae/y") or (root / "vae/x").symlink_to("y"), "a pipe"),
        (lambda root: bind(root / "vae/x"), "a socket"),
    ],
)  # fmt: skip
def test_what_is_not_a_file_of_the_folder_is_refused_by_name(root, make, reason):
    make(root)
    with pytest.raises(CheckpointError, match=rf"'vae/x' \({reason}"):
        find_files(root)


def test_folders_that_link_to_each_other_end(root):
    (root / "vae" / "to").symlink_to("../other")
    (root / "other").mkdir()
    (root / "other" / "back").symlink_to("../vae")
    with pytest.raises(CheckpointError, match=r"'other/back/to' .*'vae/to/back' \(a link to a"):
        find_files(root)


def test_folders_that_double_at_every_step_are_refused(root, monkeypatch):
    monkeypatch.setattr(links, "_MOST_FILES", 1000)
    for i in range(20):
        (root / str(i)).mkdir()
        for name in "ab":
            (root / str(i) / name).symlink_to(f"../{i + 1}")
    (root / "20").mkdir()
    with pytest.raises(CheckpointError, match="holds more than 1000 files"):
        find_files(root)


def test_many_refusals_give_a_short_message(root):
    for i in range(1000):
        (root / f"{i:04}").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="and 994 more") as error:
        find_files(root)
    assert len(str(error.value)) < 4000


@pytest.fixture
def snapshot(root, tmp_path) -> Path:
    """The same pipeline in the hub's cache."""
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    for i, (name, path) in enumerate(find_files(root).items()):
        link = repository / "snapshots" / "abc" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(repository / "blobs" / str(i))
        link.symlink_to(os.path.relpath(repository / "blobs" / str(i), link.parent))
    return repository / "snapshots" / "abc"


def test_a_snapshot_leads_to_the_blobs_of_its_repository(snapshot):
    files = find_files(snapshot)
    assert {path.parent for path in files.values()} == {snapshot.parents[1].resolve() / "blobs"}
    assert [path.read_text() for path in files.values()] == list(files)
    require_own_weights(snapshot / "transformer", snapshot / "transformer")


@pytest.mark.parametrize("to", ["models--org--other/blobs/0", "version.txt"])
def test_a_snapshot_leads_nowhere_else(snapshot, to):
    other = snapshot.parents[2] / to
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_text("of another repository")
    (snapshot / "vae" / "x").symlink_to(os.path.relpath(other, snapshot / "vae"))
    with pytest.raises(CheckpointError, match=r"'vae/x' \(a link out of it"):
        find_files(snapshot)


def test_a_folder_of_blobs_that_is_itself_a_link_is_not_the_cache(snapshot, tmp_path):
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(blobs.with_name("moved"))
    blobs.symlink_to(tmp_path / "secret")
    (snapshot / "x").symlink_to("../../blobs/id_rsa")
    with pytest.raises(CheckpointError, match=r"'x' \(a link out of it, to '.*secret/id_rsa'"):
        find_files(snapshot)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "m.safetensors.index.json"])
def test_what_is_read_of_the_transformer_is_its_own(root, name):
    (root / "transformer" / name).unlink(missing_ok=True)
    (root / "transformer" / name).symlink_to("../../secret/id_rsa")
    with pytest.raises(CheckpointError, match=rf"'{name}' \(a link out of it"):
        require_own_weights(root, root / "transformer")


def test_a_transformer_that_is_a_link_out_is_refused(root):
    (root / "transformer").rename(root.parent / "elsewhere")
    (root / "transformer").symlink_to("../elsewhere")
    with pytest.raises(CheckpointError, match=r"'config.json' \(a link out of it"):
        require_own_weights(root, root / "transformer")


def test_what_is_not_read_of_the_transformer_does_not_matter(root):
    (root / "transformer" / "notes.txt").symlink_to("../../secret/id_rsa")
    require_own_weights(root, root / "transformer")


def test_a_pipe_for_weights_does_not_hang(root):
    os.mkfifo(root / "transformer" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.safetensors' \(a pipe\)"):
        require_own_weights(root, root / "transformer")


def test_a_file_whose_name_could_not_be_read_back_is_refused(root):
    (root / "a\x1b[2J").touch()
    with pytest.raises(CheckpointError, match=r"'a\\x1b\[2J' \(a name that is too long, or cannot"):
        find_files(root)
