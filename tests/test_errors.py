"""Every exception of loraq, and the message for an unknown name."""

import inspect
import pickle

import pytest

from loraq import errors
from loraq.errors import LoraqError, list_some, show, unknown
from tests.patience import at_once

BUILT_IN_BASE = {
    "FormatError": ValueError,
    "SchemeError": ValueError,
    "RecipeError": ValueError,
    "LayerError": RuntimeError,
    "RankError": RuntimeError,
    "DeviceError": ValueError,
    "CalibrationError": ValueError,
    "CheckpointError": OSError,
    "ExportError": ValueError,
    "KernelError": RuntimeError,
    "MissingLibraryError": ImportError,
}


def test_a_quoted_sentence_ends_once():
    assert (
        str(LoraqError("Cannot read: it is cut.. Copy it.")) == "Cannot read: it is cut. Copy it."
    )
    for text in ("from '..' to it", "make PYTHON=... now"):
        assert str(LoraqError(text)) == text


def test_the_list_of_errors_is_frozen():
    classes = {
        name
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, Exception) and not issubclass(cls, Warning)
    }
    assert classes == {"LoraqError", *BUILT_IN_BASE}


@pytest.mark.parametrize(("name", "base"), BUILT_IN_BASE.items())
def test_an_error_is_caught_as_ours_and_as_its_built_in_kind(name, base):
    cls = getattr(errors, name)
    assert issubclass(cls, LoraqError)
    assert issubclass(cls, base)
    assert cls.__doc__
    with pytest.raises(LoraqError, match=r"^the message alone$"):
        raise cls("the message alone")


def test_an_unknown_name_is_answered_with_the_closest_one_and_all():
    message = unknown("method", "lorak", ["rtn", "loraq", "lqer"])
    assert message == "Unknown method 'lorak'. Did you mean 'loraq'? Known: loraq, lqer, rtn."


def test_an_unknown_name_that_is_like_none_gets_only_the_list():
    assert unknown("back end", "zzz", iter(["resident", "reference"])) == (
        "Unknown back end 'zzz'. Known: reference, resident."
    )


@pytest.mark.parametrize("name", [None, 3, ("a", "b")])
def test_an_unknown_name_may_be_anything(name):
    assert unknown("effort", name, ["fast"]) == f"Unknown effort '{name}'. Known: fast."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größe [red] \\n", "größe [red] \\n"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\nError: b\r\t\0\x7f\x9b", r"a\nError: b\r\t\x00\x7f\x9b"),
        ("\u202egnp.exe\u2066\u200f", r"\u202egnp.exe\u2066\u200f"),
        ("\u2028\u2029\u00ad", r"\u2028\u2029\xad"),
        ("\ud800 \udcff", r"\ud800 \udcff"),
        (3, "3"),
    ],
)
def test_what_has_an_effect_on_a_terminal_is_shown_escaped(text, shown):
    assert show(text) == shown
    assert show(shown) == shown
    assert str(LoraqError(text)) == shown


@pytest.mark.parametrize("text", ["a" * 10**7, "é" * 10**6, "\x1b" * 10**6, "\ud800é" * 10**5])
def test_a_message_is_at_most_4_kb_and_keeps_both_ends(text):
    error = errors.CheckpointError(f"begin {text} end")
    message = str(error)
    assert len(message.encode()) <= 4096
    assert message.startswith("begin ")
    assert message.endswith(" end")
    assert " […] " in message
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.CheckpointError
    assert str(again) == message


def test_a_list_of_names_says_how_many_more():
    assert list_some([]) == ""
    assert list_some(["a", "b"]) == "a, b"
    assert list_some([str(i) for i in range(10_000)], most=2) == "0, 1 and 9998 more"
    assert len(list_some(["x" * 10**6] * 10_000)) < 4096
    assert list_some({"a\nb": 1}) == r"a\nb"


def test_an_unknown_name_of_a_megabyte_takes_no_time():
    with at_once():
        assert len(unknown("method", "x" * 10**6, ["rtn"])) < 300
