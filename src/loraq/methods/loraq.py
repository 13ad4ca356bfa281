"""LoRaQ: optimize a quantized low-rank branch so that 4-bit rounding of the rest leaves little.

With U = proj_up, D = proj_down, Qb the branch's rounding, Qw the main weight's and R = W − Qb(U)
Qb(D), minimize

    J(U, D) = ‖R − Qw(R)‖² + α ‖Qw(R)‖² + β ‖Qb(U) Qb(D)‖²

LoRaQ, arXiv 2604.18117, states the first term: optimize the factors directly against the rounding
error, with no data. Its gradient with Qw held constant is −2 (R − Qw(R)) in the product U D. The
landscape is glassy: codes freeze after a few ordinary gradient steps, and what decides the result
is to begin hot and to cool (docs/log.md). So a step here projects the gradient on the tangent space
of the rank-r matrices, which makes its size the same for every shape, rank and format, and
over-relaxes it: at first by so much that about a third of the codes change each time.

Phase 1 anneals full-precision factors; phase 2 switches the branch's rounding on inside the loop
and cools to zero. Rounding a branch *before* the main weight costs almost nothing, because the main
weight absorbs its error.

α and β price activation noise: with 4-bit activations a large 4-bit part and a large branch that
cancel each other lose what they won on the weight (see `loraq.methods.noise`).

Statistics of the inputs, which nobody needs to give, change two things. In all norms above a
channel counts by its mean square (`Inputs.importance`). And if all second moments are known, the
last rounding of the main weight feeds its errors back (`Feedback`) and filters the noise of rounded
activations (`Inputs.round`), and candidates are compared by the output error that they make. With
noise to filter, one more of them is the branch that leaves the filter the least
(`Inputs.best_branch`). At the end the best branch and its main weight answer each other
(`loraq.methods.refit`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from loraq.formats import Format, QTensor
from loraq.formats.scale_rules import RuleName
from loraq.linalg import TruncatedSVD, svd_of_product, truncated_svd
from loraq.methods.base import Method, register
from loraq.methods.descent import Best, Factors, Problem, move, spread
from loraq.methods.expected import ExpectedInputs
from loraq.methods.fits import Fit, quantize_branch
from loraq.methods.inputs import Inputs
from loraq.methods.noise import ActivationNoise
from loraq.methods.prediction import tail_energies
from loraq.methods.refit import Turns
from loraq.options import Range
from loraq.packed import LowRankBranch
from loraq.scheme import Scheme
from loraq.stats import ActivationStats

#: Steps of the two phases for each effort level.
EFFORTS = {"fast": (25, 10), "default": (140, 56), "best": (400, 160)}

#: More would take weeks.
MOST_STEPS = 1_000_000

# The fit of `LoRaQ._predict_shares`: exponent of t(r), and that of −√ρ for factors of few bits and
# for others; fitted to `fast` solves of the trained digits layers at ranks 2 to 64, and right
# within some percent of E on 1152×1152 and 1152×4608 matrices.
_TAIL = 0.7
_FREEDOM, _FREEDOM_OF_BITS = 3.2, {4: 1.6, 5: 2.8, 6: 2.8}


class Pace(NamedTuple):
    """How far steps go: `LoRaQ.heat` and `LoRaQ.final_step`."""

    heat: float
    last: float


#: Relative noise of the main path's activations that is loud: that of all 4-bit formats is, and
#: that of no 6-bit one.
_LOUD = 0.005
_PACE, _LOUD_PACE = Pace(1.8, 1.5), Pace(0.5, 0.8)


class _Price(NamedTuple):
    """What a candidate costs; candidates are compared by the first."""

    #: J, infinite if it is NaN.
    objective: float
    #: Its first term: what is left of the weight.
    error: float


@register
@dataclass(frozen=True)
class LoRaQ(Method):
    """Anneal the branch against the rounding error of what it leaves; see the module text.

    It is never worse in J than one-shot SVDQuant or rounding to nearest, scaled alike; where the
    intermediate is rounded, SVDQuant's factors are rotated in rank space as ours are. J counts the
    noise of rounded activations, so that the error of the weight alone may be larger than that of
    rounding to nearest: on a weight that the main format holds exactly, for example.

    `metrics` holds "objective" = √J / ‖W‖ and "start_objective", the same for one-shot SVDQuant,
    and "optimized", 1 if the refined factors are the best and 0 if another candidate is. With
    statistics ‖W‖ is the size of the output, and there is "output_error", and "refitted", 1 if what
    is stored came of the best candidate by `refits`; with `input_prior` it is the size that is
    expected.
    """

    name = "loraq"
    summary = "anneals a quantized branch against the rounding error"
    use_of_stats = "optional"
    efforts = tuple(EFFORTS)

    #: Steps with full-precision factors, hot to stable.
    steps: Annotated[int, Range(0, MOST_STEPS)] = 140
    #: Steps with rounded factors, stable to zero.
    refine_steps: Annotated[int, Range(0, MOST_STEPS)] = 56
    #: First step, in units of the one that moves the weight by about one rounding error. `None`
    #: takes 1.8 (flat from 1.4 to 2.4), or 0.5 (flat from 0.25 to 0.9) if activations are loud.
    heat: Annotated[float, Range(0, 1000)] | None = None
    #: Over-relaxation that phase 1 cools to and phase 2 starts from; 2 is the limit of stability.
    #: `None` takes 1.5, or 0.8 (flat from 0.3) if activations are loud.
    final_step: Annotated[float, Range(0, 2)] | None = None
    #: Largest move of a row or column relative to its own error; keeps outlier channels from
    #: running away.
    leverage_cap: Annotated[float, Range(0)] = 1.0
    #: Least weight of ‖Qw(R)‖² at the first step, 0 at the end of phase 1; keeps Qw(R) and the
    #: branch small.
    pull: Annotated[float, Range(0, 1000)] = 0.02
    #: Least shrinking of the branch in phase 1; `None` takes 0.01 for 5- and 6-bit factors, 0.005
    #: for 4-bit ones, else 0: less signal in a low-bit branch is less rounding noise.
    decay: Annotated[float, Range(0, 1)] | None = None
    #: Whether J has the activation-noise terms α and β of the scheme's activation formats.
    activation_aware: bool = True
    #: Whether phase 2 starts from factors rotated in rank space, which the intermediate x Dᵀ needs;
    #: see `spread`.
    rotate: bool = True
    #: Scale rule of the last rounding; inside the loop it is always "fitted".
    scale_rule: RuleName | None = "search"
    #: Without statistics: how much power inputs have in the directions that the weight reads most,
    #: beside white ones; see `loraq.methods.expected`. 0 takes them as white.
    input_prior: Annotated[float, Range(0, 1000)] = 0.0
    #: With statistics: added to each channel's mean square, as a share of their mean, before it
    #: weighs errors.
    importance_damping: Annotated[float, Range(0, 1e9)] = 0.3
    #: With full second moments, or expected ones: `GPTQ.damping` of the last rounding.
    feedback_damping: Annotated[float, Range(0, 1e9)] = 0.01
    #: With full second moments, beside factors of 8 bits or more: how often branch and main weight
    #: answer each other at the end; see `loraq.methods.refit`. A second time brings half a percent.
    refits: Annotated[int, Range(0, 1000)] = 1

    @property
    def passes(self) -> int:
        """As for every method: its steps, and what is before and after them."""
        return 1 + self.steps + self.refine_steps

    @classmethod
    def at(cls, effort: str) -> "LoRaQ":
        """Return the settings of an effort level, one of `EFFORTS`."""
        super().at(effort)
        steps, refine_steps = EFFORTS[effort]
        return cls(steps=steps, refine_steps=refine_steps)

    def _fit(self, weight: Tensor, scheme: Scheme, seed: int, stats: ActivationStats | None) -> Fit:
        branch = self._require_branch(scheme)
        noise = ActivationNoise.of(scheme, branch) if self.activation_aware else ActivationNoise()
        pace = self._pace(noise)
        activation = scheme.activation_format if self.activation_aware else None
        svd = truncated_svd(weight, branch.rank, seed=seed)
        inputs = Inputs(stats, self.feedback_damping, activation)
        if self.input_prior and stats is None:
            inputs = ExpectedInputs.of(
                weight, svd, self.input_prior, activation, self.feedback_damping
            )
        problem = Problem(
            weight,
            scheme.weight_format,
            branch.weight_format,
            noise,
            inputs.importance(self.importance_damping),
        )
        # Nobody else may hold what a phase begins with: factors of a high rank are large, too.
        refined = self._refine(
            problem, self._anneal(problem, Factors.of(*svd.to_balanced()), pace), pace, seed
        )
        del problem  # and its buffers, as large as the weight
        start = self._prepare(svd, noise, seed)
        none = Factors(torch.zeros_like(start.up), torch.zeros_like(start.down))
        candidates: list[tuple[Factors, RuleName | None]] = [
            (refined, "fitted"),
            (start, self.scale_rule),
            (none, "fitted"),
        ]
        if stats is not None and inputs.rounds_with_feedback and noise.main > noise.branch:
            # A branch that sees more than the main path is better than none, and this one best.
            answer = self._prepare(inputs.best_branch(weight, svd, seed), noise, seed)
            candidates[2] = (answer, self.scale_rule)
        return self._choose_best(weight, scheme, noise, inputs, candidates, seed)

    def _prepare(self, svd: TruncatedSVD, noise: ActivationNoise, seed: int) -> Factors:
        """Return factors of a branch that was not annealed."""
        if noise.intermediate and self.rotate:  # it must not have outstanding rank directions
            return spread(Factors(*svd.to_balanced()), seed)
        return Factors(*svd.to_canonical())

    def _anneal(self, problem: Problem, factors: Factors, pace: Pace) -> Factors:
        """Phase 1: full-precision factors, over-relaxed from `heat` down to `final_step`."""
        (n_out, n_in), rank = problem.weight.shape, factors.up.shape[1]
        # The tangent space has rank (out + in − rank) of out·in dimensions, so a step of 1 moves
        # the product by that share of the error's energy; this step moves it by `heat` times the
        # error itself.
        hot = pace.heat * math.sqrt(n_out * n_in / (rank * (n_out + n_in - rank)))
        hot = max(pace.last, hot)
        decay = max(problem.noise.branch, self._decay(problem.factor))
        if not self.steps:
            return factors
        iterate = problem.evaluate(factors, rounded=False)
        best = Best(iterate)
        if best.objective == 0:  # read once, before the loop, in which nothing is read
            return best.factors
        for t in range(self.steps - 1):  # the first of `steps` evaluations is done
            left = 1 - t / self.steps
            step = pace.last + (hot - pace.last) * left
            gradient = iterate.gradient(max(problem.noise.main, self.pull * left))
            factors = move(iterate, gradient, step, self.leverage_cap).shrink_(step * decay)
            del iterate  # and its factors
            iterate = problem.evaluate(factors, rounded=False)
            best.take(iterate)
        return best.factors

    def _refine(self, problem: Problem, factors: Factors, pace: Pace, seed: int) -> Factors:
        """Phase 2: the same step through the branch's rounding, from `final_step` to zero."""
        factors = Factors(*svd_of_product(*factors).to_balanced())
        factors = Factors.of(*(spread(factors, seed) if self.rotate else factors))
        iterate = problem.evaluate(factors, rounded=True)
        best = Best(iterate)
        if best.objective == 0:
            return best.factors
        for t in range(self.refine_steps):
            step = pace.last * (1 - t / self.refine_steps)
            gradient = iterate.gradient(problem.noise.main)
            factors = move(iterate, gradient, step, self.leverage_cap)
            del iterate
            iterate = problem.evaluate(factors.shrink_(step * problem.noise.branch), rounded=True)
            best.take(iterate)
        return best.factors

    def _choose_best(
        self,
        weight: Tensor,
        scheme: Scheme,
        noise: ActivationNoise,
        inputs: Inputs,
        branches: Sequence[tuple[Factors, RuleName | None]],
        seed: int,
    ) -> Fit:
        """Store the best in J of some factors, each with its scale rule, and of plain rounding.

        The second ones are one-shot SVDQuant's, which "start_objective" is of.
        """
        branch, main = self._require_branch(scheme), scheme.weight_format
        norm = inputs.size(weight)  # its doubles are gone before there are candidates
        candidates = []
        for factors, rule in branches:
            candidate = quantize_branch(*factors, branch, rule)
            stored = inputs.round(candidate.subtract_from(weight), main, self.scale_rule)
            candidates.append((candidate, stored))
        if inputs.rounds_with_feedback:  # which is mostly, but not always, better
            up, down = (torch.zeros_like(factor) for factor in branches[0][0])
            none = quantize_branch(up, down, branch, "fitted")
            candidates.append((none, main.quantize(weight, self.scale_rule)))
        prices = [self._price(weight, noise, inputs, *each) for each in candidates]
        first = prices.index(min(prices))
        rotate = bool(noise.intermediate) and self.rotate
        turns = Turns(branch, self.refits, self.scale_rule, rotate, seed)
        for refitted in turns.take(weight, candidates[first][1], inputs):
            candidates.append(refitted)
            prices.append(self._price(weight, noise, inputs, *refitted))
        best = prices.index(min(prices))
        metrics = {
            "objective": math.sqrt(prices[best].objective) / norm,
            "start_objective": math.sqrt(prices[1].objective) / norm,
            "optimized": float(first == 0),
        }
        if inputs.stats is not None:
            metrics["output_error"] = math.sqrt(prices[best].error) / norm
            metrics["refitted"] = float(best != first)
        fitted, stored = candidates[best]
        return Fit(stored, fitted, metrics, is_final=True)

    def _price(
        self,
        weight: Tensor,
        noise: ActivationNoise,
        inputs: Inputs,
        branch: LowRankBranch,
        main: QTensor,
    ) -> "_Price":
        """Return J, and its first term, of what is stored."""
        # One matrix as large as the weight at a time, beside the weight itself.
        prices = []
        if noise.main:
            rounded = main.dequantize()
            prices.append(inputs.rounding_energy(rounded, noise.main))
            del rounded
        product = branch.reconstruct()
        if noise.branch:  # the intermediate is a sum of channels, as large as they are together
            prices.append(noise.input * inputs.noise_energy(product))
            prices.append(noise.intermediate * inputs.error_energy(product))
        error = torch.sub(weight, product, out=product)
        for part, rows in main.decode_rows():
            error[part] -= rows
        own = inputs.error_energy(error)
        objective = sum(prices, own)
        return _Price(math.inf if math.isnan(objective) else objective, own)

    def _pace(self, noise: ActivationNoise) -> Pace:
        """Return the steps for a scheme's activations.

        The noise of 4-bit ones makes J nearly the quadratic α ‖R‖², whose minimum the truncated SVD
        is, where the annealing begins; from there it must not go far. A whole model loses less than
        J says by staying near: its inputs are not white (docs/log.md, 2026-11-29).
        """
        pace = _LOUD_PACE if noise.main > _LOUD else _PACE
        return Pace(
            pace.heat if self.heat is None else self.heat,
            pace.last if self.final_step is None else self.final_step,
        )

    def _decay(self, factor: Format) -> float:
        if self.decay is not None:
            return self.decay
        return {4: 0.005, 5: 0.01, 6: 0.01}.get(factor.bits, 0.0)

    def _predict_shares(self, weight: Tensor, error: Tensor, scheme: Scheme) -> Tensor:
        n_out, n_in = weight.shape
        tail = tail_energies(weight)
        ranks = torch.arange(len(tail), dtype=torch.float64)
        freedom = ranks * (n_out + n_in - ranks) / (n_out * n_in)
        factor = _FREEDOM_OF_BITS.get(self._require_branch(scheme).weight_format.bits, _FREEDOM)
        return tail**_TAIL * torch.exp(-factor * freedom.sqrt())
