"""Options and their values: the type and the range that an annotation states, checked before work.

`Annotated[int, Range(1, 10)]` is an integer from 1 to 10. A float without a range is finite, and an
integer has at most 64 bits. The fields of a dataclass are checked by `check_fields`, the arguments
of a function by the decorator `checked`.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, wraps
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from loraq.errors import LoraqError

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes, both ends included; infinity only if it is an end."""

    least: float = -math.inf
    most: float = math.inf

    def holds(self, value: float) -> bool:
        """Return whether a number is in the range; NaN is in none."""
        return self.least <= value <= self.most

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"of at least {self.least:g}"
        return f"from {self.least:g} to {self.most:g}"


#: How many threads or processes may be asked for.
Workers = Annotated[int, Range(1, 4096)]
#: Of a branch.
Rank = Annotated[int, Range(1, 10**9)]
#: Of everything random.
Seed = Annotated[int, Range(0, 2**63 - 1)]
#: Bytes, at least one.
Size = Annotated[int, Range(1)]

_INT64 = Range(-(2**63), 2**63 - 1)


_WORDS = {
    bool: "True or False",
    str: "a string",
    dict: "a table",
    list: "an array",
    NoneType: "None",
    None: "None",
}


def suits(value: object, hint: Any, limits: Range | None = None) -> bool:
    """Return whether a value is of the type and in the range of an annotation.

    To Python a bool is an int; to whoever sets an option it is not. An array of TOML or JSON is a
    tuple. What is no plain data is judged by its class alone.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = next((extra for extra in args[1:] if isinstance(extra, Range)), None)
        return suits(value, args[0], limits)
    if origin in (Union, UnionType):
        return any(suits(value, arg, limits) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if hint is int:
        return _is_int64(value) and (not limits or limits.holds(value))
    if hint is float:
        if not (isinstance(value, float) or _is_int64(value)):
            return False
        return limits.holds(value) if limits else math.isfinite(value)
    if origin in (tuple, list, Sequence):
        return _suits_sequence(value, origin, args)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if origin is Callable:
        return callable(value)
    kind = NoneType if hint is None else origin or hint
    return not isinstance(kind, type) or isinstance(value, kind)


def _is_int64(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and _INT64.holds(value)


def _suits_sequence(value: object, origin: Any, args: tuple[Any, ...]) -> bool:
    if not isinstance(value, list | tuple):
        return False
    if origin is tuple and args[-1:] != (...,):
        return len(value) == len(args) and all(map(suits, value, args))
    return all(suits(item, args[0]) for item in value)


def describe(hint: Any, limits: Range | None = None) -> str:
    """Return what an annotation requires, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe(args[0], next((a for a in args[1:] if isinstance(a, Range)), None))
    if origin in (Union, UnionType):
        return " or ".join(describe(arg, limits) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if hint is int:
        return "an integer" + (f" {limits}" if limits else " of at most 64 bits")
    if hint is float:
        return f"a number {limits}" if limits else "a finite number"
    if origin is None and hint in _WORDS:
        return _WORDS[hint]
    return str(hint if origin else getattr(hint, "__name__", hint))


@lru_cache(maxsize=256)
def _hints(thing: Hashable) -> dict[str, Any]:
    return get_type_hints(thing, include_extras=True)


def check_fields(
    instance: Any, error: type[LoraqError], of_what: str, *, skip: tuple[str, ...] = ()
) -> None:
    """Require that every field of a dataclass instance suits its annotation.

    Args:
        instance: any dataclass.
        error: what is raised.
        of_what: what the instance is called in the message.
        skip: fields that are checked elsewhere.

    Raises:
        LoraqError: of the given class; the message names field, value and what is required.
    """
    kind: object = type(instance)
    hints = _hints(kind)
    for each in fields(instance):
        value, hint = getattr(instance, each.name), hints[each.name]
        if each.name not in skip and not suits(value, hint):
            raise error(
                f"Option '{each.name}' of {of_what} is {_show(value)}. It must be {describe(hint)}."
            )


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function refuse keyword arguments that do not suit their annotations, before all else.

    `LoraqError` is raised then; the message names argument, value and what is required.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        hints = _hints(function)
        for name, value in kwargs.items():
            if name in hints and not suits(value, hints[name]):
                raise LoraqError(
                    f"'{name}' of `{function.__name__}` is {_show(value)}. It must be "
                    f"{describe(hints[name])}."
                )
        return function(*args, **kwargs)

    return call


def _show(value: object, most: int = 60) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else "…"
    return text if len(text) <= most else text[:most] + "…"
