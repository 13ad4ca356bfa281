"""Round to nearest: the floor that every other method must beat."""

from dataclasses import dataclass

from torch import Tensor

from loraq.formats.scale_rules import RuleName
from loraq.methods.base import Method, register
from loraq.methods.fits import Fit, round_plainly
from loraq.scheme import Scheme
from loraq.stats import ActivationStats


@register
@dataclass(frozen=True)
class RTN(Method):
    """Round every weight to its nearest code; no branch."""

    name = "rtn"
    summary = "round to nearest, no branch"
    branch = "none"

    #: Scale rule of the weight; `None` is the direct rule of the format ("floor" or "absmax").
    scale_rule: RuleName | None = "search"

    def _fit(self, weight: Tensor, scheme: Scheme, seed: int, stats: ActivationStats | None) -> Fit:
        return round_plainly(weight, scheme, self.scale_rule)._replace(is_final=True)
