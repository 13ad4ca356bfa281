"""Layers in groups whose counts fit in memory together: a model is run once for each group."""

from collections.abc import Mapping

from loraq.errors import CalibrationError


def counting_bytes(width: int, *, second_moment: bool) -> int:
    """Return the bytes that a layer of `width` inputs takes while it is counted: sums in fp64."""
    return 8 * width * width if second_moment else 8 * width


def passes_within(
    widths: Mapping[str, int], memory_bytes: int | None, *, second_moment: bool = True
) -> list[list[str]]:
    """Return the names of layers in as few groups as first-fit finds, the widest first.

    A group takes the sums of its layers, and beside them the finished moment of one layer in fp32.

    Args:
        widths: size of each layer's input axis.
        memory_bytes: what a group may take; `None` puts all in one.
        second_moment: whether all of E[x xᵀ] is counted, or only E[x²].

    Raises:
        CalibrationError: a layer alone takes more.
    """
    if memory_bytes is None:
        return [list(widths)]
    groups: list[list[str]] = []
    left: list[int] = []
    for name, width in sorted(widths.items(), key=lambda item: -item[1]):
        needed = counting_bytes(width, second_moment=second_moment)
        scratch = 4 * width * width if second_moment else 0
        if needed + scratch > memory_bytes:
            raise CalibrationError(
                f"Counting layer '{name}' with its {width} inputs takes "
                f"{(needed + scratch) / 1e9:.3g} GB, and {memory_bytes / 1e9:.3g} GB are allowed. "
                f"Allow as much (`--memory`, `memory_bytes`), or "
                "collect mean squares only (`--mean-squares`, `second_moment=False`)."
            )
        place = next((i for i, room in enumerate(left) if needed <= room), len(groups))
        if place == len(groups):
            groups.append([])
            left.append(memory_bytes - scratch)
        groups[place].append(name)
        left[place] -= needed
    return groups
