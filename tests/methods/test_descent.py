"""One step of the annealing, against dense algebra; and what the rotation in rank space is for."""

import math

import pytest
import torch

from benchmarks.worlds.matrices import dit_like, gaussian
from loraq.formats import get_format
from loraq.linalg import truncated_svd
from loraq.methods.descent import Factors, Problem, move, spread
from loraq.methods.noise import ActivationNoise


@pytest.mark.parametrize("weighs_channels", [False, True])
def test_a_step_moves_the_product_along_the_tangent_space(weighs_channels):
    weight, step = dit_like(40, 56), 0.3
    importance = torch.rand(56, generator=torch.Generator().manual_seed(1)) + 0.5
    importance = importance if weighs_channels else None
    problem = Problem(
        weight, get_format("int4"), get_format("mxint8"), ActivationNoise(), importance
    )
    factors = Factors(gaussian(40, 6, seed=1), gaussian(6, 56, seed=2))
    iterate = problem.evaluate(factors, rounded=False)
    gradient = iterate.gradient(0.0).clone()
    up, down, g = (t.double() for t in (*factors, gradient))
    metric = torch.eye(56).double() if importance is None else torch.diag(importance.double())
    p_up = up @ torch.linalg.inv(up.mT @ up) @ up.mT
    p_down = metric @ down.mT @ torch.linalg.inv(down @ metric @ down.mT) @ down
    expected = p_up @ g + g @ p_down - p_up @ g @ p_down

    new = move(iterate, gradient, step, math.inf)
    d_up, d_down = new.up.double() - up, new.down.double() - down
    first_order = (d_up @ down + up @ d_down) / step
    assert (first_order - expected).norm() < 1e-4 * expected.norm()
    # Both factors take half of the overlap, so neither move has more of it than the other.
    shares = [p_up @ d_up @ down, up @ d_down @ p_down]
    halves = [(part / step - p_up @ g @ p_down / 2).norm() for part in shares]
    assert max(halves) < 1e-4 * expected.norm()


def test_rows_and_columns_of_high_leverage_move_less():
    weight, cap, step = dit_like(40, 56), 1.0, 3.0
    factors = Factors(gaussian(40, 6, seed=1), gaussian(6, 56, seed=2))
    factors.down[:, 7] *= 100  # nearly all of one direction of the branch
    problem = Problem(weight, get_format("int4"), get_format("mxint8"), ActivationNoise(), None)
    moves = []
    for limit in (math.inf, cap):
        iterate = problem.evaluate(factors, rounded=False)
        new = move(iterate, iterate.gradient(0.0), step, limit)
        moves.append((new.down - factors.down).norm(dim=0))
    free, capped = moves
    assert capped[7] < 0.5 * free[7]


@pytest.mark.parametrize("name", ["int8", "mxint8", "mxfp4"])
def test_the_rotation_keeps_the_product_and_lowers_the_noise_of_the_intermediate(name):
    svd = truncated_svd(dit_like(192, 256), 32, seed=0)
    plain = Factors.of(*svd.to_canonical())  # singular values all in D: its first rows stand out
    spreaded = spread(plain, seed=3)
    torch.testing.assert_close(
        spreaded.up @ spreaded.down, plain.up @ plain.down, atol=1e-5, rtol=0
    )
    fmt, x = get_format(name).for_rows(), gaussian(64, 256)

    def noise(factors: Factors) -> float:
        inner = x @ factors.down.mT
        return ((fmt.round(inner) - inner) @ factors.up.mT).norm().item()

    assert noise(spreaded) < 0.9 * noise(plain)
    assert not torch.equal(spread(plain, seed=4).up, spreaded.up)
