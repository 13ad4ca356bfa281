"""One quantized layer on its way out: what is known before its bytes are read, and the bytes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraq.formats import QTensor
from loraq.formats.block import BlockFormat
from loraq.formats.scales import view_bytes
from loraq.packed import LowRankBranch
from loraq.safetensors.header import TensorSpec
from loraq.scheme import Scheme
from loraq.targets import Limits


@dataclass(frozen=True)
class Head:
    """What is known of a quantized layer before its bytes are read."""

    #: Dotted name in the model.
    name: str
    #: The layer whose bytes it has: itself, unless it shares those of another one.
    stored: str
    #: (out, in).
    shape: tuple[int, int]
    scheme: Scheme
    #: Shape of the float weight: (out, in), (out, in, 1, 1) of a 1×1 convolution, or of three axes
    #: for stacked experts.
    dense_shape: tuple[int, ...]
    #: Whether the rules of the class kept it out of the recipe's scheme, in 8 bits.
    is_kept: bool = False
    #: How many experts are stacked; 0 for a linear layer or convolution.
    n_experts: int = 0
    #: Whether stacked experts are (experts, in, out) in the model.
    is_transposed: bool = False
    #: Dtype of the bias, or "" for none.
    bias: str = ""
    #: Rank that LoRAs of the user add to the branch.
    lora_rank: int = 0
    #: Whether its class calls it a modulation: one row for each image goes through it.
    is_modulation: bool = False
    #: Layers of the model that are one in the other program, from top to bottom; none for itself.
    parts: tuple["Head", ...] = ()
    #: Why these cannot be one quantized layer; "" if they can.
    misfit: str = ""

    @property
    def is_conv(self) -> bool:
        """Whether it is a 1×1 convolution."""
        return len(self.dense_shape) == 4

    @property
    def weight_name(self) -> str:
        """Name of the float weight; a stack of experts is a parameter of its own."""
        return self.name if self.n_experts else f"{self.name}.weight"

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """(out, in), or (experts, out, in)."""
        return (self.n_experts, *self.shape) if self.n_experts else self.shape

    @property
    def rank(self) -> int:
        """Rank of the branch, with LoRAs."""
        return (self.scheme.branch.rank if self.scheme.branch else 0) + self.lora_rank

    @property
    def main(self) -> BlockFormat | None:
        """Format of the main weight; `None` for one without blocks."""
        fmt = self.scheme.weight_format
        return fmt if isinstance(fmt, BlockFormat) else None

    @property
    def block(self) -> int:
        """Values that share a scale; the whole row where the format says so."""
        return (self.main and self.main.block_size) or self.shape[1]

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return math.prod(self.packed_shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the source."""
        if self.parts:
            return sum(part.nbytes for part in self.parts)
        return self.scheme.nbytes(self.packed_shape)

    @property
    def is_whole(self) -> bool:
        """Whether every block is full."""
        return self.shape[1] % self.block == 0

    def explain_misfit(self, limits: Limits) -> str:
        """Return why it is beyond the limits of a target; "" if it is within them."""
        scheme, shape = self.scheme, self.packed_shape
        return limits.explain_misfit(scheme, shape, is_conv=self.is_conv, lora_rank=self.lora_rank)


@dataclass(frozen=True, eq=False)
class Factors:
    """A low-rank branch in floats: `up @ down`."""

    #: (out, rank).
    up: Tensor
    #: (rank, in).
    down: Tensor

    @property
    def rank(self) -> int:
        """Inner size."""
        return self.down.shape[0]


@dataclass(frozen=True, eq=False)
class Layer:
    """A quantized layer, read."""

    head: Head
    #: The main weight, in the basis of the stored codes.
    main: QTensor
    #: The branch in fp32, LoRAs of the user included; `None` for none.
    branch: Factors | None
    #: The branch as it is stored, without LoRAs.
    packed_branch: LowRankBranch | None = None

    @property
    def block_scale(self) -> Tensor:
        """The bytes of the block scales, (out, blocks · bytes of a scale)."""
        assert self.main.scale is not None, "a block format has block scales"
        return self.main.scale

    @property
    def global_scale(self) -> Tensor:
        """The scale above the block scales of NVFP4, fp32, without axes."""
        assert self.main.global_scale is not None, "NVFP4 has a global scale"
        return view_bytes(self.main.global_scale, torch.float32)[0].clone()


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a target makes of the tensors that it was given, in fp32."""

    #: (out, in).
    main: Tensor
    branch: Factors | None = None

    def dense(self) -> Tensor:
        """Return the effective weight (out, in)."""
        branch = self.branch
        return self.main if branch is None else self.main + branch.up.float() @ branch.down.float()


#: Tensors by their full names.
Tensors = Mapping[str, Tensor]
Specs = dict[str, TensorSpec]


def same(a: Factors | None, b: Factors | None) -> bool:
    """Return whether two branches hold the same numbers; columns of zeros do not count."""
    if a is None or b is None:
        some = a or b
        return some is None or not bool(some.up.any() and some.down.any())
    rank = min(a.rank, b.rank)
    rest = [part for each in (a, b) for part in (each.up[:, rank:], each.down[rank:])]
    return (
        torch.equal(a.up[:, :rank].float(), b.up[:, :rank].float())
        and torch.equal(a.down[:rank].float(), b.down[:rank].float())
        and not any(bool(part.any()) for part in rest)
    )
