"""Greedy choice by marginal gain: never above the budget, and as good as trying everything where
that can be tried.
"""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraq.errors import SchemeError
from loraq.pipeline.allocation import Choice, allocate

Layers = list[list[Choice]]

sizes_and_losses = st.lists(st.tuples(st.integers(1, 12), st.floats(0, 9)), min_size=1, max_size=4)
some_layers = st.lists(sizes_and_losses, min_size=1, max_size=4).map(
    lambda layers: [[Choice(*pair, rank) for rank, pair in enumerate(layer)] for layer in layers]
)


def best(layers: Layers, nbytes: int) -> float:
    """The least total loss, by trying everything."""
    fitting = (c for c in product(*layers) if sum(choice.nbytes for choice in c) <= nbytes)
    return min(sum(choice.loss for choice in c) for c in fitting)


def smallest(layers: Layers) -> int:
    return sum(min(choice.nbytes for choice in layer) for layer in layers)


def loss_of(choices: list[Choice]) -> float:
    return sum(choice.loss for choice in choices)


@given(some_layers, st.integers(0, 30))
def test_the_budget_is_kept_and_each_layer_gets_one_of_its_own(layers, extra):
    nbytes = smallest(layers) + extra
    chosen = allocate(layers, nbytes)
    assert sum(choice.nbytes for choice in chosen) <= nbytes
    assert all(choice in layer for choice, layer in zip(chosen, layers, strict=True))


@given(some_layers, st.integers(0, 30))
def test_nothing_that_stores_as_much_is_better(layers, extra):
    chosen = allocate(layers, smallest(layers) + extra)
    stored = sum(choice.nbytes for choice in chosen)
    # A step that did not fit may have been followed by smaller ones.
    skipped = stored < smallest(layers) + extra
    if not skipped:
        largest = max(abs(a.loss - b.loss) for layer in layers for a in layer for b in layer)
        assert loss_of(chosen) <= best(layers, stored) + largest + 1e-9


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 16),
)
def test_it_is_the_best_where_steps_are_alike_and_gains_fall(gains, extra):
    """With convex losses and steps of one size, taking the largest
    gain next is optimal: brute force agrees.
    """
    layers = []
    for falling in (sorted(gain, reverse=True) for gain in gains):
        losses = [sum(falling[rank:]) for rank in range(len(falling) + 1)]
        layers.append([Choice(5 + 3 * rank, loss, rank) for rank, loss in enumerate(losses)])
    nbytes = smallest(layers) + extra
    assert loss_of(allocate(layers, nbytes)) == best(layers, nbytes)


def test_layers_that_are_alike_are_treated_alike():
    layer = [Choice(10 * rank, 2.0**-rank, rank) for rank in range(1, 9)]
    assert [choice.rank for choice in allocate([layer] * 3, 120)] == [4, 4, 4]
    assert [choice.rank for choice in allocate([layer] * 3, 130)] == [5, 4, 4]  # the first in order


def test_a_layer_that_loses_more_gets_more():
    layers = [
        [Choice(10 * rank, scale * 2.0**-rank, rank) for rank in range(1, 9)] for scale in (1, 16)
    ]
    assert [choice.rank for choice in allocate(layers, 80)] == [2, 6]


def test_choices_above_the_hull_are_not_taken():
    layer = [
        Choice(1, 9.0, 1),
        Choice(2, 8.9, 2),
        Choice(3, 1.0, 3),
        Choice(3, 2.0, 4),
        Choice(4, 1.0, 5),
    ]
    assert [allocate([layer], nbytes)[0].rank for nbytes in (1, 2, 3, 4, 9)] == [1, 1, 3, 3, 3]


def test_a_step_that_does_not_fit_leaves_its_bytes_to_others():
    large = [Choice(1, 100.0, 1), Choice(50, 0.0, 2)]
    small = [Choice(1, 1.0, 1), Choice(2, 0.5, 2)]
    assert [choice.rank for choice in allocate([large, small], 10)] == [1, 2]


def test_a_budget_that_is_too_small_says_what_is_needed():
    layers = [[Choice(10, 1.0, 1)], [Choice(30, 1.0, 1), Choice(20, 2.0, 2)]]
    with pytest.raises(
        SchemeError,
        match=r"29 bytes is too small for 2 layers, which take 30 bytes at least\. Raise",
    ):
        allocate(layers, 29)
    assert loss_of(allocate(layers, 30)) == 3
