"""The protocol of published tables: which prompts, in which order, with which seeds."""

import json
import random

import pytest

from loraq.errors import LoraqError
from loraq.evaluation.prompts import Prompt, read_named_prompts

#: Keys that are not in the order of the alphabet, as in MJHQ-30K, whose keys are hashes.
KEYS = ["q7", "b2", "z9", "a1", "m4", "k5", "c3", "x8", "d0", "p6"]


def table(tmp_path):
    file = tmp_path / "meta_data.json"
    file.write_text(
        json.dumps({key: {"category": "art", "prompt": f"picture {key}"} for key in KEYS})
    )
    return file


def test_the_subset_is_a_shuffle_of_the_keys_in_the_order_of_the_file(tmp_path):
    shuffled = list(KEYS)
    random.Random(0).shuffle(shuffled)
    expected = sorted(shuffled[:4])
    found = read_named_prompts(table(tmp_path), 4)
    assert [prompt.name for prompt in found] == expected == ["b2", "d0", "k5", "x8"]
    assert [prompt.text for prompt in found] == [f"picture {key}" for key in expected]
    of_sorted = sorted(KEYS)
    random.Random(0).shuffle(of_sorted)
    assert sorted(of_sorted[:4]) != expected  # the keys must not be sorted before the shuffle


def test_without_a_count_all_are_taken_in_the_order_of_the_file(tmp_path):
    assert [prompt.name for prompt in read_named_prompts(table(tmp_path))] == KEYS


def test_the_seed_is_the_hash_of_the_name():
    assert Prompt("", "x").seed == 0
    assert Prompt("ab", "x").seed == 31 * 97 + 98
    by_hand = 0
    for character in "0a5ee5e7a6b0e6a1":
        by_hand = (31 * by_hand + ord(character)) % 1_000_000_007
    assert Prompt("0a5ee5e7a6b0e6a1", "whatever").seed == by_hand > 31 * 127


def test_sdci_and_text_files_are_read_too(tmp_path):
    (tmp_path / "sDCI.yaml").write_text(
        "sa_2: a red fox\nsa_1: 'a tower, seen: from below'\n7: x\n"
    )
    found = read_named_prompts(tmp_path / "sDCI.yaml")
    assert [(prompt.name, prompt.text) for prompt in found] == [
        ("sa_2", "a red fox"),
        ("sa_1", "a tower, seen: from below"),
        ("7", "x"),
    ]
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    found = read_named_prompts(tmp_path / "p.txt")
    assert [(prompt.name, prompt.text) for prompt in found] == [("00000", "one"), ("00001", "two")]


def test_a_table_of_the_size_of_mjhq_with_its_many_commas_is_read(tmp_path):
    file = tmp_path / "meta_data.json"
    file.write_text(
        json.dumps({f"{i:032x}": {"prompt": "octane, 8k, " * 10} for i in range(30_000)})
    )
    assert len(read_named_prompts(file, 5000)) == 5000


def test_the_name_of_a_file_is_plain_and_tells_prompts_apart():
    names = {Prompt(name, text).file_name for name in ("a/../b", "a b", "ä" * 300) for text in "xy"}
    assert len(names) == 6
    assert all(len(name) < 120 and "/" not in name and name.isascii() for name in names)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", '["a"]', "holds a list. Prompts by name are required"),
        ("p.json", "{", "is not JSON"),
        ("p.json", '{"a": {"text": "b"}, "c": 3}', "has no text for a, c"),
        ("p.yaml", "a: [", "is not YAML"),
        ("p.yaml", "a: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("p.txt", "\n", "holds 0 prompts, and 1 are required"),
        ("p.txt", "a\nb\n", "holds 2 prompts, and 3 are required"),
        ("p.txt", b"\xff\xfe", "Cannot read the prompts"),
    ],
)
def test_what_is_no_file_of_prompts_is_named(tmp_path, name, content, message):
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(LoraqError, match=message):
        read_named_prompts(tmp_path / name, 3 if raw == b"a\nb\n" else None)
