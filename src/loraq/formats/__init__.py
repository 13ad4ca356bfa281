"""How a number is stored: scalar elements, packed bytes, shared scales, and the named formats."""

from loraq.formats.block import BlockFormat, CastFormat, Format, QTensor
from loraq.formats.element import ElementFormat
from loraq.formats.presets import FORMATS, get_format, is_format
from loraq.formats.scales import ScaleFormat, ScaleRule

__all__ = [
    "FORMATS",
    "BlockFormat",
    "CastFormat",
    "ElementFormat",
    "Format",
    "QTensor",
    "ScaleFormat",
    "ScaleRule",
    "get_format",
    "is_format",
]
