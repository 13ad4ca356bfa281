"""Several ways to store each layer, one budget for all: one choice each, by marginal gain."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from loraq.errors import SchemeError


class Choice(NamedTuple):
    """One way to store a layer."""

    #: Bytes that it stores.
    nbytes: int
    #: What it costs in quality; the sum over the layers is made small.
    loss: float
    #: Rank of the branch.
    rank: int


def allocate(layers: Sequence[Sequence[Choice]], nbytes: int) -> list[Choice]:
    """Return one choice for each layer, together of at most `nbytes` and of little loss.

    From the smallest choices on, the step that lowers the loss most for each byte is taken next;
    only choices on the lower convex hull of a layer are looked at. While every step fits, what
    results is the best for the bytes it stores (Shoham and Gersho, IEEE Trans. ASSP 36(9), 1988). A
    step that does not fit ends its layer, and others go on: the loss is at most that step's above
    the best for the budget. Equal gains are taken in the order of the layers.

    Raises:
        SchemeError: the smallest choices together are more than the budget; the message says how
            much they are.
    """
    hulls = [_hull(choices) for choices in layers]
    chosen = [hull[0] for hull in hulls]
    left = nbytes - sum(choice.nbytes for choice in chosen)
    if left < 0:
        raise SchemeError(
            f"A budget of {nbytes} bytes is too small for {len(layers)} layers, which take "
            f"{nbytes - left} bytes at least. Raise the budget, or use a smaller main format."
        )
    steps = [(i, *step) for i, hull in enumerate(hulls) for step in pairwise(hull)]
    # Stable, and gains fall along a hull: no layer's steps change order.
    steps.sort(key=lambda step: -_gain(*step[1:]))
    full: set[int] = set()
    for i, smaller, larger in steps:
        if i in full or larger.nbytes - smaller.nbytes > left:
            full.add(i)
            continue
        chosen[i] = larger
        left -= larger.nbytes - smaller.nbytes
    return chosen


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices on the lower convex hull of loss over bytes, the smallest first."""
    hull: list[Choice] = []
    for choice in sorted(choices):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) < _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(smaller: Choice, larger: Choice) -> float:
    """Loss saved for each byte; the larger of two choices stores more and loses less."""
    return (smaller.loss - larger.loss) / (larger.nbytes - smaller.nbytes)
