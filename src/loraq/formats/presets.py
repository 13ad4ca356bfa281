"""The named formats, and the one place that turns a name into a format."""

import re
from dataclasses import replace

import torch

from loraq.errors import FormatError, unknown
from loraq.formats.block import BlockFormat, CastFormat, Format
from loraq.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2, integer, mx_integer
from loraq.formats.scales import BF16_SCALE, E4M3_SCALE, E8M0_SCALE, FP32_SCALE

#: Every named format. Sources: OCP MX v1.0 (mx*), NVIDIA NVFP4 (nvfp4), SVDQuant, arXiv 2411.05007
#: (int4).
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        BlockFormat("int4", integer(4), BF16_SCALE, 64),
        BlockFormat("int5", integer(5), BF16_SCALE, 64),
        BlockFormat("int6", integer(6), BF16_SCALE, 64),
        BlockFormat("int8", integer(8), FP32_SCALE, None),
        BlockFormat("mxint4", mx_integer(4), E8M0_SCALE, 32),
        BlockFormat("mxint6", mx_integer(6), E8M0_SCALE, 32),
        BlockFormat("mxint8", mx_integer(8), E8M0_SCALE, 32),
        BlockFormat("mxfp4", E2M1, E8M0_SCALE, 32),
        BlockFormat("mxfp6_e2m3", E2M3, E8M0_SCALE, 32),
        BlockFormat("mxfp6_e3m2", E3M2, E8M0_SCALE, 32),
        BlockFormat("mxfp8_e4m3", E4M3, E8M0_SCALE, 32),
        BlockFormat("mxfp8_e5m2", E5M2, E8M0_SCALE, 32),
        BlockFormat("nvfp4", E2M1, E4M3_SCALE, 16),
        BlockFormat("fp8_e4m3", E4M3, FP32_SCALE, None),
        CastFormat("bf16", torch.bfloat16),
        CastFormat("fp16", torch.float16),
    )
}

_BLOCK_SUFFIX = re.compile(r"(?P<base>.+)_b(?P<size>\d+)")


def get_format(name: str | Format) -> Format:
    """Return a format by name; `_b<size>` after an integer's name sets another block size, as in "int8_b64".

    With a block size, `int8` takes bf16 block scales instead of one fp32 scale for each row.

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
    match = _BLOCK_SUFFIX.fullmatch(name)
    base = FORMATS.get(match["base"]) if match else None
    if match is None or base is None:
        raise FormatError(unknown("number format", name, FORMATS))
    size = int(match["size"])
    if (
        not isinstance(base, BlockFormat)
        or base.element.is_float
        or base.scale_format.is_power_of_two
    ):
        raise FormatError(
            f"Format '{match['base']}' has a fixed block size. A suffix '_b{size}' is for int4, "
            f"int5, int6 and int8."
        )
    if size < 8 or size % 8:
        raise FormatError(
            f"Block size {size} of '{name}' is not a multiple of 8. Use "
            f"'{match['base']}_b{max(8, size // 8 * 8)}'."
        )
    return replace(base, name=name, block_size=size, scale_format=BF16_SCALE)


def is_format(name: str) -> bool:
    """Return whether `get_format` understands a name."""
    try:
        get_format(name)
    except FormatError:
        return False
    return True
