"""What methods take and give: a prepared weight, a fit of it, and the fit as it is stored.

A weight at the ends of fp32 is divided by a power of two before it is solved, because its squares
would leave fp32, and its fit is multiplied by it; no digit changes.

So it is with rows where statistics say that errors of some outputs move the model more than errors
of others: each row is multiplied by a power of two, so that a method that lowers the error of all
counts it as much, and its fit is divided by it. Rounding does not see it, the branch does.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from loraq.autocast import without_autocast
from loraq.errors import FormatError
from loraq.formats import BlockFormat, Format, QTensor
from loraq.formats.faults import find_fault
from loraq.formats.powers import powers_of_two, times_power_of_two
from loraq.linalg import as_doubles, frobenius
from loraq.methods.smoothing import HARDLY_THERE, choose_factors
from loraq.packed import LowRankBranch, PackedWeight
from loraq.scheme import Branch, Scheme
from loraq.stats import ActivationStats
from loraq.transforms import rotate, smooth, unrotate, unsmooth

#: Weights whose largest magnitude is within 2^±40 are solved as they are: sums of their squares
#: stay far inside fp32.
_USUAL_EXPONENTS = 40
#: Rows are multiplied by the power of two nearest to (sensitivity of the output)^this. Errors of
#: outputs would count exactly with ½; what is left at the end of the model is less with ¼ beside
#: 4-bit activations, and as little beside others (docs/log.md, 2026-11-30).
_ROW_POWER = 0.25


class Fit(NamedTuple):
    """What a method makes of a prepared weight."""

    #: The main weight, (out, in).
    main: QTensor
    branch: LowRankBranch | None = None
    #: What else was measured, by name.
    metrics: Mapping[str, float] = {}
    #: Whether the method has compared it with plain rounding already, in a measure of its own.
    is_final: bool = False


class Prepared(NamedTuple):
    """A weight as methods see it."""

    #: Smoothed and rotated as the scheme says and divided by 2^exponent, contiguous fp32.
    weight: Float[Tensor, "out in"]
    #: 0 unless squares of the weight would leave fp32.
    exponent: int
    #: Codes of the smoothing factors, if the scheme asks for any.
    smooth_factor: UInt8[Tensor, " in"] | None = None
    #: Rows of `weight` are multiplied by two to the power of these, if outputs count differently.
    row_exponents: Int[Tensor, " out"] | None = None

    def norm(self, matrix: Float[Tensor, "out in"], rotation: int) -> float:
        """Return ‖M‖ of a matrix in the rows and channels that the weight came with."""
        if self.smooth_factor is not None:
            matrix = smooth(unrotate(matrix, rotation), self.smooth_factor)
        if self.row_exponents is None:
            return frobenius(matrix).item()
        rows = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64)
        return (rows * powers_of_two(-self.row_exponents)[:, 0]).norm().item()

    def output_error(self, error: Float[Tensor, "out in"], stats: ActivationStats) -> float:
        """Return √(E‖x Eᵀ‖² / E‖x Wᵀ‖²) of an error E of the weight W, all outputs alike."""
        assert self.row_exponents is not None, "else it is the root of what fits are compared by"
        alike = powers_of_two(-2 * self.row_exponents)[:, 0]
        lost, whole = (
            max(0.0, (stats.output_energies(matrix, torch.float64) @ alike).item())
            for matrix in (error, self.weight)
        )
        return (lost / (whole or 1.0)) ** 0.5


def prepare_weight(
    weight: Tensor, scheme: Scheme, stats: ActivationStats | None = None
) -> Prepared:
    """Return a weight as methods see it.

    Args:
        weight: (out, in).
        scheme: what is asked of it.
        stats: of its inputs, for a scheme that smooths them; and of its outputs, by which rows are
            multiplied.

    Raises:
        CalibrationError: the scheme smooths the input, and there are no statistics, or they are of
            another layer.
        FormatError: it is not a float weight of 16 bits or more, is not loaded, or fp32 does not
            hold it.
        SchemeError: the scheme does not fit its shape.
    """
    scheme.check(tuple(weight.shape))
    if weight.is_meta or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        kind = "on the meta device" if weight.is_meta else f"of {weight.dtype}"
        raise FormatError(
            f"Cannot quantize to '{scheme.weight}': the weight is {kind}. Loaded float weights of "
            "16 bits or more are required."
        )
    if fault := find_fault(weight):
        raise FormatError(f"Cannot quantize to '{scheme.weight}': {fault}")
    weight = weight.detach()
    least, most = weight.aminmax()
    _, exponent = math.frexp(max(-least.item(), most.item()))
    if abs(exponent) <= _USUAL_EXPONENTS:
        exponent = 0
    else:  # a power of two changes no digit
        weight = weight.double() * 2.0**-exponent
    with without_autocast(weight.device):
        codes = choose_factors(weight, scheme, stats) if scheme.smoothing else None
        smoothed = unsmooth(weight.float(), codes)
        prepared = rotate(smoothed, scheme.rotation).contiguous()
        rows = None if exponent else _weigh_rows(scheme, stats, len(weight))
        if rows is not None:
            rows = rows.to(weight.device)
            prepared = prepared * powers_of_two(rows).float()
        return Prepared(prepared, exponent, codes, rows)


def _weigh_rows(
    scheme: Scheme, stats: ActivationStats | None, n_out: int
) -> Int[Tensor, " out"] | None:
    """Return what rows are multiplied by, as exponents of two; `None` if outputs count alike.

    So they do without a branch, which is all that feels it, and where a format cannot be divided
    again row by row: NVFP4 has one scale above those of all blocks, fp16 too few exponents.
    """
    if stats is None or stats.output_sensitivity is None:
        return None
    stats.require_outputs(n_out)
    branch = scheme.branch
    if branch is None or not all(map(_has_rows, (scheme.weight_format, branch.weight_format))):
        return None
    return choose_row_exponents(stats.output_sensitivity)


def _has_rows(fmt: Format) -> bool:
    """Whether each row of a format can be multiplied by a power of two of its own."""
    if isinstance(fmt, BlockFormat):
        return "global_scale" not in fmt.storage((2, 2))
    return fmt.name == "bf16"


def choose_row_exponents(sensitivity: Float[Tensor, " out"]) -> Int[Tensor, " out"]:
    """Return what rows are multiplied by, as exponents of two, by the sensitivity of outputs."""
    wide = sensitivity.double()
    floor = max(HARDLY_THERE * wide.mean().item(), torch.finfo(torch.float64).tiny)
    octaves = _ROW_POWER * wide.clamp(min=floor).log2()
    return (octaves - octaves.mean()).round().int()


def round_plainly(weight: Float[Tensor, "out in"], scheme: Scheme, rule: str | None) -> Fit:
    """Return a prepared weight rounded to nearest, beside a branch of zeros if there is one."""
    main = scheme.weight_format.quantize(weight, rule)
    if scheme.branch is None:
        return Fit(main)
    up, down = (
        weight.new_zeros(shape)
        for shape in ((len(weight), scheme.branch.rank), (scheme.branch.rank, weight.shape[1]))
    )
    return Fit(main, quantize_branch(up, down, scheme.branch, rule))


class Stored(NamedTuple):
    """A fit as it is stored, and what it leaves of the weight."""

    main: QTensor
    branch: LowRankBranch | None
    #: ‖W − Ŵ‖ / ‖W‖; the absolute error if W is zero.
    relative_error: float
    #: What fits are compared by: squared output error with statistics, else the relative error.
    cost: float
    metrics: Mapping[str, float]
    #: Whether it is the fit times a power of two, with nothing rounded anew.
    is_exact: bool = True

    @classmethod
    def of(
        cls, fit: Fit, prepared: Prepared, scheme: Scheme, stats: ActivationStats | None
    ) -> "Stored":
        """Multiply a fit of a prepared weight by its powers of two, and measure it.

        Raises:
            FormatError: the formats do not hold the result.
        """
        weight, exponent = prepared.weight, prepared.exponent
        main, branch = fit.main, fit.branch
        # Before there is an error as large as the weight.
        norm = prepared.norm(weight, scheme.rotation) or 1.0
        error = as_doubles(
            (len(weight), weight.shape[1]),
            weight.device,
            lambda room: _subtract(weight, main, branch, out=room),
        )
        is_exact = True
        if exponent:
            main, branch = _multiply(main, branch, exponent)
            if not PackedWeight(scheme, main, branch).reconstruct().isfinite().all():
                raise FormatError(
                    f"What '{scheme.weight}' stores of this weight leaves the range of fp32. Scale "
                    "the weight down, or keep this layer in floats."
                )
            fitted, error = error.float(), (weight - _divide(main, branch, exponent)).float()
            is_exact = torch.allclose(error, fitted, rtol=0, atol=1e-6)
        if prepared.row_exponents is not None:  # what a scale cannot hold then is next to nothing
            main, branch = _divide_rows(main, branch, prepared.row_exponents)
        relative_error = prepared.norm(error, scheme.rotation) / norm
        if stats is None:
            return cls(main, branch, relative_error, relative_error, fit.metrics, is_exact)
        # With mean squares alone it is that of uncorrelated channels.
        cost = stats.output_energy(error, torch.float64)
        if prepared.row_exponents is None:
            whole = stats.output_energy(weight, torch.float64) or 1.0
            metrics = {"output_error": (cost / whole) ** 0.5, **fit.metrics}
        else:  # a method's own is that of the rows as they count
            metrics = {**fit.metrics, "output_error": prepared.output_error(error, stats)}
        return cls(main, branch, relative_error, cost, metrics, is_exact)

    def require_content(self, prepared: Prepared, scheme: Scheme) -> "Stored":
        """Return itself.

        Raises:
            FormatError: what is stored is not finite, or nothing of the weight is left in it.
        """
        if self.relative_error < 1 or not prepared.weight.any():
            return self
        largest = prepared.weight.abs().max().item() * 2.0**prepared.exponent
        raise FormatError(
            f"'{scheme.weight}' stores nothing of this weight (relative error "
            f"{self.relative_error:.3g}): its largest magnitude is {largest:.3g}, for which the "
            "format has no scale. Scale the weight, or keep this layer in floats."
        )


def _subtract(weight: Tensor, main: QTensor, branch: LowRankBranch | None, *, out: Tensor) -> None:
    """Write weight − main − U D; the main weight is decoded a few rows at a time."""
    if branch is None:
        out.zero_()
    else:
        branch.reconstruct(out=out)
    for part, rows in main.decode_rows():
        out[part] = (weight[part] - rows).sub_(out[part])


def quantize_branch(up: Tensor, down: Tensor, branch: Branch, rule: str | None) -> LowRankBranch:
    """Return both factors in the branch's format."""
    fmt = branch.weight_format
    return LowRankBranch(proj_up=fmt.quantize(up, rule), proj_down=fmt.quantize(down, rule))


def _multiply(
    main: QTensor, branch: LowRankBranch | None, exponent: int
) -> tuple[QTensor, LowRankBranch | None]:
    """Return main weight and branch times 2^exponent, which both factors share."""
    main, half = times_power_of_two(main, exponent), exponent // 2
    if branch is None:
        return main, None
    up = times_power_of_two(branch.proj_up, half)
    down = times_power_of_two(branch.proj_down, exponent - half)
    return main, LowRankBranch(proj_up=up, proj_down=down)


def _divide_rows(
    main: QTensor, branch: LowRankBranch | None, exponents: Int[Tensor, " out"]
) -> tuple[QTensor, LowRankBranch | None]:
    """Return main weight and branch with each row divided by its power of two."""
    main = times_power_of_two(main, -exponents)
    if branch is None:
        return main, None
    return main, replace(branch, proj_up=times_power_of_two(branch.proj_up, -exponents))


def _divide(main: QTensor, branch: LowRankBranch | None, exponent: int) -> Float[Tensor, "out in"]:
    """Return the dense form of what `_multiply` returns, without the power again, in fp64."""
    dense = main.dequantize().double() * 2.0**-exponent
    if branch is None:
        return dense
    up, down = branch.proj_up.dequantize().double(), branch.proj_down.dequantize().double()
    return dense + (up * 2.0 ** -(exponent // 2)) @ (down * 2.0 ** (exponent // 2 - exponent))
