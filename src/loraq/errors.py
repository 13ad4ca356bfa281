"""Every exception that loraq raises on purpose.

A message says what is wrong with the values, what is required, and what to do next. It is one line
that a terminal can show, whatever the names and values are that strangers put into it.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable
from difflib import get_close_matches

#: Longest message, in UTF-8.
MOST_BYTES = 4096
#: Unicode's categories of what moves the cursor, hides text, turns its direction or is no text:
#: controls, format characters, surrogates, and separators of lines and paragraphs.
_NOT_SHOWN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
#: Where a message goes on after another one that it quotes, which had a full stop of its own.
_TWO_STOPS = re.compile(r"(?<=\w)\.\. ")


def show(text: object) -> str:
    """Return text as a terminal may see it: what is not shown, or has an effect, is escaped.

    Control characters and escape sequences, changes of direction and lone surrogates become what
    Python writes for them. Everything else stays, so that text that was shown once is not changed
    by being shown again.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        repr(char)[1:-1] if unicodedata.category(char) in _NOT_SHOWN else char for char in text
    )


def list_some(names: Collection[object], most: int = 20) -> str:
    """Return names for a message: the first ones, each cut to a sane length, and how many more."""
    first = [_cut(show(name), 200) for name, _ in zip(names, range(most), strict=False)]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def _cut(text: str, most: int) -> str:
    """Leave out the middle of a text that is longer than `most` bytes in UTF-8."""
    raw = text.encode(errors="backslashreplace")
    if len(raw) <= most:
        return text
    mark = " […] "
    side = (most - len(mark.encode())) // 2
    head, tail = raw[:side].decode(errors="ignore"), raw[-side:].decode(errors="ignore")
    return head + mark + tail


class LoraqError(Exception):
    """Base of all errors raised by loraq."""

    def __init__(self, message: object = "") -> None:
        """Keep the message as a terminal may show it, and cut it in the middle if it is endless."""
        # First the cheap cut, because a message may carry a file's worth of names.
        text = _cut(str(message), 4 * MOST_BYTES)
        super().__init__(_cut(show(_TWO_STOPS.sub(". ", text)), MOST_BYTES))


class MissingLibraryError(LoraqError, ImportError):
    """A library that is no dependency of loraq itself is needed, and not installed."""


class FormatError(LoraqError, ValueError):
    """A number format is unknown or does not fit the tensor."""


class SchemeError(LoraqError, ValueError):
    """Formats and rank contradict each other or the layer."""


class RecipeError(LoraqError, ValueError):
    """A recipe file or recipe name cannot be understood."""


class LayerError(LoraqError, RuntimeError):
    """A layer failed; the message carries its name."""


class CalibrationError(LoraqError, ValueError):
    """Activation statistics are missing, do not fit, are not valid, or cannot be collected."""


class CheckpointError(LoraqError, OSError):
    """A file is missing, truncated, foreign or contradicts its manifest."""


class DeviceError(LoraqError, ValueError):
    """A device is unknown, is not here, or cannot solve layers."""


class KernelError(LoraqError, RuntimeError):
    """No back end can run this layer on this device."""


class ExportError(LoraqError, ValueError):
    """A target of `export` cannot hold a model, or not as it was asked to."""


class RankError(LoraqError, RuntimeError):
    """The processes that share a run cannot meet, or were not started as they must be."""


class LoraqWarning(UserWarning):
    """Something was put right, or is not as it was asked for."""


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Message for a name that is not in a list: the closest match first, then all of them."""
    names, asked = sorted(known), _cut(show(name), 200)
    close = get_close_matches(asked, names, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"Unknown {kind} '{asked}'.{hint} Known: {', '.join(names)}."


def layer_failure(name: str, error: Exception) -> LayerError:
    """Return the error that says which layer failed, and why."""
    reason = str(error) if isinstance(error, LoraqError) else f"{type(error).__name__}: {error}"
    return LayerError(f"Layer '{name}' failed: {reason}")
