"""What a linear layer's inputs look like: `ActivationStats`, all that methods know of data."""

import hashlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.errors import CalibrationError
from loraq.options import check_fields
from loraq.transforms import block_side, rotate, smooth

#: Groups of calls that `ActivationStats` tell apart.
N_CALL_GROUPS = 16


class StatsShapes(NamedTuple):
    """Shapes of what `ActivationStats` have, by their names; `None` where they have nothing."""

    second_moment: tuple[int, ...]
    output_sensitivity: tuple[int] | None = None
    call_mean_squares: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class ActivationStats:
    """Second moments of the inputs x of one linear layer, over tokens.

    The moments are not centred: a mean that is not zero is part of what the layer multiplies. Where
    sensitivities were collected, a call of the model counts in them by what its result suffers;
    where they were not, it is known how far calls differ.
    """

    #: Number of inputs that were counted.
    tokens: int
    #: E[x xᵀ], (in, in), or only its diagonal E[x²], (in); fp32.
    second_moment: Tensor
    #: How far an error of each output moves what the model returns: sums of squared gradients over
    #: their mean, (out), fp32; `None` if nobody has asked. See `loraq.pipeline.sensitivity`.
    output_sensitivity: Tensor | None = None
    #: E[x²] over groups of calls whose inputs are alike, (groups, in), fp32; `None` if nobody has
    #: kept them. See `loraq.pipeline.call_groups`.
    call_mean_squares: Tensor | None = None

    def __post_init__(self) -> None:
        check_fields(self, CalibrationError, "the statistics")
        shape = tuple(self.second_moment.shape)
        if self.tokens < 1:
            raise CalibrationError(
                f"Statistics of {self.tokens} tokens say nothing. At least 1 token is required."
            )
        if len(shape) not in (1, 2) or shape[0] != shape[-1]:
            raise CalibrationError(
                f"Statistics have a second moment of shape {shape}. A shape (in, in) or (in) is "
                "required. Collect them again."
            )
        if not self.second_moment.isfinite().all():
            raise CalibrationError(
                "Statistics hold values that are not finite numbers. Collect them again."
            )
        if (self.mean_square < 0).any():
            raise CalibrationError("Statistics hold a negative mean square. Collect them again.")
        outputs = self.output_sensitivity
        if outputs is not None and not _counts(outputs):
            raise CalibrationError(
                f"Statistics have output sensitivities of shape {tuple(outputs.shape)} that are "
                "not one finite number of 0 or more for each output. Collect them again."
            )
        calls = self.call_mean_squares
        if calls is not None and not (
            calls.dim() == 2 and calls.shape[1] == shape[0] and _counts(calls.flatten())
        ):
            raise CalibrationError(
                f"Statistics have mean squares of calls of shape {tuple(calls.shape)} that are not "
                f"finite numbers of 0 or more for each of {shape[0]} channels. Collect them again."
            )

    @property
    def width(self) -> int:
        """Size of the input axis."""
        return self.second_moment.shape[0]

    @property
    def shapes(self) -> StatsShapes:
        """Shapes of what is there."""
        outputs, calls = self.output_sensitivity, self.call_mean_squares
        return StatsShapes(
            tuple(self.second_moment.shape),
            None if outputs is None else (len(outputs),),
            None if calls is None else (len(calls), self.width),
        )

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
        for part in (self.second_moment, self.output_sensitivity, self.call_mean_squares):
            if part is not None:
                raw = part.detach().cpu().float().contiguous().view(torch.uint8)
                digest.update(memoryview(raw.numpy().data))
        return digest.hexdigest()

    def require_width(self, width: int) -> None:
        """Raise `CalibrationError` unless these are of so many input channels."""
        if self.width != width:
            raise CalibrationError(
                f"The statistics are of {self.width} input channels, the weight has {width}. Those "
                "of the same layer are required."
            )

    def require_outputs(self, width: int) -> None:
        """Raise `CalibrationError` if there are sensitivities, and not of so many outputs."""
        outputs = self.output_sensitivity
        if outputs is not None and len(outputs) != width:
            raise CalibrationError(
                f"The statistics have sensitivities of {len(outputs)} outputs, the weight has "
                f"{width}. Those of the same layer are required."
            )

    def output_energy(self, matrix: Float[Tensor, "out in"], dtype: torch.dtype) -> float:
        """Return E‖x Mᵀ‖² = tr(M E[x xᵀ] Mᵀ).

        With mean squares alone it is that of uncorrelated channels.

        Args:
            matrix: M, on the device of the statistics.
            dtype: of the product; it is summed in double precision.
        """
        return max(0.0, self._products(matrix, dtype).sum(dtype=torch.float64).item())

    def output_energies(self, matrix: Float[Tensor, "out in"], dtype: torch.dtype) -> Tensor:
        """Return the same of each output, (out), in double precision."""
        return self._products(matrix, dtype).sum(1, dtype=torch.float64)

    def _products(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        moment, matrix = self.second_moment.to(dtype), matrix.to(dtype)
        seen = matrix @ moment if self.is_full else matrix * moment
        return seen.mul_(matrix)

    def to(self, device: torch.device) -> "ActivationStats":
        """Return the same statistics on a device, in fp32 whatever they were computed in."""
        parts = {name: getattr(self, name) for name in StatsShapes._fields}
        there = {name: part for name, part in parts.items() if part is not None}
        return replace(
            self, **{name: part.to(device, torch.float32) for name, part in there.items()}
        )

    def smooth(self, codes: Tensor | None) -> "ActivationStats":
        """Return the statistics of smoothed inputs x / s, calls not told apart any more.

        Args:
            codes: of s, as `loraq.transforms.smooth` takes them.
        """
        if codes is None:
            return self
        moment = smooth(self.second_moment, codes)
        other = moment.mT.contiguous() if self.is_full else moment
        return replace(self, second_moment=smooth(other, codes), call_mean_squares=None)

    def rotate(self, side: int) -> "ActivationStats":
        """Return the statistics of rotated inputs, as the rotated main weight sees them.

        Calls are not told apart any more.

        Full moments are exact up to rounding, which must not make a mean square negative where
        inputs never go. Mean squares alone are rotated as if channels were uncorrelated: all
        entries of a Hadamard block are alike in size.

        Args:
            side: of the Hadamard blocks, as `loraq.transforms.rotate` takes it; 0 rotates nothing.
        """
        if not side:
            return self
        if self.is_full:
            moment = rotate(rotate(self.second_moment, side).mT, side).mT.contiguous()
            moment.diagonal().clamp_(min=0)
        else:
            blocks = self.second_moment.unflatten(0, (-1, block_side(self.width, side)))
            moment = blocks.mean(1, keepdim=True).expand_as(blocks).flatten()
        return replace(self, second_moment=moment, call_mean_squares=None)


def _counts(values: Tensor) -> bool:
    """Whether a tensor is a vector of sizes."""
    is_vector = values.is_floating_point() and values.dim() == 1 and len(values) > 0
    return is_vector and bool(values.isfinite().all()) and values.min().item() >= 0
