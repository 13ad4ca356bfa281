"""Inputs with a stated property, and their statistics, for the tests of methods that use them."""

import torch

from benchmarks.worlds.matrices import gaussian
from loraq.evaluation.contender import simulate
from loraq.nn import QuantizedLinear
from loraq.packed import LayerSolution
from loraq.stats import ActivationStats


def correlated(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Inputs with a decaying spectrum, a mean that is not zero, and channels of different power,
    as in transformers.
    """
    mixing = gaussian(width, width, seed + 1) * torch.arange(1, width + 1)[:, None] ** -0.7
    x = gaussian(tokens, width, seed) @ mixing + gaussian(1, width, seed + 2)
    return x * torch.exp(0.7 * gaussian(1, width, seed + 3))


def stats_of(x: torch.Tensor, *, full: bool = True) -> ActivationStats:
    wide = x.double()
    moment = wide.mT @ wide / len(x) if full else wide.square().mean(0)
    return ActivationStats(len(x), moment.float())


def output_error(x: torch.Tensor, weight: torch.Tensor, solution: LayerSolution) -> float:
    """‖x (W − Ŵ)ᵀ‖ / ‖x Wᵀ‖ in double precision, from the public result alone."""
    exact = x.double() @ weight.double().mT
    error = x.double() @ (weight.double() - solution.reconstruct().double()).mT
    return (error.norm() / exact.norm()).item()


def run_error(weight: torch.Tensor, solution: LayerSolution, x: torch.Tensor) -> float:
    """The same of the layer as it runs, with activations rounded."""
    exact = x @ weight.mT
    layer = QuantizedLinear.from_packed(solution.packed)
    simulate(layer)
    return ((layer(x) - exact).norm() / exact.norm()).item()
