"""What rounding of activations costs: the noise of number formats, and its price in LoRaQ's J."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from loraq.formats import CastFormat, Format, get_format
from loraq.linalg import energy
from loraq.scheme import Branch, Scheme
from loraq.transforms import rotate

#: Gaussian inputs that the noise of a layer's channels is measured on: right within 6 %.
_TOKENS = 512


class ActivationNoise(NamedTuple):
    """Price of activation rounding in J, for inputs with uncorrelated channels of equal power.

    If rounding an activation adds relative noise τ, the main path adds τ² ‖Qw(R)‖² to the squared
    output error, and the branch adds (τ_x² + τ_P²) ‖U D‖² for its input and its rank-space
    intermediate.
    """

    #: α, relative noise power of the main path's input.
    main: float = 0.0
    #: Relative noise powers of the branch's input and of its intermediate.
    input: float = 0.0
    intermediate: float = 0.0

    @property
    def branch(self) -> float:
        """β, what both add."""
        return self.input + self.intermediate

    @classmethod
    def of(cls, scheme: Scheme, branch: Branch) -> "ActivationNoise":
        """Return the noise powers of a scheme's activation formats."""
        return cls(
            main=rounding_noise(scheme.activation, rotation=scheme.rotation),
            input=rounding_noise(branch.activation, rotation=scheme.rotation),
            intermediate=rounding_noise(
                branch.intermediate_format.name, width=branch.rank, degrees=None
            ),
        )

    def price(
        self, error: Tensor, rounded: Tensor, branch_energy: Tensor, root: Tensor | None = None
    ) -> Tensor:
        """Return J.

        Args:
            error: R − Qw(R), (out, in).
            rounded: Qw(R), (out, in).
            branch_energy: ‖U D‖².
            root: (in), scales the channels before squaring.
        """

        def size(matrix: Tensor) -> Tensor:
            return energy(matrix if root is None else matrix * root)

        total = size(error) + self.branch * branch_energy
        return total + self.main * size(rounded) if self.main else total


def noise_powers(mean_square: Tensor, fmt: Format) -> Tensor:
    """Return the noise power that rounding leaves in each channel, measured on Gaussian inputs.

    The step of an integer follows the largest value of its block, that of a float its own magnitude
    down to the block's smallest: no formula in the mean squares has both.

    Args:
        mean_square: E[x²] of each channel, (in), in double precision.
        fmt: of the activations.
    """
    unit = mean_square.mean().clamp(min=torch.finfo(torch.float64).tiny)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn((_TOKENS, len(mean_square)), generator=generator).to(mean_square.device)
    sample *= (mean_square / unit).sqrt().float()
    noise = sample - fmt.for_rows().round(sample)
    return unit * noise.square_().mean(0, dtype=torch.float64)


@lru_cache(maxsize=64)
def rounding_noise(
    name: str, *, rotation: int = 0, width: int = 1152, degrees: int | None = 4
) -> float:
    """Return the relative noise power of a format on a fixed sample; 0 for a 16-bit format.

    Activations of transformers have heavy tails, for which a Student t stands; a Gaussian would
    halve the noise of the 4-bit integer formats, and is right for an intermediate that was spread
    over its rank.

    Args:
        name: number format.
        rotation: of the input in the layer, which makes its tails lighter.
        width: values of a row.
        degrees: degrees of freedom of the sample; `None` is a Gaussian.
    """
    fmt = get_format(name).for_rows()
    if isinstance(fmt, CastFormat):
        return 0.0
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn((1 + (degrees or 0), 64, width), generator=generator)
    sample = normal[0]
    if degrees is not None:
        sample = sample / (normal[1:].square().sum(0) / degrees).sqrt()
    sample = rotate(sample, rotation)
    return ((sample - fmt.round(sample)).square().sum() / sample.square().sum()).item()
