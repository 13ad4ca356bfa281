"""The named formats with what was found for each, and the one place that turns a name into one.

A new format is one entry of `FORMATS`: its layout, the factors that its scale rules use, and the
activations that a recipe's name means by "-a4" and "-a8" beside it.
"""

import re
from dataclasses import replace
from typing import TypeGuard

import torch

from loraq.errors import FormatError, unknown
from loraq.formats.block import BlockFormat, Format
from loraq.formats.cast import CastFormat
from loraq.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2, integer, mx_integer
from loraq.formats.scale_rules import ScaleFit
from loraq.formats.scales import BF16_SCALE, E4M3_SCALE, E8M0_SCALE, FP32_SCALE

# Activations of the main path, by their bits, beside a main weight of each kind.
_INT = {4: "int4", 8: "int8"}
_MXINT = {4: "mxint4", 8: "mxint8"}
# Half the output error of mxfp8_e4m3 (docs/log.md), which -amxfp8_e4m3 asks for.
_MXFP = {4: "mxfp4", 8: "mxint8"}
_NVFP = {4: "nvfp4", 8: "mxint8"}
_FP8 = {4: "mxfp4", 8: "fp8_e4m3"}

#: For 4-bit activations, for which a rotation lowers the velocity error of the digits model; NVFP4,
#: whose blocks are small and whose scales are fine, loses by it. Sides from 16 to 128 do as well as
#: each other (`benchmarks/quality/tables.py`).
_ROTATION = 32

# The factors of each `fit` are those with the least error, measured by
# `benchmarks/quality/scale_rules.py`.

# For int4 the factor 1.0 is left out of the solver's rule on purpose: alone it would help, but in
# the solver's loop the block maximum then sets the scale again, every step moves it, and the
# annealing does not cool (docs/log.md). The constants are for activations, signed: at 0.875 the
# largest value of a block reaches the lowest code of int4 without clipping; 0.84 rounds a Gaussian
# best and 0.86 leaves the digits transformer with the least error.
_INT_FORMATS = (
    BlockFormat(
        "int4",
        integer(4),
        BF16_SCALE,
        64,
        fit=ScaleFit(0.85, factors=(0.78,), least_squares=3),
        activations=_INT,
        rotation=_ROTATION,
    ),
    BlockFormat(
        "int5",
        integer(5),
        BF16_SCALE,
        64,
        fit=ScaleFit(0.92, factors=(0.95, 0.87), least_squares=1),
        activations=_INT,
    ),
    BlockFormat(
        "int6",
        integer(6),
        BF16_SCALE,
        64,
        fit=ScaleFit(0.97, factors=(0.98, 0.9), least_squares=1),
        activations=_INT,
    ),
    BlockFormat("int8", integer(8), FP32_SCALE, None, activations=_INT),
)

# A power-of-two scale has one useful neighbour: integers gain from clipping, floats from headroom,
# because only floats have finer small steps.
_MX_FORMATS = (
    BlockFormat(
        "mxint4",
        mx_integer(4),
        E8M0_SCALE,
        32,
        fit=ScaleFit(0.85),
        activations=_MXINT,
        rotation=_ROTATION,
    ),
    BlockFormat("mxint6", mx_integer(6), E8M0_SCALE, 32, fit=ScaleFit(0.95), activations=_MXINT),
    BlockFormat("mxint8", mx_integer(8), E8M0_SCALE, 32, fit=ScaleFit(0.99), activations=_MXINT),
    BlockFormat(
        "mxfp4", E2M1, E8M0_SCALE, 32, fit=ScaleFit(1.10), activations=_MXFP, rotation=_ROTATION
    ),
    BlockFormat("mxfp6_e2m3", E2M3, E8M0_SCALE, 32, fit=ScaleFit(1.02), activations=_MXFP),
    BlockFormat("mxfp6_e3m2", E3M2, E8M0_SCALE, 32, fit=ScaleFit(1.14), activations=_MXFP),
    BlockFormat("mxfp8_e4m3", E4M3, E8M0_SCALE, 32, fit=ScaleFit(1.14), activations=_MXFP),
    BlockFormat("mxfp8_e5m2", E5M2, E8M0_SCALE, 32, fit=ScaleFit(1.14), activations=_MXFP),
)

_FP_FORMATS = (
    BlockFormat(
        "nvfp4",
        E2M1,
        E4M3_SCALE,
        16,
        fit=ScaleFit(factors=(1.0, 0.93, 1.42), least_squares=1),
        activations=_NVFP,
    ),
    BlockFormat("fp8_e4m3", E4M3, FP32_SCALE, None, activations=_FP8),
)

_CAST_FORMATS = (CastFormat("bf16", torch.bfloat16), CastFormat("fp16", torch.float16))

#: Every named format. Sources: OCP MX v1.0 (mx*), NVIDIA NVFP4 (nvfp4), SVDQuant, arXiv 2411.05007
#: (int4).
FORMATS: dict[str, Format] = {
    fmt.name: fmt for fmt in (*_INT_FORMATS, *_MX_FORMATS, *_FP_FORMATS, *_CAST_FORMATS)
}

#: Formats of imported weights: scales of rows, or of columns, stand above the block scales.
_INT4, _NVFP4 = _INT_FORMATS[0], _FP_FORMATS[0]
_IMPORTED = {
    fmt.name: fmt
    for fmt in (
        replace(_INT4, name="int4_columns", of_columns=True),
        replace(_NVFP4, name="nvfp4_rows", of_rows=True),
        replace(_NVFP4, name="nvfp4_columns", of_columns=True),
        replace(_NVFP4, name="nvfp4_rows_columns", of_rows=True, of_columns=True),
    )
}

_BLOCK_SUFFIX = re.compile(r"(?P<base>.+)_b(?P<size>[0-9]{1,9})")


def get_format(name: str | Format) -> Format:
    """Return a format by name.

    A suffix `_b<size>` sets another block size of a plain integer, as in "int8_b64". With it,
    `int8` takes bf16 block scales instead of one fp32 scale for each row. Imported weights have a
    few more: in "nvfp4_rows" each row has a global scale of its own, and in "int4_columns" each
    column a scale above the block scales.

    Raises:
        FormatError: the name is unknown, or the block size is not possible.
    """
    if isinstance(name, BlockFormat | CastFormat):
        return name
    if not isinstance(name, str):
        raise FormatError(
            f"A number format is a name such as 'mxfp4', not {name!r}. `loraq formats` lists them."
        )
    if name in FORMATS:
        return FORMATS[name]
    if name in _IMPORTED:
        return _IMPORTED[name]
    match = _BLOCK_SUFFIX.fullmatch(name)
    base = FORMATS.get(match["base"]) if match else None
    if match is None or base is None:
        raise FormatError(unknown("number format", name, FORMATS))
    size = int(match["size"])
    if not _has_free_block_size(base):
        *names, last = (known for known, fmt in FORMATS.items() if _has_free_block_size(fmt))
        raise FormatError(
            f"Format '{match['base']}' has a fixed block size. A suffix '_b{size}' is for "
            f"{', '.join(names)} and {last}."
        )
    if size < 8 or size % 8:
        raise FormatError(
            f"Block size {size} of '{name}' is not a multiple of 8. Use "
            f"'{match['base']}_b{max(8, size // 8 * 8)}'."
        )
    # The rotation was measured with the block size of the named format only.
    return replace(base, name=name, block_size=size, scale_format=BF16_SCALE, rotation=0)


def _has_free_block_size(fmt: Format) -> TypeGuard[BlockFormat]:
    """Whether a format is a plain integer, whose block size no standard settles."""
    return isinstance(fmt, BlockFormat) and not (
        fmt.element.is_float or fmt.scale_format.is_power_of_two
    )


def is_format(name: str) -> bool:
    """Return whether `get_format` understands a name."""
    try:
        get_format(name)
    except FormatError:
        return False
    return True
