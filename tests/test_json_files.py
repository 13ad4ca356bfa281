"""JSON of strangers: what is not plain and of sane size is refused at once, with its reason."""

import json

import pytest

from loraq.errors import CheckpointError
from loraq.json_files import parse_json, read_json, require_plain
from tests.patience import at_once


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("NaN", "has the number nan"),
        ('{"a": [-Infinity]}', "has the number -inf"),
        ("1e999", "has the number inf"),
        ('{"data_offsets": [-0, 4]}', "has the integer -0"),
        (str(2**64), "a number of 65 bits"),
        (str(-(2**63) - 1), "a number of 64 bits"),
        ("9" * 5000, "5000 digits"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        ('[{"b": {"a": 1, "a": 1}}]', "has the key 'a' twice"),
        (r'"\ud800"', "not valid Unicode"),
        (r'{"\udfff": 1}', "not valid Unicode"),
        (nested(33), "nested in more than 32 levels"),
        (nested(100_000), "nested in more than 32 levels"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested in more than 32 levels"),
        ("[" + "{}," * 600_000 + "1]", "has 1200001 items"),
        ("[" + "1," * 600_000 + "1]", "has 600001 items"),
        (b"\xff\xfe{\x00}\x00", "codec can't decode"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_refused(text, match):
    with at_once(), pytest.raises(ValueError, match=match):
        parse_json(text)


@pytest.mark.parametrize(
    "content",
    [
        {"a": [1, 2.5, None, True, "größe\n", {"b": []}]},
        [2**64 - 1, -(2**63), 1e308],
        json.loads(nested(32)),
        [0] * 400_000,
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_read_is_what_json_says(content):
    assert parse_json(json.dumps(content)) == content


def test_tuples_are_looked_into_too():
    with pytest.raises(ValueError, match="nan"):
        require_plain({"a": (1, (float("nan"),))})


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"text"'])
def test_a_file_without_an_object(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"a\.json' holds a .*A JSON object is required"):
        read_json(tmp_path / "a.json")


def test_a_file_that_is_too_long_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        CheckpointError, match=r"Cannot read '.*a\.json': it has more than 64000000"
    ):
        read_json(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match=r"'.*b\.json' is missing"):
        read_json(tmp_path / "b.json")
