"""Feedback against an independent, unblocked elimination, one channel after the other."""

import pytest
import torch
from correlated_inputs import correlated, stats_of
from torch import Tensor

from benchmarks.worlds.matrices import dit_like
from loraq.formats import FixedScales, get_format
from loraq.methods.feedback import Feedback, FewDirections


def eliminate(weight: Tensor, hessian: Tensor, damping: float, name: str) -> Tensor:
    """Optimal brain quantization in a fixed order, in double precision, without any blocking.

    After a channel is rounded, the others move along its row of H⁻¹, and the channel is eliminated
    from H⁻¹ (arXiv 2208.11580, equations 2 and 3).
    """
    scales = FixedScales(weight, get_format(name), "search")
    hessian = hessian.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse, left = torch.linalg.inv(hessian), weight.double()
    for j in hessian.diagonal().argsort(descending=True, stable=True).tolist():
        rounded = scales.round(left[:, j].float(), scales.of_values[:, j]).double()
        error = (left[:, j] - rounded) / inverse[j, j]
        left = left - error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # eliminated: its row and column are zero
        left[:, j] = rounded
    return left.float()


@pytest.mark.parametrize("width", [48, 96, 200], ids=["one block", "two blocks", "four blocks"])
@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4"])
def test_it_is_the_elimination_of_one_channel_after_the_other(name, width):
    weight, moment = dit_like(32, width), stats_of(correlated(2000, width)).second_moment
    ours = Feedback(moment, damping=0.01).round(weight, get_format(name)).dequantize()
    expected = eliminate(weight, moment, 0.01, name)
    # Sums in another order may flip a code that is near a tie, and later ones of its row after it.
    same = torch.isclose(ours, expected, rtol=1e-4, atol=1e-7).float().mean().item()
    assert same > 0.99
    price, least = (
        torch.einsum("oi,ij,oj->", weight - q, moment, weight - q).item() for q in (ours, expected)
    )
    assert price == pytest.approx(least, rel=0.01)


@pytest.mark.parametrize("width", [48, 200], ids=["one block", "four blocks"])
@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4", "int8"])
def test_few_directions_round_as_the_moment_that_they_make(name, width):
    weight, generator = dit_like(32, width), torch.Generator().manual_seed(1)
    directions = torch.randn((5, width), generator=generator)
    diagonal = torch.rand(width, generator=generator).double() + 0.5
    moment = diagonal.diag() + directions.double().mT @ directions.double()
    fmt = get_format(name)
    ours = FewDirections(diagonal, directions).round(weight, fmt).dequantize()
    expected = Feedback(moment, damping=0.0).round(weight, fmt).dequantize()
    assert torch.isclose(ours, expected, rtol=1e-4, atol=1e-7).float().mean().item() > 0.99
