"""Results on stdout: plain tables, one JSON document, sizes."""

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from loraq.errors import show
from loraq.figures import size_of as size_of

if TYPE_CHECKING:
    from loraq.scheme import Scheme


def print_json(document: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(document: Any) -> Any:
    """JSON has no infinity (the PSNR of equal images) and no NaN: they become null."""
    if isinstance(document, dict):
        return {key: _finite(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_finite(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def print_table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print plain columns, numbers to the right.

    No cell is cut, so that the output can be searched and copied. Names come from strangers, so
    cells are shown as error messages show them.
    """
    table = [tuple(headings), *(tuple(map(show, row)) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    numeric = [all(_is_number(row[i]) for row in table[1:]) for i in range(len(table[0]))]
    for row in table:
        cells = (
            c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)
        )
        click.echo("  ".join(cells).rstrip())


def _is_number(cell: str) -> bool:
    return (
        not cell
        or cell.removesuffix("iB")
        .removesuffix(" K")
        .removesuffix(" M")
        .removesuffix(" G")
        .replace(".", "")
        .isdigit()
    )


def size_document(parameters: int, nbytes: int) -> dict[str, Any]:
    """Return the size of a whole model as `--json` shows it."""
    return {
        "parameters": parameters,
        "model_nbytes": nbytes,
        "effective_bits": 8 * nbytes / max(1, parameters),
    }


def show_size(parameters: int, nbytes: int) -> None:
    """Print the size of a whole model: of all tensors that are stored, headers not counted."""
    bits = 8 * nbytes / max(1, parameters)
    click.echo(
        f"The whole model: {parameters:,} parameters, {size_of(nbytes)}, {bits:.3f} effective bits "
        "per parameter."
    )


def activation_of(scheme: "Scheme") -> str:
    """Return the format of a layer's input, and the rotation before it as recipe names write it."""
    shown = scheme.activation + (" s" if scheme.smoothing else "")
    return shown + (f" h{scheme.rotation}" if scheme.rotation else "")
