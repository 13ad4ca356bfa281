"""SVDQuant without data: the branch is the truncated SVD of the weight, one-shot or alternated.

SVDQuant, arXiv 2411.05007, section 4.2; the alternation is the one of its reference implementation
(and of LoftQ, arXiv 2310.08659, algorithm 1, but started from the weight). Smoothing needs
activations and is not used.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from loraq.formats import Format
from loraq.formats.scale_rules import RuleName
from loraq.linalg import as_doubles, frobenius, truncated_svd
from loraq.methods.base import Method, register
from loraq.methods.descent import Factors, spread
from loraq.methods.expected import ExpectedInputs
from loraq.methods.fits import Fit, quantize_branch, round_plainly
from loraq.options import Range
from loraq.scheme import Branch, Scheme
from loraq.stats import ActivationStats


@register
@dataclass(frozen=True)
class SVDQuant(Method):
    """Keep the leading singular directions in the branch and round what is left.

    The branch is rounded to its format before the rest is formed, so that the main weight absorbs
    its rounding.
    """

    name = "svdquant"
    summary = "truncated SVD of the weight, rounding of the rest"

    #: Number of (SVD, round) alternations; 1 is one-shot. The best round is kept.
    rounds: Annotated[int, Range(1, 1_000_000)] = 1
    #: Rounds without improvement after which the alternation stops.
    patience: Annotated[int, Range(1, 1_000_000)] = 5
    #: Scale rule of weight and factors; `None` is the direct rule of each format.
    scale_rule: RuleName | None = "search"
    #: Whether the factors are rotated in rank space, as LoRaQ's are; see `spread`.
    rotate: bool = False
    #: What inputs are expected to be when the rest is rounded, as `LoRaQ.input_prior`.
    input_prior: Annotated[float, Range(0, 1000)] = 0.0

    def _fit(self, weight: Tensor, scheme: Scheme, seed: int, stats: ActivationStats | None) -> Fit:
        branch, main = self._require_branch(scheme), scheme.weight_format
        factors, used = Alternation(
            branch, self.rounds, self.patience, self.scale_rule, self.rotate
        ).run(weight, main, seed)
        fitted = quantize_branch(*factors, branch, self.scale_rule)
        left, metrics = fitted.subtract_from(weight), {"rounds": float(used)}
        if not self.input_prior:
            return Fit(main.quantize(left, self.scale_rule), fitted, metrics)
        svd = truncated_svd(weight, branch.rank, seed=seed)
        inputs = ExpectedInputs.of(weight, svd, self.input_prior, scheme.activation_format)
        fit = Fit(inputs.round(left, main, self.scale_rule), fitted)
        plain = round_plainly(weight, scheme, self.scale_rule)
        return inputs.choose(weight, fit, plain)._replace(metrics=metrics, is_final=True)


class Alternation(NamedTuple):
    """Truncated SVD of what rounding leaves, rounding of what the SVD leaves, in turn."""

    branch: Branch
    #: As in `SVDQuant`.
    rounds: int
    patience: int
    scale_rule: RuleName | None
    rotate: bool

    def run(self, weight: Tensor, main: Format, seed: int) -> tuple[Factors, int]:
        """Return the factors of the best round, before their rounding, and the number of rounds."""
        factor, rule = self.branch.weight_format, self.scale_rule
        best, best_error, best_round = None, torch.inf, 0
        target, start, left = weight, None, torch.empty_like(weight)
        for t in range(self.rounds):
            iterations = 2 if t else 8  # later rounds begin with the directions of the last one
            svd = truncated_svd(
                target, self.branch.rank, seed=seed, iterations=iterations, start=start
            )
            start = svd.right.mT
            factors = Factors(*svd.to_canonical())
            if self.rotate:
                factors = spread(Factors(*svd.to_balanced()), seed)
            seen = Factors(*(factor.round(each, rule) for each in factors))
            # The SVD has done with the target, which is in the same memory.
            error = frobenius(_round_rest(weight, seen, main, rule, left)).item()
            if error < best_error:
                best, best_error, best_round = factors, error, t
            elif t - best_round >= self.patience:
                break
            target = torch.sub(weight, left, out=left)
        assert best is not None
        return best, t + 1


def _round_rest(
    weight: Tensor, factors: Factors, main: Format, rule: str | None, rounded: Tensor
) -> Tensor:
    """Write the rest R = weight − U D as it is rounded, and return R − Q(R) for `frobenius`."""

    def fill(room: Tensor) -> None:
        torch.sub(weight, torch.mm(*factors, out=room), out=room)
        room.sub_(main.round(room, rule, out=rounded))

    return as_doubles(tuple(weight.shape), weight.device, fill)
