"""optimum-quanto: `quantize` and `freeze`, qint4 (asymmetric; its own choice of group)."""

from contract import Quantized, Variant, linear, nbytes_of, run
from optimum.quanto import freeze, qint4, quantize
from torch import Tensor, nn


def with_quanto(weight: Tensor, rank: int) -> Quantized:
    """Quantize the weight of a layer."""
    model = nn.Sequential(linear(weight))
    quantize(model, weights=qint4)
    freeze(model)
    stored = [tensor for name, tensor in model.state_dict().items() if ".weight." in name]
    return Quantized(model[0].weight.dequantize().float(), nbytes_of(stored))


run(Variant("qint4", with_quanto))
