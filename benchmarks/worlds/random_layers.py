"""Quantized layers of random bytes: a layer's speed does not depend on how it was solved."""

import torch
from torch import Tensor, nn

from loraq.formats import Format, QTensor
from loraq.layers import linear_layers, replace_layer
from loraq.nn import QuantizedLinear
from loraq.packed import LowRankBranch, PackedWeight
from loraq.scheme import Scheme
from loraq.transforms import ONE, STEPS


def random_layer(shape: tuple[int, int], scheme: Scheme, device: torch.device) -> QuantizedLinear:
    """Return a layer (out, in) with a bias; main weight and factors are gaussian."""

    def stored(fmt: Format, rows: int, columns: int, size: float) -> QTensor:
        random = torch.Generator().manual_seed(rows * 31 + columns)
        return fmt.quantize(size * torch.randn(rows, columns, generator=random))

    n_out, n_in = shape
    branch = None
    if scheme.branch is not None:
        fmt, rank = scheme.branch.weight_format, scheme.branch.rank
        branch = LowRankBranch(
            proj_up=stored(fmt, n_out, rank, 0.1), proj_down=stored(fmt, rank, n_in, 0.02)
        )
    main = stored(scheme.weight_format, n_out, n_in, n_in**-0.5)
    codes = None
    if scheme.smoothing:  # factors from ¼ to 4
        codes = (ONE + torch.arange(n_in) % (4 * STEPS) - 2 * STEPS).to(torch.uint8)
    packed = PackedWeight(scheme, main, branch, codes).to(device)
    return QuantizedLinear.from_packed(packed, bias_of(n_out, device))


def bias_of(n_out: int, device: torch.device) -> Tensor:
    """Return a bias in bf16."""
    return torch.linspace(-1, 1, n_out, dtype=torch.bfloat16, device=device)


def quantize_randomly(model: nn.Module, scheme: Scheme, backend: str) -> None:
    """Put a random quantized layer in place of every linear layer that the scheme fits."""
    for name, layer in linear_layers(model).items():
        if scheme.branch is None or scheme.branch.rank <= min(
            layer.out_features, layer.in_features
        ):
            new = random_layer((layer.out_features, layer.in_features), scheme, layer.weight.device)
            new.backend = backend
            replace_layer(model, name, new)
