"""What a quantized layer takes: what `nn.Linear` takes in one dtype or another."""

import torch
from torch import Tensor

from loraq.errors import KernelError

#: Dtypes of the input.
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_input(x: Tensor, axis: int, width: int) -> None:
    """Raise `KernelError` for an input that no linear layer of this width takes.

    Args:
        x: the input.
        axis: where its channels are, counted from the end.
        width: input channels of the layer.
    """
    if x.dtype not in INPUT_DTYPES:
        raise KernelError(
            f"The input of a quantized layer is of {x.dtype}. It takes floats: "
            f"{', '.join(str(dtype) for dtype in INPUT_DTYPES)}. Cast the input."
        )
    if x.dim() < -axis or x.shape[axis] != width:
        raise KernelError(
            f"The input of a quantized layer has shape {tuple(x.shape)}. Axis {axis} must have "
            f"the layer's {width} input channels."
        )
