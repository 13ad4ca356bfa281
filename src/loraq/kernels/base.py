"""What a back end is: it prepares a packed weight once, and runs the layer on what it prepared."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.nn.functional import linear

from loraq.autocast import without_autocast
from loraq.formats import CastFormat, Format, QTensor, get_format
from loraq.packed import LowRankBranch, PackedWeight
from loraq.scheme import Scheme
from loraq.transforms import smooth, unrotate

_LARGEST_FP16 = torch.finfo(torch.float16).max
#: The largest bound that a back end states.
_WIDEST_BOUND = 4e-2


class LayerSpec(NamedTuple):
    """What a back end is chosen by."""

    #: What is to be run, in the order in which it is tried: the stored scheme, or other activations
    #: beside the same weights.
    schemes: tuple[Scheme, ...]
    #: (out, in).
    shape: tuple[int, int]
    device: torch.device
    #: Whether activations are rounded even where the device gains nothing from it.
    simulate: bool = False


class Backend(ABC):
    """Runs `y = Qa(x) Qw(W - UD)ᵀ + Qp(Qb(x) Dᵀ) Uᵀ + b`, x transformed already.

    Only the back end looks inside what its `prepare` returns.
    """

    #: Name for `get_backend`.
    name: str
    #: Whether the layer keeps what `prepare` returns; else it asks again at each call.
    keeps_operands: bool

    def as_run(self, scheme: Scheme) -> Scheme:
        """Return a scheme with the activations that the back end has in place of those.

        They are more exact, and at least as fast; only to simulate another device are activations
        rounded in passes of their own, before a product in 16 or 32 bits.
        """
        return scheme

    @abstractmethod
    def refusal(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        """Return why a layer (out, in) cannot run here, judged without its values, or `None`."""

    @abstractmethod
    def bound(self, scheme: Scheme, dtype: torch.dtype) -> float:
        """Return the largest ‖y − y_reference‖ / ‖y_reference‖ for inputs of `dtype`.

        0 means equal bits. A bound is relative to the output, so it is not for tokens whose largest
        channels hardly reach it: docs/backends.md states how large they may be.
        """

    @abstractmethod
    def prepare(self, packed: PackedWeight, scheme: Scheme, dtype: torch.dtype) -> Any:
        """Return the operands for inputs of `dtype`.

        Args:
            packed: the stored weight.
            scheme: what is run: the stored scheme, or other activations beside the same weights.
                If it does not rotate the input and the weight is stored rotated, the operands are
                rotated back.
            dtype: of the inputs.

        Raises:
            KernelError: the bound cannot be kept with these values.
        """

    @abstractmethod
    def linear(self, x: Tensor, operands: Any, scheme: Scheme, bias: Tensor | None) -> Tensor:
        """Return y (…, out) in the dtype of x (…, in)."""

    def kept_nbytes(self, operands: Any, packed: PackedWeight) -> int:
        """Return the bytes that operands take beside those of the packed weight."""
        stored = {tensor.untyped_storage().data_ptr() for tensor in packed.tensors.values()}
        return sum(size for address, size in _storages(operands) if address not in stored)


class Prepared(NamedTuple):
    """A layer that is ready to run on inputs of one dtype, on one device."""

    backend: Backend
    #: What the back end keeps, or `None` if it prepares anew at each call.
    operands: Any
    #: What it runs.
    scheme: Scheme
    dtype: torch.dtype
    device: torch.device


class Operands(NamedTuple):
    """The two weights of a layer as dense matrices."""

    #: Main weight (out, in).
    main: Tensor
    #: proj_up (out, rank), or `None`.
    proj_up: Tensor | None
    #: proj_down (rank, in), or `None`.
    proj_down: Tensor | None


def decode(
    packed: PackedWeight,
    dtype: torch.dtype,
    rotation: int | None = None,
    one: Callable[[QTensor, torch.dtype, int], Tensor] | None = None,
) -> Operands:
    """Return the stored tensors as dense matrices of `dtype`.

    Args:
        packed: the stored weight.
        dtype: of the result.
        rotation: of the inputs that will be multiplied; if it is 0, matrices that are stored
            rotated are rotated back. `None` is the stored one.
        one: decodes one tensor as `decode_one` does.
    """
    one, branch = one or decode_one, packed.branch
    side = packed.scheme.rotation if rotation == 0 else 0
    main = one(packed.main, dtype, side)
    if branch is None:
        return Operands(main, None, None)
    return Operands(main, one(branch.proj_up, dtype, 0), one(branch.proj_down, dtype, side))


def decode_one(q: QTensor, dtype: torch.dtype, side: int = 0) -> Tensor:
    """Return one stored tensor as a dense one of `dtype`, rotated back if it has a `side`."""
    dense = _dequantize(q.packed, q.scale, q.global_scale, q.format.name, q.shape[-1], dtype)
    return unrotate(dense, side)


def reconstruct(packed: PackedWeight) -> Tensor:
    """Return what `PackedWeight.reconstruct` does, by operators that a compiler can trace."""
    dense, up, down = decode(packed, torch.float32)
    with without_autocast(packed.device):
        if up is not None and down is not None:
            dense = dense + up @ down
        return smooth(unrotate(dense, packed.scheme.rotation), packed.smooth_factor)


def decode_factors(branch: LowRankBranch | None) -> tuple[Tensor, Tensor] | None:
    """Return proj_down and proj_up in bf16, which holds every 8-bit value under one scale a block.

    `None` stays `None`.
    """
    if branch is None:
        return None
    return decode_one(branch.proj_down, torch.bfloat16), decode_one(branch.proj_up, torch.bfloat16)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a layer's operands, and of its sums until the branch is in them.

    It is bf16 for bf16, else fp32: CPUs do that far faster than fp16, which would also overflow
    where a main product and a branch are large and cancel.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def flatten_tokens(x: Tensor) -> Tensor:
    """Return x (…, in) as (tokens, in)."""
    return x.reshape(-1, x.shape[-1])


def finish(
    y: Tensor,
    x: Tensor,
    scheme: Scheme,
    factors: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    *,
    is_exact: bool = False,
) -> Tensor:
    """Return the layer's output, made of its main product.

    An fp16 output that is over the largest number by no more than a back end may be wrong is that
    number: sums in bf16 would else make infinities of numbers that fp16 holds.

    Args:
        y: main product (tokens, out).
        x: the layer's input (…, in), which decides shape and dtype.
        scheme: formats of the branch's activations.
        factors: proj_down and proj_up in bf16, for a main product without the branch.
        bias: (out), for a main product without it.
        is_exact: whether all sums were in fp32, so that what is over the largest number is so.
    """
    if factors is not None:
        y = y + _side_path(flatten_tokens(x), factors, scheme)
    if bias is not None:
        y = y + bias
    if x.dtype == torch.float16 and not is_exact:
        clipped = y.clamp(-_LARGEST_FP16, _LARGEST_FP16)
        y = torch.where(y.abs() <= (1 + _WIDEST_BOUND) * _LARGEST_FP16, clipped, y)
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def _side_path(x: Tensor, factors: tuple[Tensor, Tensor], scheme: Scheme) -> Tensor:
    """Return Qp(Qb(x) Dᵀ) Uᵀ in bf16."""
    assert scheme.branch is not None
    proj_down, proj_up = factors
    inner = linear(round_activation(x, scheme.branch.activation_format, torch.bfloat16), proj_down)
    inner = round_activation(inner, scheme.branch.intermediate_format, torch.bfloat16)
    return linear(inner, proj_up)


def pass_straight_through(
    gradient: Tensor,
    main: tuple[Tensor, Tensor],
    branch: tuple[Tensor, Tensor | float, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient of a layer's input, for operators whose insides are opaque to autograd.

    The derivative of rounding counts as 1, so that adapters in front of a quantized layer can be
    trained (the straight-through estimator, arXiv 1308.3432).

    Args:
        gradient: of the output, (tokens, out).
        main: codes (out, in) and scales (out) of the main weight.
        branch: codes (rank, in) and scales (rank) of proj_down, and proj_up (out, rank); or `None`.
        dtype: of the input.
    """
    towards = gradient.float()
    codes, scale = main
    back = (towards * scale) @ codes.float()
    if branch is not None:
        down_codes, down_scale, proj_up = branch
        back += ((towards @ proj_up.float()) * down_scale) @ down_codes.float()
    return back.to(dtype)


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
    out = packed.new_empty((*packed.shape[:-1], n), dtype=dtype)
    return QTensor(packed, scale, global_scale, out.shape, get_format(name)).decode_into(out)


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


def round_activation(x: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
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


def _keep_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    """Count the derivative of rounding as 1; see `pass_straight_through`."""
    return gradient, None


_round.register_autograd(_keep_gradient)


def _storages(operands: Any) -> set[tuple[int, int]]:
    """Return address and bytes of every piece of memory in nested tuples and lists of tensors."""
    if isinstance(operands, Tensor):
        if operands.is_mkldnn:  # opaque: codes in whole blocks, and sums of rows
            return {(id(operands), int(torch.ops.mkldnn._nbytes(operands)))}
        storage = operands.untyped_storage()
        return {(storage.data_ptr(), storage.nbytes())}
    if isinstance(operands, tuple | list):
        return set().union(*map(_storages, operands))
    return set()
