"""Durable before visible, visible before the old one goes: the order of the system calls."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import loraq
from loraq import disk
from loraq.checkpoint.partial import partial_path
from loraq.stats import ActivationStats
from tests.syscalls import Call, record


@pytest.fixture
def source(tmp_path) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 64))
    save_file(net.state_dict(), tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def quantize(source: Path, target: Path, **options) -> None:
    loraq.quantize_checkpoint(source, target, "mxfp4-a16", progress=False, **options)


def stop_after_one(done: int, *_) -> None:
    if done == 1:
        raise KeyboardInterrupt


def run_fresh(source: Path, target: Path) -> None:
    quantize(source, target)


def run_overwriting(source: Path, target: Path) -> None:
    quantize(source, target, overwrite=True, restart=True)


def run_resumed(source: Path, target: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        loraq.quantize_checkpoint(source, target, "mxfp4-a16", progress=stop_after_one)
    quantize(source, target)


def run_save(source: Path, target: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    loraq.quantize_(model, "mxfp4-a16", progress=False)
    loraq.save(model, target, shard_bytes=500, overwrite=True)


def run_statistics(source: Path, target: Path) -> None:
    stats = {"a": ActivationStats(7, torch.eye(8))}
    loraq.save_stats(stats, target.with_suffix(".safetensors"))


class Order:
    """What is not durable yet, after some calls."""

    def __init__(self, target: Path) -> None:
        self.target, self.partial = target, partial_path(target)
        self.files: set[Path] = set()
        self.folders: set[Path] = set()
        self.visible = self.visible_is_durable = False

    def take(self, call: Call) -> None:
        if call.name == "fsync":
            self.files.discard(call.path)
            self.folders.discard(call.path)
            if call.path == self.target.parent and self.visible:
                self.visible_is_durable = True
        elif call.name in ("write", "pwrite", "ftruncate", "posix_fallocate", "sendfile"):
            if call.path.name == "journal.jsonl" and call.name == "write":
                assert not self.files - {call.path}, "a line before what it tells is on the disk"
            self.files.add(call.path)
        elif call.to is not None and call.to == self.target:
            left = {
                path for path in self.files | self.folders if call.path in (path, *path.parents)
            }
            assert not left, f"visible before it is durable: {left}"
            self.visible = True
        elif call.name in ("open", "mkdir", "link", "rename", "exchange", "replace"):
            self.folders.add(call.path.parent)
            if call.name == "open":
                self.files.add(call.path)
        elif call.name in ("unlink", "rmdir", "remove"):
            self.files.discard(call.path)
            self.folders.discard(call.path)
            if self.visible:
                assert self.visible_is_durable, f"{call.path} goes before the new one is durable"


RUNS = {
    "fresh": run_fresh,
    "over an old one": run_overwriting,
    "resumed": run_resumed,
    "save": run_save,
    "save over an old one": run_save,
    "statistics": run_statistics,
    "statistics over old ones": run_statistics,
}


@pytest.mark.parametrize("exchange", [True, False], ids=["at once", "in two steps"])
@pytest.mark.parametrize("run", RUNS)
def test_durable_before_visible_and_visible_before_the_old_one_goes(
    source, tmp_path, monkeypatch, run, exchange
):
    if not exchange:
        monkeypatch.setattr(disk, "exchange", lambda *_: False)
    target = tmp_path / "deep" / "out"
    if "old" in run:
        RUNS[run](source, target)
    with record(tmp_path) as recording:
        RUNS[run](source, target)
    if "statistics" in run:
        target = target.with_suffix(".safetensors")
    order = Order(target)
    for call in recording.calls:
        order.take(call)
    assert order.visible
    assert order.visible_is_durable
    names = [call.name for call in recording.calls]
    assert names.count("fsync") > 3
    assert ("exchange" in names) == (exchange and "old" in run and "statistics" not in run)
    assert sorted(path.name for path in target.parent.iterdir() if path.name.startswith(".")) == []


def test_the_order_that_is_asked_for_can_be_missed(tmp_path):
    """The judge above is not blind."""
    target = tmp_path / "out"
    new = partial_path(target) / "files"
    late = [Call("open", new / "a"), Call("write", new / "a"), Call("rename", new, target)]
    early = [Call("rename", new, target), Call("unlink", partial_path(target) / "replaced" / "a")]
    told = [Call("open", new / "a"), Call("write", partial_path(target) / "journal.jsonl")]
    for calls, match in (
        (late, "visible before it is durable"),
        (early, "goes before the new one is durable"),
        (told, "a line before what it tells"),
    ):
        order = Order(target)
        with pytest.raises(AssertionError, match=match):
            _take_all(order.take, calls)


def _take_all(take: Callable[[Call], None], calls: list[Call]) -> None:
    for call in calls:
        take(call)


def test_a_file_that_is_written_past_the_disk_module_is_seen(tmp_path):
    with pytest.raises(AssertionError, match=r"not by loraq\.disk"), record(tmp_path):
        (tmp_path / "file").write_text(json.dumps({}))
