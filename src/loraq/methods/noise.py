"""What rounding of activations costs: the noise of number formats, and its price in LoRaQ's J."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from loraq.formats import BlockFormat, CastFormat, Format, get_format
from loraq.linalg import energy
from loraq.scheme import Branch, Scheme
from loraq.transforms import rotate


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


def noise_powers(mean_square: Tensor, fmt: Format | None) -> Tensor:
    """Return how the noise of rounded activations spreads over the channels, up to a factor.

    The step of an integer is its block's, whatever its own magnitude: all channels of a block get
    the block's mean power. A float's step follows its magnitude: every channel keeps its own.

    Args:
        mean_square: E[x²] of each channel, (in).
        fmt: of the activations; `None` for one that is not known.
    """
    if not isinstance(fmt, BlockFormat) or fmt.element.is_float:
        return mean_square
    blocks = mean_square.split(fmt.block_size or len(mean_square))
    return torch.cat([block.mean().expand(len(block)) for block in blocks])


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
