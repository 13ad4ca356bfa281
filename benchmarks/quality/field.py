"""Who meets whom: every method on every branch precision and rotation, generated as a product.

A table says which main weights it has, with which activations, branches and rotations. Each of
these recipes is then given to every method, LoRaQ being one of them. So a rival has, by
construction, every precision of the branch, every rotation of the input, the same bytes, the same
statistics and the same scale search that a LoRaQ row has. What LoRaQ does inside, rivals are given
as options: alternation, rotation in rank space, and with statistics rounding with error feedback
through the filter of activation noise, and turns in which branch and main weight answer each other.
SVDQuant also gets its own smoothing, whose factors are not counted as bytes; those of a LoRaQ row
with "-s" are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from benchmarks.quality.smoothing import GATED
from benchmarks.worlds.world import OWN_SENSITIVITY
from loraq.evaluation.contender import Contender
from loraq.methods import LoRaQ
from loraq.methods.refit import FEWEST_BITS
from loraq.recipe_names import parse_scheme
from loraq.scheme import Scheme

DIRECT = {"scale_rule": None}
#: Alternations of SVDQuant that are tried.
ROUNDS = (1, 20, 100)
#: Exponents of SVDQuant's smoothing; "grid" searches each layer's on tokens of the samples.
SMOOTHINGS = ("0.3", "0.5", "grid")
#: That of LoRaQ beside 4-bit activations, where statistics tell calls apart.
OWN_SMOOTHING = f"0.5{GATED}"


@dataclass(frozen=True)
class Entrant(Contender):
    """A contender of a comparison."""

    #: Of SVDQuant: one of `SMOOTHINGS` or `OWN_SMOOTHING`, or empty for none.
    smoothing: str = ""
    #: Whether it is a method as its authors published it, which is always measured.
    as_published: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells rows of a table apart."""
        return self.label, self.recipe, self.budget or ""


class Main(NamedTuple):
    """A main weight and what is put beside it."""

    #: Main format and activations, as recipes name them.
    recipe: str
    #: Of 16, 8, 6 and 4 bits.
    branches: tuple[str, ...]
    #: Sides of the rotation of the input.
    rotations: tuple[int, ...] = (0,)
    #: Instead of the world's.
    budget: str | None = None
    #: Branches that fill the budget: no byte is left for the smoothing factor of a channel.
    full: tuple[str, ...] = ()


def entrants(mains: tuple[Main, ...], *, statistics: str) -> tuple[Entrant, ...]:
    """Return every row of a table, with statistics from a source, or without any for ``""``."""
    rows: list[Entrant] = []
    for main in mains:
        for side in main.rotations:
            plain = f"{main.recipe}-h{side}"
            rows += _without_branch(plain, bool(statistics))
            for branch in main.branches:
                recipe = f"{main.recipe}+{branch}-h{side}"
                with_branch = [
                    *(_sampled(recipe, statistics) if statistics else _unsampled(recipe))
                ]
                if statistics and branch not in main.full:
                    with_branch.append(Entrant("LoRaQ", recipe.replace("-h", "-s-h")))
                rows += [replace(row, budget=main.budget) for row in with_branch]
    known = {row.key: replace(row, statistics=statistics) for row in rows}
    return tuple(known.values())  # a main weight with two budgets is without a branch only once


def _without_branch(recipe: str, statistics: bool) -> Iterator[Entrant]:
    if not statistics:
        yield Entrant("round to nearest", recipe, "rtn")
        return
    yield Entrant("GPTQ", recipe, "gptq", as_published=recipe.endswith("-h0"))
    if is_rounded(recipe):
        yield Entrant("GPTQ, noise filter", recipe, "gptq", {"noise_filter": True})


def _unsampled(recipe: str) -> Iterator[Entrant]:
    """Rows with a branch, from weights alone."""
    spread = {"rotate": True} if is_quantized(recipe) else {}
    if recipe.endswith("+bf16-h0"):
        yield Entrant("SVDQuant as published", recipe, "svdquant", DIRECT, as_published=True)
    yield Entrant("LQER", recipe, "lqer", spread)
    for rounds in ROUNDS:
        label = f"SVDQuant ×{rounds} + search"
        yield Entrant(label, recipe, "svdquant", {"rounds": rounds, **spread})
    yield Entrant("LoRaQ", recipe)


def _sampled(recipe: str, statistics: str) -> Iterator[Entrant]:
    """Rows with a branch, with statistics of the model's own samples."""
    smoothings: tuple[str, ...] = SMOOTHINGS
    if asks_calls(parse_scheme(recipe), statistics):
        smoothings = (*SMOOTHINGS, OWN_SMOOTHING)
    spread = {"rotate": True} if is_quantized(recipe) else {}
    helped = spread | ({"noise_filter": True} if is_rounded(recipe) else {})
    if recipe.endswith("+bf16-h0"):
        yield Entrant("SVDQuant + GPTQ as published", recipe, "gptq", as_published=True)
    yield Entrant("QERA", recipe, "qera", spread)
    for rounds in ROUNDS:
        options = {"rounds": rounds, **helped}
        yield Entrant(f"SVDQuant ×{rounds} + GPTQ", recipe, "gptq", options)
        for smoothing in smoothings:
            label = f"SVDQuant ×{rounds} + GPTQ, smoothing {smoothing}"
            yield Entrant(label, recipe, "gptq", options, smoothing=smoothing)
    if is_refitted(recipe):
        for rounds in ROUNDS:
            options = {"rounds": rounds, "refits": LoRaQ.refits, **helped}
            for smoothing in ("", *smoothings):
                label = f"SVDQuant ×{rounds} + GPTQ, refitted"
                label += f", smoothing {smoothing}" if smoothing else ""
                yield Entrant(label, recipe, "gptq", options, smoothing=smoothing)
    yield Entrant("LoRaQ", recipe)


def asks_calls(scheme: Scheme, statistics: str) -> bool:
    """Whether LoRaQ smooths a layer only if no call is worse by it.

    It does beside 4-bit activations, where statistics tell calls apart.
    """
    return statistics not in ("", OWN_SENSITIVITY) and scheme.activation_format.bits <= 4


def is_refitted(recipe: str) -> bool:
    """Whether a recipe's branch has the bits that a refit wants."""
    branch = parse_scheme(recipe).branch
    return branch is not None and branch.weight_format.bits >= FEWEST_BITS


def is_quantized(recipe: str) -> bool:
    """Whether a recipe's branch has fewer than 16 bits."""
    branch = parse_scheme(recipe).branch
    return branch is not None and branch.weight_format.bits < 16


def is_rounded(recipe: str) -> bool:
    """Whether a recipe's activations have fewer than 16 bits."""
    return parse_scheme(recipe).activation_format.bits < 16
