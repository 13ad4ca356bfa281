"""How precisely activations run: the same stored bytes serve 16, 8 and 4 bits."""

from dataclasses import replace

from loraq.errors import KernelError, unknown
from loraq.formats import CastFormat
from loraq.scheme import Scheme

#: What can be asked of a layer: what its scheme says, or activations of so many bits.
PRECISIONS = ("stored", "a16", "a8", "a4")

#: Formats of activations that some device multiplies, by their bits.
_NATIVE = {8: ("int8", "mxfp8_e4m3", "fp8_e4m3"), 4: ("mxfp4",)}


def require_precision(precision: str) -> None:
    """Raise `KernelError` for a precision that is none of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise KernelError(unknown("precision of activations", precision, PRECISIONS))


def schemes_at(stored: Scheme, precision: str) -> tuple[Scheme, ...]:
    """Return the schemes that run stored bytes with activations of a precision, the best first.

    Of 8 and 4 bits these are the formats that a recipe's name means beside the main weight, and
    then those that some device multiplies. The branch keeps its activations; beside 8-bit ones that
    a device multiplies it has those as well.

    Args:
        stored: what the bytes are.
        precision: one of `PRECISIONS`.

    Raises:
        KernelError: there is no such precision, or no format of it.
    """
    require_precision(precision)
    if precision == "stored" or isinstance(stored.weight_format, CastFormat):
        return (stored,)  # a main weight of 16 bits is that of a layer which was kept in floats
    if precision == "a16":  # rotated as the bytes are
        return (replace(stored.weight_only(), rotation=stored.rotation),)
    bits = int(precision[1:])
    schemes = [stored] if stored.activation_format.bits == bits else []
    named = stored.weight_format.activations.get(bits)
    schemes += [replace(stored, activation=name) for name in (named, *_NATIVE[bits]) if name]
    if stored.branch is not None and bits == 8:
        schemes += [
            replace(
                stored,
                activation=name,
                branch=replace(stored.branch, activation=name, intermediate=None),
            )
            for name in _NATIVE[bits]
        ]
    return tuple(dict.fromkeys(schemes))
