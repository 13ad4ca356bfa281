"""FP8 rows: block scales folded into e4m3 codes, one row-wise scaled matrix product.

A block scale of an MX format is a power of two, so a 4-bit value times its scale is an e4m3 number
as long as the scales of a row lie within about 15 binades: e4m3 has 2^-9 to 448. The layer is then
multiplied without any work on scales inside the product, which GPUs without block-scaled arithmetic
(Hopper, Ada) need to keep their tensor cores busy. A weight is taken over exactly, or the layer is
refused. Activations of the formats below are put on one exponent a token; a value that falls below
e4m3's normal numbers loses bits there, at 2^-15 of its token's largest. The branch runs in bf16.

Hopper adds FP8 products in 13 bits and truncates, so that long sums shrink. Above
`LONGEST_FAST_SUM` the product is asked to carry its sums on in fp32. On a CPU the same operands are
multiplied in fp32: slow, for tests.

So the bound is kept for tokens whose largest magnitude is at most 2^12 times the root mean square
of the others, whatever the weight is; beyond that, where the largest channel reaches the output as
the others do. A weight that all but ignores a channel of 1e5 times the others is what it excludes:
there the scale of the token is that of numbers which do not count, and the error can be a tenth.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from loraq.errors import KernelError
from loraq.formats import BlockFormat, Format, get_format
from loraq.formats.element import E4M3
from loraq.formats.scale_rules import LARGEST
from loraq.formats.scales import SMALLEST_SCALE, view_bytes
from loraq.kernels.base import (
    Backend,
    decode_factors,
    decode_one,
    finish,
    flatten_tokens,
    pass_straight_through,
)
from loraq.packed import PackedWeight
from loraq.scheme import Scheme

#: Sums of more products than this are carried on in fp32: they would shrink by more than 0.3 %.
LONGEST_FAST_SUM = 4608


class Fp8Operands(NamedTuple):
    """What `fp8_row` keeps."""

    #: (out, in), e4m3.
    codes: Tensor
    #: (out,), fp32; multiplies.
    scale: Tensor
    #: proj_down and proj_up in bf16, or `None`.
    factors: tuple[Tensor, Tensor] | None


class Fp8Row(Backend):
    """Row-wise scaled e4m3 matrix products."""

    name = "fp8_row"
    keeps_operands = True

    def refusal(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        """Return why a layer (out, in) cannot run here, judged without its values, or `None`."""
        for kind, fmt in (
            ("weight", scheme.weight_format),
            ("activation", scheme.activation_format),
        ):
            if not _may_fit(fmt):
                return f"its {kind} format '{fmt.name}' does not fit e4m3 with one scale a row"
        if device.type in ("cpu", "meta"):
            return None
        if device.type != "cuda" or torch.version.hip is not None:
            return "row-wise e4m3 products are known on NVIDIA GPUs (and, emulated, on the CPU)"
        if (capability := torch.cuda.get_device_capability(device)) < (8, 9):
            major, minor = capability
            return f"FP8 needs compute capability 8.9 or more, this GPU has {major}.{minor}"
        return (
            f"its sizes {shape} are not all multiples of 16"
            if any(size % 16 for size in shape)
            else None
        )

    def bound(self, scheme: Scheme, dtype: torch.dtype) -> float:
        """Return the bound of bf16 outputs and of sums in 13 bits."""
        return 2e-2

    def prepare(self, packed: PackedWeight, scheme: Scheme, dtype: torch.dtype) -> Fp8Operands:
        """Return e4m3 rows, shared by all dtypes.

        Raises:
            KernelError: the block scales of a row are too far apart to be folded exactly.
        """
        main = packed.main
        if main.scale is not None and _is_fp8_row(main.format):
            codes = main.packed.view(torch.float8_e4m3fn)
            scale = view_bytes(main.scale, torch.float32)
        else:
            dense = decode_one(main, torch.float32)
            codes, scale = fold(dense)
            if lost := int((codes.float() * scale != dense).any(-1).sum()):
                raise KernelError(
                    f"{lost} of {len(dense)} rows of the weight in '{main.format.name}' do not fit "
                    "e4m3 exactly: its values are too far apart. Use the back end 'resident'."
                )
        return Fp8Operands(codes, scale.view(-1), decode_factors(packed.branch))

    def linear(
        self, x: Tensor, operands: Fp8Operands, scheme: Scheme, bias: Tensor | None
    ) -> Tensor:
        """Return y (…, out) in the dtype of x (…, in)."""
        codes, scale, factors = operands
        y = _fp8_linear(flatten_tokens(x), codes, scale, scheme.activation)
        return finish(y, x, scheme, factors, bias)


def sums_fast(n_in: int) -> bool:
    """Whether a sum of so many products may stay in the 13 bits of Hopper's FP8 units."""
    return n_in <= LONGEST_FAST_SUM


def fold(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 codes and power-of-two scales (rows, 1) of fp32 rows.

    The largest value of a row is in e4m3's top binade.
    """
    mantissa, exponent = torch.frexp(rows.abs().amax(-1, keepdim=True))
    # largest = mantissa 2^exponent, and 448 = 0.875 2^9.
    exponent = (exponent - 9 + (mantissa > 0.875)).clamp_(-126, 118)
    scale = ((exponent + 127) << 23).view(torch.float32)
    return _to_e4m3(rows / scale), scale


def encode_tokens(x: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Return e4m3 codes and scales (tokens, 1) of an activation in its format."""
    if not _is_fp8_row(fmt):
        return fold(fmt.round(x))
    scale = x.abs().amax(-1, keepdim=True).float().clamp_(max=LARGEST).mul_(1 / E4M3.max)
    codes = _to_e4m3(x.float() / scale.clamp(min=SMALLEST_SCALE))
    return codes, scale.masked_fill_(scale < SMALLEST_SCALE, 0.0)


def _to_e4m3(values: Tensor) -> Tensor:
    return values.clamp_(-E4M3.max, E4M3.max).to(torch.float8_e4m3fn)  # not every torch saturates


def _is_fp8_row(fmt: Format) -> bool:
    return isinstance(fmt, BlockFormat) and fmt.element is E4M3 and fmt.block_size is None


def _may_fit(fmt: Format) -> bool:
    """Whether e4m3 can hold the values: 4 significant bits, scales of powers of two or of rows."""
    if not isinstance(fmt, BlockFormat):
        return False
    significant = fmt.element.mantissa_bits + 1 if fmt.element.is_float else fmt.bits - 1
    return _is_fp8_row(fmt) or (
        fmt.scale_format.is_power_of_two and significant <= E4M3.mantissa_bits + 1
    )


# Opaque, like `loraq::round`: the rounding inside must not be fused away.
@library.custom_op("loraq::fp8_linear", mutates_args=())
def _fp8_linear(x: Tensor, codes: Tensor, scale: Tensor, activation: str) -> Tensor:
    fmt = get_format(activation).for_rows()
    assert isinstance(fmt, BlockFormat)
    tokens, token_scale = encode_tokens(x, fmt)
    if x.device.type == "cpu":
        return ((tokens.float() @ codes.float().t()) * token_scale * scale).bfloat16()
    return torch._scaled_mm(
        tokens,
        codes.t(),
        scale_a=token_scale,
        scale_b=scale[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=sums_fast(codes.shape[1]),
    )


@_fp8_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, activation: str) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=torch.bfloat16)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(codes, scale)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return pass_straight_through(gradient, ctx.saved_tensors, None, ctx.dtype), None, None, None


_fp8_linear.register_autograd(_backward, setup_context=_save)
