"""Every exception of loraq, and the message for an unknown name."""

import inspect

import pytest

from loraq import errors
from loraq.errors import LoraqError, unknown

BUILT_IN_BASE = {
    "FormatError": ValueError,
    "SchemeError": ValueError,
    "RecipeError": ValueError,
    "LayerError": RuntimeError,
    "CalibrationError": ValueError,
    "CheckpointError": OSError,
    "KernelError": RuntimeError,
}


def test_the_list_of_errors_is_frozen():
    classes = {
        name
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, Exception)
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
