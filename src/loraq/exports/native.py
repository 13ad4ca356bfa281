"""Names of other programs: which tensors of diffusers a tensor of theirs is put together from."""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from torch import Tensor

from loraq.errors import ExportError, list_some


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor of diffusers: all of them, or a half."""

    name: str
    #: 0 or 1 for a half, `None` for all.
    half: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return these rows of the tensor."""
        return tensor if self.half is None else tensor.chunk(2)[self.half]


#: The rows that each tensor is put together from, from top to bottom, by its native name.
NativeNames = dict[str, tuple[Rows, ...]]


def list_classes() -> list[str]:
    """Return the classes whose native names are known."""
    return list(_tables())


def find_native_names(model_class: str, names: Iterable[str]) -> NativeNames:
    """Return the native tensors of a model.

    Args:
        model_class: class of the model in diffusers, one of `list_classes`.
        names: of all its tensors there, in their order, which the result keeps.

    Raises:
        ExportError: a tensor has no native name, or a part of a native tensor is not there.
    """
    lines, same = _lines(model_class)
    found: dict[str, dict[int, Rows]] = {}
    numbers: dict[str, int] = {}
    unknown = []
    for name in names:
        hits = [(line, match) for line in lines if (match := line.pattern.fullmatch(name))]
        if not hits and not same:
            unknown.append(name)
        if not hits:
            found[name], numbers[name] = {0: Rows(name)}, 1
            continue
        longest = max(len(line.diffusers) for line, _ in hits)
        for line, match in hits:
            if len(line.diffusers) == longest:
                *indices, rest = match.groups()
                native = line.native.format(*indices) + rest
                found.setdefault(native, {})[line.position] = Rows(name, line.half)
                numbers[native] = line.n_parts
    if unknown:
        raise ExportError(
            f"The native names of {len(unknown)} tensors of {model_class} are not known: "
            f"{list_some(unknown)}. Use `--to sdnq`, which keeps the names of diffusers."
        )
    for native, parts in found.items():
        if len(parts) != numbers[native]:
            raise ExportError(
                f"The native tensor '{native}' is put together from {numbers[native]} tensors of "
                f"{model_class}, and {len(parts)} are there: "
                f"{list_some([rows.name for rows in parts.values()])}."
            )
    return {native: tuple(parts[i] for i in sorted(parts)) for native, parts in found.items()}


@dataclass(frozen=True)
class _Line:
    """One part of one line of the table."""

    native: str
    diffusers: str
    half: int | None
    #: Of the part in its native tensor, and how many that has.
    position: int
    n_parts: int
    #: Matches a tensor of diffusers: its numbers, and what follows the name.
    pattern: re.Pattern[str]


@cache
def _tables() -> dict[str, dict[str, Any]]:
    text = files("loraq").joinpath("data/comfy.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def _lines(model_class: str) -> tuple[tuple[_Line, ...], bool]:
    """Return the lines of a class, and whether all other names are the same."""
    lines = []
    for native, parts in _tables()[model_class].items():
        if native == "same":
            continue
        listed = [parts] if isinstance(parts, str) else parts
        for i, part in enumerate(listed):
            name, slash, half = part.partition("/")
            pattern = re.escape(name).replace(r"\{\}", r"(\d+)") + r"((?:\..+)?)"
            which = int(half) if slash else None
            lines.append(_Line(native, name, which, i, len(listed), re.compile(pattern)))
    return tuple(lines), bool(_tables()[model_class].get("same", False))
