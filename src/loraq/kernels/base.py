"""What a back end is: it prepares a layer's stored tensors once, and runs the layer on them."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, library
from torch.nn.functional import linear

from loraq.formats import CastFormat, Format, QTensor, get_format
from loraq.scheme import LowRankBranch, Scheme


class Operands(NamedTuple):
    """The two weights of a layer in the form a back end multiplies with."""

    #: Main weight (out, in).
    weight: Tensor
    #: proj_up (out, rank), or `None`.
    proj_up: Tensor | None
    #: proj_down (rank, in), or `None`.
    proj_down: Tensor | None


class Stored(NamedTuple):
    """The layer as it is stored, for a back end that decodes at each call."""

    #: Main weight (out, in).
    weight: QTensor
    #: Both factors, or `None`.
    branch: LowRankBranch | None


class Backend(Protocol):
    """Runs `y = Qa(x) Qw(W - UD)ᵀ + Qp(Qb(x) Dᵀ) Uᵀ + b`.

    Only the back end looks inside what its `prepare` returns.
    """

    @property
    def name(self) -> str:
        """Name for `get_backend`."""
        ...

    @property
    def keeps_operands(self) -> bool:
        """Whether the layer keeps what `prepare` returns; else it asks again at each call."""
        ...

    def refusal(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        """Return why a layer (out, in) cannot run here, judged without its values; `None` if it can."""
        ...

    def bound(self, scheme: Scheme, dtype: torch.dtype) -> float:
        """Return the largest ‖y − y_reference‖ / ‖y_reference‖ for inputs of `dtype`; 0 means equal bits."""
        ...

    def prepare(
        self, weight: QTensor, branch: LowRankBranch | None, scheme: Scheme, dtype: torch.dtype
    ) -> Any:
        """Return the operands for inputs of `dtype`.

        Raises:
            KernelError: the bound cannot be kept with these values.
        """
        ...

    def linear(self, x: Tensor, operands: Any, scheme: Scheme, bias: Tensor | None) -> Tensor:
        """Return y (…, out) in the dtype of x (…, in)."""
        ...


def decode(weight: QTensor, branch: LowRankBranch | None, dtype: torch.dtype) -> Operands:
    """Return the stored tensors as dense matrices of `dtype`."""
    return Operands(
        decode_one(weight, dtype),
        decode_one(branch.proj_up, dtype) if branch else None,
        decode_one(branch.proj_down, dtype) if branch else None,
    )


def decode_one(q: QTensor, dtype: torch.dtype) -> Tensor:
    """Return one stored tensor as a dense one of `dtype`."""
    return _dequantize(q.packed, q.scale, q.global_scale, q.format.name, q.shape[-1], dtype)


def decode_factors(branch: LowRankBranch) -> tuple[Tensor, Tensor]:
    """Return proj_down and proj_up in bf16, which holds every value of up to 8 bits under one scale a block."""
    return decode_one(branch.proj_down, torch.bfloat16), decode_one(branch.proj_up, torch.bfloat16)


def side_path(x: Tensor, factors: tuple[Tensor, Tensor], scheme: Scheme) -> Tensor:
    """Return Qp(Qb(x) Dᵀ) Uᵀ in bf16, for back ends whose main product is something else."""
    assert scheme.branch is not None
    inner = linear(rounded(x, scheme.branch.activation_format, torch.bfloat16), factors[0])
    return linear(rounded(inner, scheme.branch.intermediate_format, torch.bfloat16), factors[1])


# One opaque operator, so that `torch.compile` neither traces the bit work nor breaks the graph on
# it.
@library.custom_op("loraq::dequantize", mutates_args=())
def _dequantize(
    packed: Tensor,
    scale: Tensor | None,
    global_scale: Tensor | None,
    name: str,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    shape = (*packed.shape[:-1], n)
    return QTensor(packed, scale, global_scale, shape, get_format(name)).dequantize().to(dtype)


@_dequantize.register_fake
def _(
    packed: Tensor,
    scale: Tensor | None,
    global_scale: Tensor | None,
    name: str,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], n), dtype=dtype)


def rounded(x: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
    """Return an activation on the grid of its format, scales dynamic for each token and block.

    A 16-bit format leaves the activation as it is: its own dtype decides. A gradient passes
    straight through.
    """
    return x.to(dtype) if isinstance(fmt, CastFormat) else _round(x, fmt.name).to(dtype)


# Opaque as well: a compiler that sees inside fuses the casts of scales away, and torch 2.13's
# misreads on a CPU the padding of a shorter last block, so that its output would not be that of the
# uncompiled layer.
@library.custom_op("loraq::round", mutates_args=())
def _round(x: Tensor, name: str) -> Tensor:
    return get_format(name).for_rows().round(x)


@_round.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    """Count the derivative of rounding as 1, so that adapters in front of a quantized layer can be trained."""
    return gradient, None


_round.register_autograd(_straight_through)
