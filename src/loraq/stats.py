"""What a linear layer's inputs look like: `ActivationStats`, all that a data-aware method knows of the data."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from loraq.errors import CalibrationError
from loraq.transforms import rotate


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
        """Return the same statistics on a device."""
        return ActivationStats(self.tokens, self.second_moment.to(device), self.max_abs.to(device))

    def transformed(self, *, scale: Tensor | None = None, rotation: int = 0) -> "ActivationStats":
        """Return the statistics of x / scale, rotated: what the main weight sees after the same rewrite of the layer.

        Full moments are exact. Mean squares alone are rotated as if channels were uncorrelated, and the maxima become
        bounds, because neither says what a sum of channels is.

        Args:
            scale: positive divisor of each channel, (in); `None` divides by nothing.
            rotation: side of the Hadamard blocks, as `loraq.transforms.rotate` takes it; 0 rotates nothing.
        """
        moment, largest = self.second_moment, self.max_abs
        if scale is not None:
            scale = scale.to(moment)
            moment = moment / scale / scale[:, None] if self.is_full else moment / scale.square()
            largest = largest / scale
        if rotation:
            squares = rotate(torch.eye(self.width, device=moment.device), rotation).square()
            moment = rotate(rotate(moment, rotation).mT, rotation).mT if self.is_full else moment @ squares
            largest = largest @ squares.sqrt()
        return ActivationStats(self.tokens, moment.contiguous(), largest)
