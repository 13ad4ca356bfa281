"""What a layer is in bytes: `PackedWeight`, and `LayerSolution`, a packed weight and its error.

`PackedStack` is the same for experts that are stacked in one weight.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.autocast import without_autocast
from loraq.errors import FormatError
from loraq.formats import Format, QTensor
from loraq.scheme import Scheme
from loraq.transforms import smooth, unrotate


@dataclass(frozen=True, eq=False)
class LowRankBranch:
    """Both quantized factors of a branch."""

    #: (out, rank), blocks along rank.
    proj_up: QTensor
    #: (rank, in), blocks along in.
    proj_down: QTensor

    def reconstruct(self, *, out: Tensor | None = None) -> Float[Tensor, "out in"]:
        """Return the dense product U D in fp32, in `out` if given."""
        return torch.mm(self.proj_up.dequantize(), self.proj_down.dequantize(), out=out)

    def subtract_from(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return weight − U D, in the memory of the product."""
        product = self.reconstruct()
        return torch.sub(weight, product, out=product)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight as it is stored: its scheme, the main weight and the low-rank branch.

    On disk, and as parameters of a layer, its tensors are called `weight_packed`, `weight_scale`,
    `proj_down_packed` and so on; `Scheme.storage` lists them with their shapes.
    """

    #: How the bytes are read and run.
    scheme: Scheme
    #: The main weight, (out, in).
    main: QTensor
    #: The low-rank branch, or `None` if the scheme has none.
    branch: LowRankBranch | None = None
    #: Codes of the factors that smooth the input, (in) `uint8`, or `None` if the scheme does not;
    #: see `loraq.transforms.smooth`.
    smooth_factor: Tensor | None = None

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> "PackedWeight":
        """Return the weight that stored tensors hold; the inverse of `tensors`.

        Args:
            tensors: by their names on disk; others are ignored.
            scheme: how they are read.
            shape: (out, in).

        Raises:
            FormatError: a tensor is missing, or does not have the shape that the scheme requires.
        """
        parts = {
            part: _read(tensors, part, fmt, matrix)
            for part, (fmt, matrix) in scheme.parts(shape).items()
        }
        main, codes, name = parts.pop("weight"), None, "smooth_factor"
        if scheme.smoothing:
            codes = _require_bytes(tensors.get(name), name, shape[1:])
        return cls(scheme, main, LowRankBranch(**parts) if parts else None, codes)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The `uint8` tensors to store, by their names on disk; those of `Scheme.storage`."""
        matrices = {"weight": self.main}
        if self.branch is not None:
            matrices |= {"proj_down": self.branch.proj_down, "proj_up": self.branch.proj_up}
        tensors = {
            f"{part}_{name}": tensor
            for part, matrix in matrices.items()
            for name, tensor in matrix.tensors.items()
        }
        codes = self.smooth_factor
        return tensors if codes is None else tensors | {"smooth_factor": codes}

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        n_out, n_in = self.main.shape
        return n_out, n_in

    @property
    def matrices(self) -> "tuple[PackedWeight]":
        """The weight itself: what a `PackedStack` has several of."""
        return (self,)

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.main.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and both factors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each element of the weight."""
        return 8 * self.nbytes / math.prod(self.shape)

    def reconstruct(self) -> Float[Tensor, "out in"]:
        """Return the effective dense weight Ŵ = main + U D, for x as it comes, in fp32."""
        dense = self.main.dequantize()
        with without_autocast(self.device):
            if self.branch is not None:
                dense += self.branch.reconstruct()
            return smooth(unrotate(dense, self.scheme.rotation), self.smooth_factor)

    def to(self, device: torch.device | str) -> "PackedWeight":
        """Return the same bytes on a device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return self.from_tensors(moved, self.scheme, self.shape)


@dataclass(frozen=True, eq=False)
class PackedStack:
    """The quantized weights of stacked experts: each as it would be alone, in one tensor a kind."""

    #: How the bytes of every expert are read and run.
    scheme: Scheme
    #: (experts, out, in).
    shape: tuple[int, int, int]
    #: The `uint8` tensors to store, by their names on disk; those of `Scheme.storage`.
    tensors: dict[str, Tensor]

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int, int]
    ) -> "PackedStack":
        """Return the stack that stored tensors hold; the inverse of `tensors`.

        Raises:
            FormatError: as `PackedWeight.from_tensors`.
        """
        for name, stored in scheme.storage(shape).items():
            _require_bytes(tensors.get(name), name, stored)
        return cls(scheme, shape, {name: tensors[name] for name in scheme.storage(shape)})

    @classmethod
    def of(cls, experts: Sequence[PackedWeight]) -> "PackedStack":
        """Return a stack of weights that have one scheme and one shape."""
        first = experts[0]
        tensors = {
            name: torch.stack([expert.tensors[name] for expert in experts])
            for name in first.tensors
        }
        return cls(first.scheme, (len(experts), *first.shape), tensors)

    def __getitem__(self, index: int) -> PackedWeight:
        """Return the weight of one expert, a view."""
        _, n_out, n_in = self.shape
        tensors = {name: tensor[index] for name, tensor in self.tensors.items()}
        return PackedWeight.from_tensors(tensors, self.scheme, (n_out, n_in))

    @property
    def matrices(self) -> Iterator[PackedWeight]:
        """The weights of the experts one by one, views."""
        return (self[index] for index in range(self.shape[0]))

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.tensors["weight_packed"].device

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and both factors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each element of the weights."""
        return 8 * self.nbytes / math.prod(self.shape)

    def reconstruct(self) -> Float[Tensor, "experts out in"]:
        """Return the effective dense weights in fp32; see `PackedWeight.reconstruct`."""
        return torch.stack([expert.reconstruct() for expert in self.matrices])


@dataclass(frozen=True, eq=False)
class LayerSolution:
    """What a method returns for one weight: what is stored, and how good it is."""

    #: What is stored.
    packed: PackedWeight
    #: ‖W − Ŵ‖_F / ‖W‖_F, no unit; 0 for an all-zero weight that is reproduced.
    relative_error: float
    #: Wall time of the solver in seconds.
    seconds: float = 0.0
    #: What else the method measured, by name: "objective", "output_error", "rounds" …
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio of the weight in dB; infinite if it is exact."""
        return -20 * math.log10(self.relative_error) if self.relative_error > 0 else math.inf

    @property
    def nbytes(self) -> int:
        """Bytes stored; see `PackedWeight.nbytes`."""
        return self.packed.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each element of the weight."""
        return self.packed.bits_per_weight

    def reconstruct(self) -> Float[Tensor, "out in"]:
        """Return the effective dense weight in fp32; see `PackedWeight.reconstruct`."""
        return self.packed.reconstruct()


def _read(tensors: Mapping[str, Tensor], part: str, fmt: Format, shape: tuple[int, int]) -> QTensor:
    stored = {}
    for name, expected in fmt.storage(shape).items():
        full_name = f"{part}_{name}"
        stored[name] = _require_bytes(tensors.get(full_name), full_name, expected)
    return QTensor(stored["packed"], stored.get("scale"), stored.get("global_scale"), shape, fmt)


def _require_bytes(tensor: Tensor | None, name: str, expected: Sequence[int]) -> Tensor:
    """Return a stored tensor; raises `FormatError` unless it is raw bytes of the expected shape."""
    found = "missing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
    if tensor is None or tensor.dtype != torch.uint8 or tuple(tensor.shape) != tuple(expected):
        raise FormatError(
            f"Tensor '{name}' is {found}. Raw bytes (uint8) of shape {tuple(expected)} "
            "are required. Restore the file, or quantize again."
        )
    return tensor
