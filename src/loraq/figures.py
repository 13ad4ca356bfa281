"""Numbers for people."""

import math


def size_of(nbytes: int) -> str:
    """Return a size for people, in KiB, MiB or GiB."""
    size = nbytes / 1024
    for unit in ("KiB", "MiB"):
        if size < 1000:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def number(value: float | None) -> str:
    """Return an error for people, whatever a file says it is; a dash for none."""
    if value is None:
        return "–"
    return f"{value:.4f}" if math.isfinite(value) and abs(value) < 1000 else f"{value:.3g}"
