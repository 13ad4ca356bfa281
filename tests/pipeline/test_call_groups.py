"""Groups of calls: few, of calls that are alike, and nothing of any call is lost."""

import pytest
import torch

from loraq.pipeline.call_groups import CallGroups
from loraq.stats import N_CALL_GROUPS


def groups_of(calls: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    groups = CallGroups()
    for squares, count in zip(calls, tokens, strict=True):
        groups.add(squares * count, count)
    return groups.mean_squares()


def test_few_calls_stay_as_they_are():
    calls = torch.rand(5, 8, dtype=torch.float64)
    found = groups_of(calls, [3, 1, 4, 1, 5])
    torch.testing.assert_close(found[:5], calls)
    assert torch.equal(found[5:], found[:1].expand(N_CALL_GROUPS - 5, 8))


def test_calls_of_one_profile_are_one_group_whatever_their_size():
    """Twenty timesteps, thirty times: more calls than groups, and sixteen kinds of them."""
    generator = torch.Generator().manual_seed(0)
    profiles = torch.eye(N_CALL_GROUPS, dtype=torch.float64) + 0.01
    order = torch.randperm(30 * N_CALL_GROUPS, generator=generator) % N_CALL_GROUPS
    sizes = torch.rand(len(order), 1, generator=generator, dtype=torch.float64) + 0.5
    found = groups_of(profiles[order] * sizes, [7] * len(order))
    shares = found / found.sum(1, keepdim=True)
    expected = profiles / profiles.sum(1, keepdim=True)
    matched = (shares[:, None] - expected).abs().sum(2)
    assert (matched.min(0).values < 1e-9).all()
    assert (matched.min(1).values < 1e-9).all()


def test_one_call_unlike_a_thousand_others_is_kept():
    generator = torch.Generator().manual_seed(1)
    calls = 1 + 0.1 * torch.rand(1000, 32, generator=generator, dtype=torch.float64)
    calls[500, 3] = 100
    found = groups_of(calls, [2] * 1000)
    assert found.max() == 100


def test_squares_and_tokens_are_all_there():
    generator = torch.Generator().manual_seed(2)
    calls = torch.rand(100, 6, generator=generator, dtype=torch.float64)
    groups = CallGroups()
    for i, squares in enumerate(calls):
        groups.add(squares, i + 1)
    assert sum(groups._tokens) == 5050
    torch.testing.assert_close(torch.stack(groups._squares).sum(0), calls.sum(0))


@pytest.mark.parametrize("size", [0.0, 1e-200, 1e200])
def test_any_size_is_grouped(size):
    found = groups_of(torch.full((40, 4), size, dtype=torch.float64), [1] * 40)
    torch.testing.assert_close(found, torch.full_like(found, size), rtol=1e-12, atol=0)
