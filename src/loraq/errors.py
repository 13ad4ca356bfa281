"""Every exception that loraq raises on purpose.

A message says what is wrong with the values, what is required, and what to do next.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class LoraqError(Exception):
    """Base of all errors raised by loraq."""


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


class KernelError(LoraqError, RuntimeError):
    """No back end can run this layer on this device."""


class LoraqWarning(UserWarning):
    """Something was put right, or is not as it was asked for."""


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Message for a name that is not in a list: the closest match first, then all of them."""
    names = sorted(known)
    close = get_close_matches(str(name), names, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"Unknown {kind} '{name}'.{hint} Known: {', '.join(names)}."


def layer_failure(name: str, error: Exception) -> LayerError:
    """Return the error that says which layer failed, and why."""
    reason = str(error) if isinstance(error, LoraqError) else f"{type(error).__name__}: {error}"
    return LayerError(f"Layer '{name}' failed: {reason}")
