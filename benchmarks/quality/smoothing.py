"""SVDQuant's smoothing of the input channels, as a rival may use it.

SVDQuant, arXiv 2411.05007, equation 4: channel j of the input is divided by s_j and the weight's
column is multiplied by it, s_j = size(x_j)^α / size(w_j)^(1 − α). Sizes are root mean squares, of
the inputs by statistics. "grid" takes the α of each layer that leaves least output error on tokens
of the samples after one-shot SVDQuant, its activations rounded. The division is free where a layer
norm comes before, and is not counted as bytes. Beside 4-bit activations LoRaQ does not smooth a
layer that would be worse by it in any call (`loraq.methods.smoothing`); nor does a way that ends
with `GATED`.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from loraq.evaluation.contender import simulate
from loraq.layers import linear_layers, quantized_layers
from loraq.methods import RTN, SVDQuant
from loraq.methods.smoothing import relieves_calls
from loraq.nn import QuantizedLinear
from loraq.scheme import Scheme
from loraq.stats import ActivationStats

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
GATED = ", no call worse"


def smooth(
    model: nn.Module,
    way: str,
    schemes: Mapping[str, Scheme],
    stats: Mapping[str, ActivationStats],
    tokens: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, ActivationStats]]:
    """Multiply the weights of a float model, and return factors and statistics of each layer.

    Args:
        model: changed in place.
        way: an α, and `GATED` after it or not, or "grid".
        schemes: of the layers, by name.
        stats: of their inputs.
        tokens: some of their inputs, for "grid".
    """
    layers, factors, smoothed = linear_layers(model), {}, {}
    for name, scheme in schemes.items():
        weight, of_layer = layers[name].weight.detach(), stats[name]
        if way == "grid":
            alpha = min(GRID, key=lambda a: _error(weight, of_layer, scheme, tokens[name], a))
        else:
            alpha = float(way.removesuffix(GATED))
        factor = factors_of(weight, of_layer, alpha)
        if way.endswith(GATED) and not relieves_calls(weight, scheme, of_layer, factor.double()):
            factor = torch.ones_like(factor)
        layers[name].weight.data = weight * factor
        moment = of_layer.second_moment / (factor * factor[:, None])
        factors[name] = factor
        smoothed[name] = replace(of_layer, second_moment=moment, call_mean_squares=None)
    return factors, smoothed


def factors_of(weight: Tensor, stats: ActivationStats, alpha: float) -> Tensor:
    """Return s of every input channel, of geometric mean 1."""
    sizes = stats.mean_square.sqrt(), weight.square().mean(0).sqrt()
    inputs, columns = (size.clamp(min=1e-5 * size.mean().item()) for size in sizes)
    logs = alpha * inputs.log() - (1 - alpha) * columns.log()
    return (logs - logs.mean()).exp()


def divide_inputs(model: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Make the quantized layers see divided inputs."""
    for name, layer in quantized_layers(model).items():
        divisor = factors[name]
        layer.register_forward_pre_hook(lambda _, inputs, by=divisor: (inputs[0] / by,))


def _error(
    weight: Tensor, stats: ActivationStats, scheme: Scheme, tokens: Tensor, alpha: float
) -> float:
    factor = factors_of(weight, stats, alpha)
    method = RTN() if scheme.branch is None else SVDQuant()
    solution = method.solve(weight * factor, scheme)
    layer = QuantizedLinear.from_packed(solution.packed)
    simulate(layer)
    with torch.no_grad():
        return (layer(tokens / factor) - tokens @ weight.mT).norm().item()
