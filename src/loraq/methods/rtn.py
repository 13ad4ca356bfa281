"""Round to nearest: the floor that every other method must beat."""

import time
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from loraq.errors import SchemeError
from loraq.methods.base import prepare, relative_error
from loraq.packed import LayerSolution, PackedWeight
from loraq.scheme import Scheme
from loraq.stats import ActivationStats


@dataclass(frozen=True)
class RTN:
    """Round every weight to its nearest code; no branch."""

    use_of_stats: ClassVar[str] = "ignored"
    needs_full_moment: ClassVar[bool] = False

    #: Scale rule of the weight; `None` is the direct rule of the format ("floor" or "absmax").
    scale_rule: str | None = "search"

    def solve(
        self,
        weight: Float[Tensor, "out in"],
        scheme: Scheme,
        *,
        seed: int = 0,
        stats: ActivationStats | None = None,
    ) -> LayerSolution:
        """Round the weight; statistics are ignored. See `Method.solve`."""
        begin = time.perf_counter()
        if scheme.branch is not None:
            raise SchemeError(
                "Method 'rtn' has no branch, but the scheme asks for one. Remove the branch."
            )
        weight = prepare(weight, scheme)
        residual = scheme.weight_format.quantize(weight, self.scale_rule)
        error = relative_error(weight, residual, None)
        return LayerSolution(PackedWeight(scheme, residual), error, time.perf_counter() - begin)
