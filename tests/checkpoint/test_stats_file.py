"""Statistics on the disk: a round trip, and files that are something else."""

import errno
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.worlds.matrices import gaussian
from loraq.checkpoint.partial import partial_path
from loraq.checkpoint.stats_file import load_stats, require_room, save_stats, stats_file
from loraq.errors import CalibrationError, CheckpointError
from loraq.safetensors.reader import ShardReader
from loraq.stats import ActivationStats, StatsShapes


def full(width: int, seed: int = 0) -> ActivationStats:
    x = gaussian(40, width, seed)
    return ActivationStats(40, x.mT @ x / 40)


def diagonal(width: int) -> ActivationStats:
    x = gaussian(30, width)
    return ActivationStats(30, x.square().mean(0))


@pytest.fixture
def path(tmp_path):
    place = tmp_path / "deep" / "stats.safetensors"
    save_stats(
        {"blocks.0.up": full(8), "blocks.0.down": diagonal(6), "out": full(4, seed=1)}, place
    )
    return place


def test_what_is_saved_is_loaded(path):
    stats = load_stats(path)
    assert set(stats) == {"blocks.0.up", "blocks.0.down", "out"}
    assert len(stats) == 3
    assert stats["blocks.0.up"].sha256 == full(8).sha256
    assert stats["blocks.0.down"].sha256 == diagonal(6).sha256
    assert stats["out"].tokens == 40
    assert "blocks.1.up" not in stats
    with pytest.raises(KeyError):
        stats["blocks.1.up"]


def test_what_only_some_layers_have_is_saved_with_them(tmp_path):
    place = tmp_path / "stats.safetensors"
    weighed = replace(full(8), output_sensitivity=torch.tensor([0.5, 0.0, 1.5]))
    calls = torch.arange(16.0).reshape(2, 8)
    told_apart = replace(full(8), call_mean_squares=calls)
    save_stats({"weighed": weighed, "told apart": told_apart, "plain": diagonal(6)}, place)
    stats = load_stats(place)
    assert list(stats) == ["weighed", "told apart", "plain"]
    assert stats["weighed"].sha256 == weighed.sha256
    assert stats["weighed"].output_sensitivity.tolist() == [0.5, 0.0, 1.5]
    assert stats["told apart"].sha256 == told_apart.sha256 != full(8).sha256
    assert torch.equal(stats["told apart"].call_mean_squares, calls)
    assert stats["plain"].shapes == ((6,), None, None)
    shapes = {name: found.shapes for name, found in stats.items()}
    assert require_room(place, shapes, overwrite=True) == place.stat().st_size


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("other.output_sensitivity", torch.ones(3), "has other tensors than"),
        ("a.output_sensitivity", torch.ones(3).double(), "other dtypes than fp32"),
        ("a.output_sensitivity", -torch.ones(3), "layer 'a': .*output sensitivities"),
        ("other.call_mean_squares", torch.ones(2, 4), "has other tensors than"),
        ("a.call_mean_squares", torch.ones(2, 4).double(), "other dtypes than fp32"),
        ("a.call_mean_squares", torch.ones(2, 3), "layer 'a': .*each of 4 channels"),
        ("a.call_mean_squares", -torch.ones(2, 4), "layer 'a': .*each of 4 channels"),
    ],
)
def test_parts_that_are_something_else_are_refused(tmp_path, name, part, message):
    place = tmp_path / "s.safetensors"
    tensors = {"a.second_moment": torch.eye(4), "a.tokens": torch.tensor([7]), name: part}
    save_file(tensors, place, metadata={"loraq_stats": "1"})
    with pytest.raises(CalibrationError, match=message):
        load_stats(place)["a"]


def test_asking_whether_a_layer_is_there_reads_nothing(path, monkeypatch):
    stats = load_stats(path)
    monkeypatch.setattr(ShardReader, "read", lambda *_: pytest.fail("a tensor was read"))
    assert "out" in stats
    assert "in" not in stats


def test_the_file_is_plain_safetensors_with_documented_keys(path):
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "loraq_stats": "1"}
        assert set(file.keys()) == {
            f"{layer}.{part}"
            for layer in ("blocks.0.up", "blocks.0.down", "out")
            for part in ("second_moment", "tokens")
        }
        assert torch.equal(file.get_tensor("out.second_moment"), full(4, seed=1).second_moment)


def test_equal_statistics_give_equal_bytes(path, tmp_path):
    save_stats(dict(load_stats(path)), tmp_path / "again.safetensors")
    again = load_stats(tmp_path / "again.safetensors")
    assert {name: again[name].sha256 for name in again} == {
        name: s.sha256 for name, s in load_stats(path).items()
    }
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_file_of_statistics_can_be_sent_to_another_process(path):
    sent = pickle.loads(pickle.dumps(load_stats(path)))
    assert sent["out"].sha256 == load_stats(path)["out"].sha256


def test_a_name_that_could_not_be_read_again_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"ends with '\.safetensors'"):
        save_stats({"a": full(4)}, tmp_path / "stats.bin")


def test_nothing_cannot_be_saved(tmp_path):
    with pytest.raises(CalibrationError, match="no statistics to save"):
        save_stats({}, tmp_path / "s.safetensors")


def test_layers_may_be_written_in_any_order(path, tmp_path):
    stats = load_stats(path)
    shapes = {name: stats[name].shapes for name in ("blocks.0.up", "blocks.0.down", "out")}
    other = tmp_path / "other.safetensors"
    with stats_file(other, shapes) as write:
        for name in reversed(shapes):
            assert not other.exists()
            write(name, stats[name])
    assert other.read_bytes() == path.read_bytes()


def test_the_space_that_a_killed_run_left_is_used_again(path, monkeypatch):
    left = partial_path(path)
    (left / "files").mkdir(parents=True)
    left.chmod(0o700)
    (left / "files" / path.name).write_bytes(b"\xff" * 10**5)
    usage = shutil.disk_usage(path.parent)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: usage)
    stats, before = dict(load_stats(path)), path.read_bytes()
    save_stats({name: stats[name] for name in ("blocks.0.up", "blocks.0.down", "out")}, path)
    assert path.read_bytes() == before
    assert not left.exists()


def test_two_runs_cannot_make_the_same_file(path):
    before = path.read_bytes()
    with stats_file(path, {"a": StatsShapes((4, 4))}) as write:
        with pytest.raises(CheckpointError, match="is being written by another run"):
            save_stats({"b": full(8)}, path)
        write("a", full(4))
    assert list(load_stats(path)) == ["a"]
    assert path.read_bytes() != before


def test_a_layer_that_was_not_announced_is_refused_and_nothing_is_left(tmp_path):
    with (
        pytest.raises(CheckpointError, match="the room for it is"),
        stats_file(tmp_path / "s.safetensors", {"a": StatsShapes((4, 4))}) as write,
    ):
        write("a", full(8))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_known_before_the_work(tmp_path, monkeypatch):
    def full_disk(_file: int, _start: int, _size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    with (
        pytest.raises(CheckpointError, match=r"Cannot write '.*': the disk is full"),
        stats_file(tmp_path / "s.safetensors", {"a": StatsShapes((4, 4))}),
    ):
        pytest.fail("the work must not begin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [lambda path: save_file({"a": torch.ones(3)}, path), Path.touch])
def test_a_file_that_is_not_of_statistics_is_not_replaced(tmp_path, write):
    write(tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="it is not a file of statistics"):
        save_stats({"a": full(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="it is not a file of statistics"):
        require_room(tmp_path / "model.safetensors", {"a": StatsShapes((4, 4))}, overwrite=True)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_room_that_is_needed_is_the_size_of_the_file(path, tmp_path):
    shapes = {name: stats.shapes for name, stats in load_stats(path).items()}
    assert require_room(path, shapes, overwrite=True) == path.stat().st_size
    assert require_room(tmp_path / "new" / "s.safetensors", shapes, overwrite=False) > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deep/stats.safetensors", "the file exists"),
        ("deep/stats", r"ends with '\.safetensors'"),
        ("folder.safetensors", "a folder of this name exists"),
        ("file/stats.safetensors", "is a file"),
    ],
)
def test_what_is_in_the_way_of_a_file_is_named(path, tmp_path, name, message):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=message):
        require_room(tmp_path / name, {"a": StatsShapes((4, 4))}, overwrite=False)


def test_a_disk_that_is_too_small_is_named(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"GB free and the statistics take 4e\+09 GB.*--mean-squares"
    ):
        require_room(
            tmp_path / "s.safetensors", {"a": StatsShapes((10**9, 10**9))}, overwrite=False
        )


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no file of statistics '.*none"):
        load_stats(tmp_path / "none.safetensors")


def test_a_truncated_file_is_refused(path):
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        load_stats(path)


def test_other_safetensors_files_are_refused(tmp_path):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CalibrationError, match="is not a file of statistics; version 1 is required"
    ):
        load_stats(tmp_path / "model.safetensors")


def test_a_newer_format_is_refused(tmp_path):
    save_file(
        {"a.second_moment": torch.ones(2)},
        tmp_path / "s.safetensors",
        metadata={"loraq_stats": "2"},
    )
    with pytest.raises(CalibrationError, match="format version 2; version 1 is required"):
        load_stats(tmp_path / "s.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.tokens": None}, "has other tensors than"),
        ({"b.second_moment": torch.ones(2)}, "has other tensors than"),
        ({"a.tokens": torch.tensor([0])}, "layer 'a': Statistics of 0 tokens"),
        ({"a.tokens": torch.tensor([1.0])}, "layer 'a' has other dtypes"),
        ({"a.second_moment": torch.ones(2).half()}, "layer 'a' has other dtypes"),
        (
            {"a.second_moment": torch.ones(3, 2)},
            "layer 'a': Statistics have a second moment of shape",
        ),
        ({"a.second_moment": torch.tensor([1.0, torch.nan])}, "layer 'a': .*not finite numbers"),
    ],
)
def test_a_planted_defect_is_found(tmp_path, change, message):
    tensors = {"a.second_moment": torch.ones(2), "a.tokens": torch.tensor([1])} | change
    place = tmp_path / "s.safetensors"
    save_file(
        {name: t for name, t in tensors.items() if t is not None},
        place,
        metadata={"loraq_stats": "1"},
    )
    with pytest.raises(CalibrationError, match=message):
        load_stats(place)["a"]
