"""JSON files: written the same way everywhere, and read with an error that names the file.

What is read is plain data that the rest of the package can handle without care: of bounded size and
depth, in text that can be printed and written back, with numbers of 64 bits.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from loraq.disk import write_file
from loraq.errors import CheckpointError
from loraq.regular_file import read_regular

#: The longest JSON file that is read. The manifest of a model of 500 layers has 0.5 MB, the index
#: of one of 100 000 tensors 10 MB.
_MOST_BYTES = 64_000_000
#: The most lists, objects and items in them; a header of 50 000 tensors has 450 000. Python
#: takes up to 150 bytes and 1 µs for each.
_MOST_ITEMS = 500_000
#: Levels of nesting. Configurations have four.
_MOST_LEVELS = 32


def write_json(path: Path, content: Any) -> bytes:
    """Write JSON in the order of the content, and return what was written."""
    raw = encode_json(content)
    write_file(path, raw)
    return raw


def encode_json(content: Any) -> bytes:
    """Return JSON in the order of the content, with two spaces and a newline at the end.

    Raises:
        CheckpointError: it has a number that is not finite, which JSON has no word for.
    """
    try:
        return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise CheckpointError(
            f"Cannot write JSON: {error}. Only finite numbers can be read back."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: the file is missing, is not a JSON object, or is absurd, as `parse_json`
            says.
    """
    try:
        content = parse_json(read_regular(path, _MOST_BYTES))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path}' is missing.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read '{path}': {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"'{path}' holds a {type(content).__name__}. A JSON object is required."
        )
    return content


def parse_json(text: bytes | str) -> Any:
    """Return what JSON text says.

    Raises:
        ValueError: it is not JSON, has a key twice in one object, or is not plain, as
            `require_plain` says.
    """
    raw = text.encode("utf-8") if isinstance(text, str) else text
    if (items := sum(raw.count(mark) for mark in (b"[", b"{", b","))) > _MOST_ITEMS:
        raise ValueError(f"it has {items} items, and at most {_MOST_ITEMS} are read")
    # Other readers take -0 for a float. The look costs nothing; reading every integer here would.
    parse_int = _refuse_minus_zero if b"-0" in raw else None
    try:
        content = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_refuse_duplicates, parse_int=parse_int
        )
    except RecursionError:
        raise ValueError(f"it is nested in more than {_MOST_LEVELS} levels") from None
    require_plain(content)
    return content


def require_plain(content: Any) -> None:
    """Require that data of JSON or TOML has a sane depth, numbers of 64 bits, and valid text.

    Raises:
        ValueError: it has not; the message says what it has.
    """
    level, depth = [content], 0
    while level:
        if (depth := depth + 1) > _MOST_LEVELS:
            raise ValueError(f"it is nested in more than {_MOST_LEVELS} levels")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, str):
                if not value.isascii():
                    _require_text(value)
            elif isinstance(value, dict):
                inner += value
                inner += value.values()
            elif isinstance(value, list | tuple):
                inner += value
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"it has the number {value}, and only finite numbers are read")
            elif isinstance(value, int) and not -(2**63) <= value < 2**64:
                raise ValueError(f"it has a number of {value.bit_length()} bits; 64 are read")
        level = inner


def _require_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"it has the text {text[:100]!r}, which is not valid Unicode") from None


def _refuse_minus_zero(digits: str) -> int:
    if digits == "-0":
        raise ValueError("it has the integer -0, and numbers are read in their shortest form")
    return int(digits)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has the key '{twice}' twice in one object")
    return found
