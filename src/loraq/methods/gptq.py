"""GPTQ: round one input channel after the other, the others make up for its error.

GPTQ, arXiv 2210.17323. Beside a branch it rounds what the branch leaves, as SVDQuant,
arXiv 2411.05007, does with its option "gptq".
"""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from loraq.formats.scale_rules import RuleName
from loraq.methods.base import Method, register
from loraq.methods.fits import Fit, quantize_branch, round_plainly
from loraq.methods.inputs import Inputs
from loraq.methods.refit import Turns
from loraq.methods.svdquant import Alternation
from loraq.options import Range
from loraq.scheme import Scheme
from loraq.stats import ActivationStats


@register
@dataclass(frozen=True)
class GPTQ(Method):
    """Round with error feedback through the second moment; a branch is SVDQuant's.

    It is one-shot unless `rounds` says otherwise. Without a branch the method
    rounds all of the weight. `metrics` holds "output_error".
    """

    name = "gptq"
    summary = "rounding with error feedback, given statistics; the branch, if any, is SVDQuant's"
    branch = "optional"
    use_of_stats = "required"

    #: What is added to the diagonal of the second moment, as a share of its mean.
    damping: Annotated[float, Range(0, 1e9)] = 0.01
    #: Scale rule of weight and factors; `None` is the direct rule of each format.
    scale_rule: RuleName | None = "search"
    #: With a branch: as in `SVDQuant`.
    rounds: Annotated[int, Range(1, 1_000_000)] = 1
    patience: Annotated[int, Range(1, 1_000_000)] = 5
    rotate: bool = False
    #: Whether noise of rounded activations is filtered, as LoRaQ does; see `Inputs.round`.
    noise_filter: bool = False
    #: With a branch: as in `LoRaQ`; the best is kept.
    refits: Annotated[int, Range(0, 1000)] = 0

    @property
    def needs_full_moment(self) -> bool:
        """Whether the method needs E[x xᵀ], not only E[x²]: always."""
        return True

    def _fit(self, weight: Tensor, scheme: Scheme, seed: int, stats: ActivationStats | None) -> Fit:
        assert stats is not None
        branch, main = scheme.branch, scheme.weight_format
        activation = scheme.activation_format if self.noise_filter else None
        inputs = Inputs(stats, self.damping, activation)
        if branch is None:
            fit = Fit(inputs.round(weight, main, self.scale_rule))
        else:
            factors, _ = Alternation(
                branch, self.rounds, self.patience, self.scale_rule, self.rotate
            ).run(weight, main, seed)
            fitted = quantize_branch(*factors, branch, self.scale_rule)
            stored = inputs.round(fitted.subtract_from(weight), main, self.scale_rule)
            fit = Fit(stored, fitted)
            turns = Turns(branch, self.refits, self.scale_rule, self.rotate, seed)
            for refitted, answer in turns.take(weight, stored, inputs):
                fit = inputs.choose(weight, fit, Fit(answer, refitted))
        if not self.noise_filter:
            return fit
        # Without noise plain rounding may be nearer than what noise was filtered out of.
        plain = round_plainly(weight, scheme, self.scale_rule)
        return inputs.choose(weight, fit, plain)._replace(is_final=True)
