"""The request and the answer for one layer: `Scheme` and `Branch` in, `LayerSolution` out.

Formats are named, not passed as objects, so that a scheme is plain data: it compares, hashes and
travels through TOML, JSON and a checkpoint's manifest as it is.
"""

import math
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from loraq.errors import SchemeError
from loraq.formats import Format, QTensor, get_format
from loraq.transforms import unrotate


@dataclass(frozen=True)
class Branch:
    """The low-rank side path of one layer: `Qp(Qb(x) Dᵀ) Uᵀ` with U = proj_up (out, rank), D = proj_down (rank, in)."""

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
        if self.rank < 0:
            raise SchemeError(
                f"Branch rank is {self.rank}. It must be at least 1. For no branch, leave the "
                f"branch out."
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
        """Return the exact bytes of both factors for a weight of shape (out, in), scales counted."""
        n_out, n_in = shape
        return self.weight_format.nbytes((n_out, self.rank)) + self.weight_format.nbytes(
            (self.rank, n_in)
        )


@dataclass(frozen=True)
class Scheme:
    """What is asked of one layer: `y = Qa(x) Qw(W - UD)ᵀ + Qp(Qb(x) Dᵀ) Uᵀ`, with x and W rotated first."""

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

    def __post_init__(self) -> None:
        get_format(self.weight)
        get_format(self.activation)
        if self.rotation and (
            self.rotation & (self.rotation - 1) or not 2 <= self.rotation <= 1024
        ):
            raise SchemeError(
                f"Rotation {self.rotation} is no side of a Hadamard block. Use a power of two from "
                f"2 to 1024, or 0."
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
        """Return the scheme with the same formats of weights that leaves all activations as they are."""
        branch = self.branch and replace(self.branch, activation="bf16", intermediate=None)
        return replace(self, activation="bf16", branch=branch, rotation=0)

    def parts(self, shape: tuple[int, int]) -> dict[str, tuple[Format, tuple[int, int]]]:
        """Return format and shape of each matrix that stores a weight (out, in), by its name on disk."""
        n_out, n_in = shape
        parts = {"weight": (self.weight_format, (n_out, n_in))}
        if branch := self.branch:
            parts["proj_down"] = (branch.weight_format, (branch.rank, n_in))
            parts["proj_up"] = (branch.weight_format, (n_out, branch.rank))
        return parts

    def storage(self, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the `uint8` tensors that store a weight (out, in), by their names on disk."""
        return {
            f"{part}_{name}": stored
            for part, (fmt, matrix) in self.parts(shape).items()
            for name, stored in fmt.storage(matrix).items()
        }

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Return the exact bytes that a weight of shape (out, in) takes, all scales counted, bias not."""
        return self.weight_format.nbytes(shape) + (self.branch.nbytes(shape) if self.branch else 0)

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


@dataclass(frozen=True, eq=False)
class LowRankBranch:
    """Both quantized factors of a branch."""

    #: (out, rank), blocks along rank.
    proj_up: QTensor
    #: (rank, in), blocks along in.
    proj_down: QTensor

    def reconstruct(self) -> Float[Tensor, "out in"]:
        """Return the dense product U D in fp32."""
        return self.proj_up.dequantize() @ self.proj_down.dequantize()


@dataclass(frozen=True, eq=False)
class LayerSolution:
    """What a method returns for one weight: what is stored, and how good it is."""

    #: The scheme that was asked for.
    scheme: Scheme
    #: The main weight, (out, in).
    residual: QTensor
    #: The low-rank branch, or `None` if the scheme has none.
    branch: LowRankBranch | None
    #: ‖W − Ŵ‖_F / ‖W‖_F, no unit; 0 for an all-zero weight that is reproduced.
    relative_error: float
    #: Wall time of the solver in seconds.
    seconds: float = 0.0
    #: What else the method measured, by name: "steps", "objective", "start_error" …
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The `uint8` tensors to store, by their names on disk; those of `Scheme.storage`."""
        matrices = {"weight": self.residual}
        if self.branch is not None:
            matrices |= {"proj_down": self.branch.proj_down, "proj_up": self.branch.proj_up}
        return {
            f"{part}_{name}": t for part, q in matrices.items() for name, t in q.tensors.items()
        }

    def reconstruct(self) -> Float[Tensor, "out in"]:
        """Return the effective dense weight Ŵ = residual + U D, rotated back, in fp32."""
        dense = self.residual.dequantize()
        return unrotate(
            dense + self.branch.reconstruct() if self.branch else dense, self.scheme.rotation
        )

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio of the weight in dB; infinite for an exact solution."""
        return -20 * math.log10(self.relative_error) if self.relative_error > 0 else math.inf

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and both factors."""
        branch = self.branch
        return self.residual.nbytes + (
            branch.proj_up.nbytes + branch.proj_down.nbytes if branch else 0
        )

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each element of the weight."""
        n_out, n_in = self.residual.shape
        return 8 * self.nbytes / (n_out * n_in)
