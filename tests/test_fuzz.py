"""A few hundred mutated files for each reader; `make fuzz` runs tens of thousands."""

from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraq.checkpoint import model
from loraq.errors import CheckpointError
from loraq.safetensors.reader import ShardReader
from tests.fuzz.readers import READERS, FolderWeights, OneFile, relist
from tests.fuzz.runs import Tally, run


@pytest.fixture(autouse=True)
def slow_shapes(monkeypatch):
    """Shapes are checked in the tests, which takes its time: `make fuzz` is what holds seconds."""
    monkeypatch.setattr("tests.fuzz.runs.MOST_SECONDS", 10.0)


def require_clean(tally: Tally, inputs: int) -> None:
    assert not tally.failures, tally.failures[0]
    assert tally.inputs == inputs == tally.accepted + tally.refused
    assert 0 < tally.refused


@pytest.mark.parametrize("reader", READERS)
def test_mutated_files_are_refused_in_one_line_or_read_right(reader):
    require_clean(run(reader, 0, range(20)), 20)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_many_mutated_files_are_refused_in_one_line_or_read_right(reader):
    require_clean(run(reader, 1, range(150)), 150)


# --- the judge itself: each kind of fault is seen -------------------------------------------------


def test_an_exception_of_another_kind_is_a_failure(monkeypatch):
    monkeypatch.setattr(ShardReader, "read", lambda *_: {}["x"])
    monkeypatch.setattr(OneFile, "mutate", lambda *_: None)
    monkeypatch.setattr("tests.fuzz.runs._require_valid", lambda *_: None)
    tally = run("one-file", 0, range(2))
    assert [index for index, _ in tally.failures] == [0, 1]
    assert "KeyError: 'x'" in tally.failures[0][1]


@pytest.mark.parametrize(
    ("message", "failure"),
    [("x" * 5000, "a message of 5000"), ("a\x1b[2J", "a message with"), ("", "a message of 0")],
)
def test_a_message_that_is_long_empty_or_not_plain_is_a_failure(monkeypatch, message, failure):
    def refuse(*_):
        error = CheckpointError()
        error.args = (message,)
        raise error

    monkeypatch.setattr("tests.fuzz.runs._require_valid", lambda *_: None)
    monkeypatch.setattr(OneFile, "read", refuse)
    assert failure in run("one-file", 0, range(1)).failures[0][1]


def test_numbers_that_were_read_wrong_are_a_failure(monkeypatch):
    read = ShardReader.read
    monkeypatch.setattr(OneFile, "mutate", lambda *_: None)
    monkeypatch.setattr("tests.fuzz.runs._require_valid", lambda *_: None)
    monkeypatch.setattr(ShardReader, "read", lambda *args: torch.zeros_like(read(*args)))
    assert "the safetensors library reads" in run("one-file", 0, range(1)).failures[0][1]


def test_scales_that_are_not_checked_are_a_failure(monkeypatch):
    def break_scales(reader: FolderWeights, random: Random, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["a.weight_scale"].fill_(255)
        save_file(tensors, folder / "model.safetensors")
        relist(folder)

    monkeypatch.setattr(FolderWeights, "mutate", break_scales)
    assert not run("weights", 0, range(1)).failures
    monkeypatch.setattr(model, "require_numbers", lambda *_: None)
    ((_, failure),) = run("weights", 0, range(1)).failures
    assert "'a' has weights that are no numbers" in failure
