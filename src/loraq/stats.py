"""What a linear layer's inputs look like: `ActivationStats`, all that a data-aware method knows of the data."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loraq.errors import CalibrationError
from loraq.transforms import block_side, rotate


@dataclass(frozen=True, eq=False)
class ActivationStats:
    """Second moments and maxima of the inputs x of one linear layer, over tokens.

    The moments are not centred: a mean that is not zero is part of what the layer multiplies.
    """

    #: Number of inputs that were counted.
    tokens: int
    #: E[x xᵀ], (in, in), or only its diagonal E[x²], (in); fp32.
    second_moment: Tensor
    #: Largest |x| of each channel, (in); fp32.
    max_abs: Tensor

    def __post_init__(self) -> None:
        shape, width = tuple(self.second_moment.shape), self.max_abs.numel()
        if self.tokens < 1:
            raise CalibrationError(f"Statistics of {self.tokens} tokens say nothing. At least 1 token is required.")
        if self.max_abs.dim() != 1 or shape not in ((width,), (width, width)):
            raise CalibrationError(
                f"Statistics have a second moment of shape {shape} and maxima of shape {tuple(self.max_abs.shape)}. "
                "Shapes (in, in) or (in), and (in), are required. Collect them again."
            )
        if not (self.second_moment.isfinite().all() and self.max_abs.isfinite().all()):
            raise CalibrationError("Statistics hold values that are no finite numbers. Collect them again.")
        if (self.mean_square < 0).any() or (self.max_abs < 0).any():
            raise CalibrationError("Statistics hold a negative mean square or maximum. Collect them again.")

    @property
    def width(self) -> int:
        """Size of the input axis."""
        return self.max_abs.numel()

    @property
    def is_full(self) -> bool:
        """Whether all second moments are known, not only the mean squares."""
        return self.second_moment.dim() == 2

    @property
    def mean_square(self) -> Tensor:
        """E[x²] of each channel, (in)."""
        return self.second_moment.diagonal() if self.is_full else self.second_moment

    @property
    def sha256(self) -> str:
        """Hash of everything in it."""
        digest = hashlib.sha256(f"{self.tokens}/{tuple(self.second_moment.shape)}/".encode())
        for tensor in (self.second_moment, self.max_abs):
            digest.update(memoryview(tensor.detach().cpu().float().contiguous().view(torch.uint8).numpy().data))
        return digest.hexdigest()

    def to(self, device: torch.device) -> "ActivationStats":
        """Return the same statistics on a device, in fp32 whatever they were computed in."""
        moment, largest = (tensor.to(device, torch.float32) for tensor in (self.second_moment, self.max_abs))
        return ActivationStats(self.tokens, moment, largest)

    def rotated(self, side: int) -> "ActivationStats":
        """Return the statistics of rotated inputs: what the main weight sees after the same rewrite of the layer.

        Full moments are exact up to rounding, which must not make a mean square negative where inputs never go. Mean
        squares alone are rotated as if channels were uncorrelated, and the maxima become bounds, because neither says
        what a sum of channels is.

        Args:
            side: of the Hadamard blocks, as `loraq.transforms.rotate` takes it; 0 rotates nothing.
        """
        if not side:
            return self
        if self.is_full:
            moment = rotate(rotate(self.second_moment, side).mT, side).mT.contiguous()
            moment.diagonal().clamp_(min=0)
        else:
            moment = self._summed(self.second_moment, side) / block_side(self.width, side)
        return ActivationStats(
            self.tokens, moment, self._summed(self.max_abs, side) / math.sqrt(block_side(self.width, side))
        )

    def _summed(self, channels: Tensor, side: int) -> Tensor:
        """Return the sum over its Hadamard block for each channel: all entries of a block are alike in size."""
        blocks = channels.unflatten(0, (-1, block_side(self.width, side)))
        return blocks.sum(1, keepdim=True).expand_as(blocks).flatten()
