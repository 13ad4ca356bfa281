"""What is asked of one layer: `Scheme` and `Branch`.

Formats are named, not passed as objects, so that a scheme is plain data: it compares, hashes and
travels through TOML, JSON and a checkpoint's manifest as it is.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from loraq.errors import SchemeError
from loraq.formats import CastFormat, Format, get_format
from loraq.options import check_fields


@dataclass(frozen=True)
class Branch:
    """The low-rank side path of one layer: `Qp(Qb(x) Dᵀ) Uᵀ`.

    U = proj_up is (out, rank), D = proj_down is (rank, in).
    """

    #: Inner size of the branch; 0 leaves it to a budget (`loraq.budget.with_rank`) and cannot be
    #: solved as it is.
    rank: int = 0
    #: Format of both factors.
    weight: str = "bf16"
    #: Format of the branch's input x; "bf16" leaves it as it is.
    activation: str = "bf16"
    #: Format of the rank-space intermediate x Dᵀ; `None` takes the format of the input.
    intermediate: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, SchemeError, "the branch")
        if self.rank < 0:
            raise SchemeError(
                f"Branch rank is {self.rank}. It must be at least 1, or 0 for a rank that a budget "
                "settles. For no branch, leave the branch out."
            )
        for name in (self.weight, self.activation, self.intermediate_format.name):
            get_format(name)

    @property
    def weight_format(self) -> Format:
        """Format of both factors."""
        return get_format(self.weight)

    @property
    def activation_format(self) -> Format:
        """Format of the branch's input, scales not shared by tokens."""
        return get_format(self.activation).for_rows()

    @property
    def intermediate_format(self) -> Format:
        """Format of the rank-space intermediate, scales not shared by tokens."""
        return get_format(self.intermediate or self.activation).for_rows()

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of both factors for a weight of shape (out, in), scales counted."""
        n_out, n_in = shape
        return self.weight_format.nbytes((n_out, self.rank)) + self.weight_format.nbytes(
            (self.rank, n_in)
        )


@dataclass(frozen=True)
class Scheme:
    """What is asked of one layer: `y = Qa(x) Qw(W - UD)ᵀ + Qp(Qb(x) Dᵀ) Uᵀ`.

    x and W are smoothed and rotated first.
    """

    #: Format of the main weight.
    weight: str
    #: Format of the main path's input; "bf16" leaves it as it is (weight-only quantization).
    activation: str = "bf16"
    #: The low-rank side path, or `None`.
    branch: Branch | None = None
    #: Side of the Hadamard blocks that rotate the input axis of x and W, a power of two; 0 rotates
    #: nothing. Costs `rotation` multiplications for each input value at run time, and no bytes; see
    #: `loraq.transforms`.
    rotation: int = 0
    #: Whether each input channel of x is first divided by a factor, and that of W multiplied by it.
    #: The factors come from statistics of the layer's inputs, which are required, and take a byte
    #: for each channel; see `loraq.transforms`.
    smoothing: bool = False

    def __post_init__(self) -> None:
        check_fields(self, SchemeError, "the scheme")
        get_format(self.weight)
        get_format(self.activation)
        if self.rotation and (
            self.rotation & (self.rotation - 1) or not 2 <= self.rotation <= 1024
        ):
            raise SchemeError(
                f"Rotation {self.rotation} is not the side of a Hadamard block. Use a power of two "
                "from 2 to 1024, or 0."
            )

    @property
    def weight_format(self) -> Format:
        """Format of the main weight."""
        return get_format(self.weight)

    @property
    def activation_format(self) -> Format:
        """Format of the main path's input, scales not shared by tokens."""
        return get_format(self.activation).for_rows()

    def weight_only(self) -> "Scheme":
        """Return the scheme with the same weights that leaves all activations as they are."""
        branch = self.branch and replace(self.branch, activation="bf16", intermediate=None)
        return replace(self, activation="bf16", branch=branch, rotation=0)

    @property
    def is_weight_only(self) -> bool:
        """Whether no activation is rounded."""
        formats = [self.activation_format]
        if branch := self.branch:
            formats += [branch.activation_format, branch.intermediate_format]
        return all(isinstance(fmt, CastFormat) for fmt in formats)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data; without `smoothing` unless it is asked for."""
        return {key: value for key, value in asdict(self).items() if key != "smoothing" or value}

    def parts(self, shape: tuple[int, int]) -> dict[str, tuple[Format, tuple[int, int]]]:
        """Return format and shape of each matrix that stores a weight (out, in), by disk name."""
        n_out, n_in = shape
        parts = {"weight": (self.weight_format, (n_out, n_in))}
        if branch := self.branch:
            parts["proj_down"] = (branch.weight_format, (branch.rank, n_in))
            parts["proj_up"] = (branch.weight_format, (n_out, branch.rank))
        return parts

    def storage(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the `uint8` tensors that store a weight (out, in), by disk name.

        Those of stacked experts, (experts, out, in), are the same with that axis in front.
        """
        *experts, n_out, n_in = shape
        stored = {
            f"{part}_{name}": (*experts, *size)
            for part, (fmt, matrix) in self.parts((n_out, n_in)).items()
            for name, size in fmt.storage(matrix).items()
        }
        return stored | ({"smooth_factor": (*experts, n_in)} if self.smoothing else {})

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that a weight takes, scales counted, bias not.

        Its shape is (out, in), or (experts, out, in).
        """
        return sum(map(math.prod, self.storage(shape).values()))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `SchemeError` unless a weight of this shape can be stored this way."""
        if len(shape) != 2 or min(shape) < 1:
            raise SchemeError(f"Weight has shape {tuple(shape)}. A matrix (out, in) is required.")
        if self.branch and self.branch.rank == 0:
            raise SchemeError(
                "The branch has no rank yet (0). Give it one, or let a budget choose: `with_rank`."
            )
        if self.branch and self.branch.rank > min(shape):
            raise SchemeError(
                f"Branch rank {self.branch.rank} is larger than min(out, in) of shape "
                f"{tuple(shape)}. Use a rank of at most {min(shape)}, or skip this layer."
            )
