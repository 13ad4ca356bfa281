"""How a number is stored: scalar elements, packed bytes, shared scales, and the named formats."""

from loraq.formats.block import BlockFormat, Format, QTensor
from loraq.formats.cast import CastFormat
from loraq.formats.element import ElementFormat
from loraq.formats.fixed_scales import FixedScales
from loraq.formats.presets import FORMATS, get_format, is_format
from loraq.formats.scale_rules import ScaleFit, ScaleRule
from loraq.formats.scales import ScaleFormat

__all__ = [
    "FORMATS",
    "BlockFormat",
    "CastFormat",
    "ElementFormat",
    "FixedScales",
    "Format",
    "QTensor",
    "ScaleFit",
    "ScaleFormat",
    "ScaleRule",
    "get_format",
    "is_format",
]
