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
cancel each other lose what they won on the weight (see `ActivationNoise`).

Statistics of the inputs, which nobody needs to give, change two things. In all norms above a
channel counts by its mean square (`Inputs.importance`). And if all second moments are known, the
last rounding of the main weight feeds its errors back (`Feedback`) and filters the noise of rounded
activations (`Inputs.round`), and candidates are compared by the output error that they make.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.errors import SchemeError, unknown
from loraq.formats import CastFormat, Format, get_format
from loraq.linalg import spreading_rotation, svd_of_product, truncated_svd
from loraq.methods.base import (
    energy,
    prepare,
    prepare_stats,
    quantize_branch,
    relative_error,
    require_branch,
)
from loraq.methods.inputs import Inputs
from loraq.packed import LayerSolution, PackedWeight
from loraq.scheme import Branch, Scheme
from loraq.stats import ActivationStats
from loraq.transforms import rotate

#: (up, down) of one layer.
Pair = tuple[Tensor, Tensor]

#: Steps of the two phases for each effort level.
EFFORTS = {"fast": (25, 10), "default": (140, 56), "best": (400, 160)}


@dataclass(frozen=True)
class LoRaQ:
    """Anneal the branch against the rounding error of what it leaves; see the module text."""

    use_of_stats: ClassVar[str] = "optional"
    needs_full_moment: ClassVar[bool] = False

    #: Steps with full-precision factors, hot to stable.
    steps: int = 140
    #: Steps with rounded factors, stable to zero.
    refine_steps: int = 56
    #: First step, in units of the one that moves the weight by about one rounding error; flat from
    #: 1.4 to 2.4.
    heat: float = 1.8
    #: Over-relaxation that phase 1 cools to and phase 2 starts from; 2 is the limit of stability.
    final_step: float = 1.5
    #: Largest move of a row or column relative to its own error; keeps outlier channels from
    #: running away.
    leverage_cap: float = 1.0
    #: Extra weight of ‖Qw(R)‖² at the first step, gone at the end of phase 1; keeps Qw(R) and the
    #: branch small.
    pull: float = 0.02
    #: Extra shrinking of the branch in phase 1; `None` takes 0.01 for 6-bit factors, 0.005 for
    #: 4-bit ones, else 0.
    decay: float | None = None
    #: Whether J has the activation-noise terms α and β that follow from the scheme's activation
    #: formats.
    activation_aware: bool = True
    #: Whether phase 2 starts from factors rotated in rank space, which the intermediate x Dᵀ needs;
    #: see `_spread`.
    rotate: bool = True
    #: Scale rule of the last rounding; inside the loop it is always "fitted".
    scale_rule: str | None = "search"
    #: With statistics: added to each channel's mean square, as a share of their mean, before it
    #: weighs errors.
    importance_damping: float = 0.3
    #: With full second moments: `GPTQ.damping` of the last rounding.
    feedback_damping: float = 0.01

    @classmethod
    def at(cls, effort: str) -> Self:
        """Return the settings of an effort level, one of `EFFORTS`."""
        if effort not in EFFORTS:
            raise SchemeError(unknown("effort", effort, EFFORTS))
        steps, refine_steps = EFFORTS[effort]
        return cls(steps=steps, refine_steps=refine_steps)

    def solve(
        self,
        weight: Float[Tensor, "out in"],
        scheme: Scheme,
        *,
        seed: int = 0,
        stats: ActivationStats | None = None,
    ) -> LayerSolution:
        """Fit a quantized branch; never worse in J than one-shot SVDQuant or rounding to nearest, scaled alike.

        Where the intermediate is rounded, SVDQuant's factors are rotated in rank space as ours are.

        `metrics` holds "objective" = √J / ‖W‖ and "start_objective", the same for one-shot
        SVDQuant; with statistics ‖W‖ is the size of the output, and there is "output_error". What
        statistics change is in the module text. See `Method.solve`.
        """
        return self.solve_batch([weight], scheme, seeds=[seed], stats=[stats])[0]

    def solve_batch(
        self,
        weights: Sequence[Float[Tensor, "out in"]],
        scheme: Scheme,
        *,
        seeds: Sequence[int],
        stats: Sequence[ActivationStats | None] | None = None,
    ) -> list[LayerSolution]:
        """Solve weights of one shape together: on a GPU, where a small layer is bound by launches, this is faster."""
        begin = time.perf_counter()
        branch = require_branch(scheme, "loraq")
        weight = torch.stack([prepare(w, scheme) for w in weights])
        noise = ActivationNoise.of(scheme, branch) if self.activation_aware else ActivationNoise()
        known = stats or [None] * len(weights)
        prepared = [s and prepare_stats(s, w, scheme) for s, w in zip(known, weight, strict=True)]
        inputs = [Inputs(s, self.feedback_damping, noise.main) for s in prepared]
        importance = _of_batch([x.importance(self.importance_damping) for x in inputs])
        problem = _Problem(weight, scheme.weight_format, branch.weight_format, noise, importance)

        svds = [
            truncated_svd(w, branch.rank, seed=seed) for w, seed in zip(weight, seeds, strict=True)
        ]
        annealed = self._anneal(problem, _stack([svd.balanced() for svd in svds]))
        refined = self._refine(problem, annealed, seeds)
        shared = (time.perf_counter() - begin) / len(weights)
        solutions = []
        for i, svd in enumerate(svds):
            begin = time.perf_counter()
            # An intermediate that is rounded needs a start without outstanding rank directions,
            # too.
            start = (
                _spread(*svd.balanced(), seeds[i])
                if noise.intermediate and self.rotate
                else svd.canonical()
            )
            solution = self._best_of(
                weight[i], scheme, noise, ((refined.up[i], refined.down[i]), start), inputs[i]
            )
            seconds = shared + time.perf_counter() - begin
            solutions.append(replace(solution, seconds=seconds))
        return solutions

    def _anneal(self, problem: "_Problem", factors: "_Factors") -> "_Factors":
        """Phase 1: full-precision factors, over-relaxed from `heat` down to `final_step`."""
        n_out, n_in = problem.weight.shape[-2:]
        rank = factors.up.shape[-1]
        # The tangent space has rank (out + in − rank) of out·in dimensions, so a step of 1 moves
        # the product by that share of the error's energy; this step moves it by `heat` times the
        # error itself.
        hot = max(
            self.final_step, self.heat * math.sqrt(n_out * n_in / (rank * (n_out + n_in - rank)))
        )
        decay = max(problem.noise.branch, self._decay(problem.factor))
        best: _Iterate | None = None
        for t in range(self.steps):
            left = 1 - t / self.steps
            iterate = problem.evaluate(factors, rounded=False)
            best = iterate if best is None else best.keep_better(iterate)
            if best.objective.max() == 0:
                break
            step = self.final_step + (hot - self.final_step) * left
            gradient = iterate.gradient(max(problem.noise.main, self.pull * left))
            factors = _move(iterate, gradient, step, self.leverage_cap).shrink_(step * decay)
        return factors if best is None else best.factors

    def _refine(self, problem: "_Problem", factors: "_Factors", seeds: Sequence[int]) -> "_Factors":
        """Phase 2: the same step seen through the branch's rounding, from `final_step` down to zero."""
        pairs = zip(*factors, seeds, strict=True)
        factors = _stack(
            [
                _spread(*svd_of_product(u, d).balanced(), seed if self.rotate else None)
                for u, d, seed in pairs
            ]
        )
        best = iterate = problem.evaluate(factors, rounded=True)
        for t in range(self.refine_steps):
            if best.objective.max() == 0:
                break
            step = self.final_step * (1 - t / self.refine_steps)
            gradient = iterate.gradient(problem.noise.main)
            factors = _move(iterate, gradient, step, self.leverage_cap).shrink_(
                step * problem.noise.branch
            )
            iterate = problem.evaluate(factors, rounded=True)
            best = best.keep_better(iterate)
        return best.factors

    def _best_of(
        self,
        weight: Tensor,
        scheme: Scheme,
        noise: "ActivationNoise",
        pairs: tuple[Pair, Pair],
        inputs: Inputs,
    ) -> LayerSolution:
        """Store the best of three in J: the refined factors, one-shot SVDQuant's, and none (round-to-nearest)."""
        branch = require_branch(scheme, "loraq")
        refined, start = pairs
        none = (torch.zeros_like(start[0]), torch.zeros_like(start[1]))
        candidates = [
            quantize_branch(*factors, branch, rule)
            for factors, rule in ((refined, "fitted"), (start, self.scale_rule), (none, "fitted"))
        ]
        stored, errors, objectives = [], [], []
        for candidate in candidates:
            product = candidate.reconstruct()
            residual = weight - product
            stored.append(inputs.round(residual, scheme.weight_format, self.scale_rule))
            rounded = stored[-1].dequantize()
            errors.append(objective := inputs.error_energy(residual - rounded))
            if noise.main:
                objective += noise.main * inputs.noise_energy(rounded)
            if (
                noise.branch
            ):  # the intermediate is a sum of channels, and as large as they are together
                objective += noise.input * inputs.noise_energy(product)
                objective += noise.intermediate * inputs.error_energy(product)
            objectives.append(objective)
        best = objectives.index(min(objectives))
        norm = inputs.size(weight)
        metrics = {
            "objective": math.sqrt(objectives[best]) / norm,
            "start_objective": math.sqrt(objectives[1]) / norm,
        }
        if inputs.stats is not None:
            metrics["output_error"] = math.sqrt(errors[best]) / norm
        error = relative_error(weight, stored[best], candidates[best])
        return LayerSolution(
            PackedWeight(scheme, stored[best], candidates[best]), error, metrics=metrics
        )

    def _decay(self, factor: Format) -> float:
        """Shrinking of the branch in phase 1: less signal in a low-bit branch is less rounding noise."""
        if self.decay is not None:
            return self.decay
        return {4: 0.005, 5: 0.01, 6: 0.01}.get(factor.bits, 0.0)


class ActivationNoise(NamedTuple):
    """Price of activation rounding in J, for inputs with uncorrelated channels of equal power.

    If rounding an activation adds relative noise τ, the main path adds τ² ‖Qw(R)‖² to the squared
    output error, and the branch adds (τ_x² + τ_P²) ‖U D‖² for its input and its rank-space
    intermediate.
    """

    #: α, relative noise power of the main path's input.
    main: float = 0.0
    #: Relative noise powers of the branch's input and of its intermediate.
    input: float = 0.0
    intermediate: float = 0.0

    @property
    def branch(self) -> float:
        """β, what both add."""
        return self.input + self.intermediate

    @classmethod
    def of(cls, scheme: Scheme, branch: Branch) -> Self:
        """Return the noise powers of a scheme's activation formats."""
        return cls(
            main=rounding_noise(scheme.activation, rotation=scheme.rotation),
            input=rounding_noise(branch.activation, rotation=scheme.rotation),
            intermediate=rounding_noise(
                branch.intermediate or branch.activation, width=branch.rank, degrees=None
            ),
        )

    def objective(
        self, error: Tensor, rounded: Tensor, branch_energy: Tensor, root: Tensor | None = None
    ) -> Tensor:
        """Return J of each matrix from R − Qw(R), Qw(R) and ‖U D‖²; `root` scales the channels before squaring."""
        if root is not None:
            error, rounded = error * root, rounded * root if self.main else rounded
        total = energy(error) + self.branch * branch_energy
        return total + self.main * energy(rounded) if self.main else total


@lru_cache(maxsize=64)
def rounding_noise(
    name: str, *, rotation: int = 0, width: int = 1152, degrees: int | None = 4
) -> float:
    """Return the relative noise power of a format on a fixed sample; a 16-bit format counts as no noise.

    Activations of transformers have heavy tails, for which a Student t stands; a Gaussian would
    halve the noise of the 4-bit integer formats, and is right for an intermediate that was spread
    over its rank.

    Args:
        name: number format.
        rotation: of the input in the layer, which makes its tails lighter.
        width: values of a row.
        degrees: degrees of freedom of the sample; `None` is a Gaussian.
    """
    fmt = get_format(name).for_rows()
    if isinstance(fmt, CastFormat):
        return 0.0
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn((1 + (degrees or 0), 64, width), generator=generator)
    sample = (
        normal[0] if degrees is None else normal[0] / (normal[1:].square().sum(0) / degrees).sqrt()
    )
    sample = rotate(sample, rotation)
    return ((sample - fmt.round(sample)).square().sum() / sample.square().sum()).item()


class _Factors(NamedTuple):
    up: Tensor  # (batch, out, rank)
    down: Tensor  # (batch, rank, in)

    def shrink_(self, share: float) -> "_Factors":
        """Make the product smaller by about `share`, in place."""
        return _Factors(*(factor.mul_(1 - share / 2) for factor in self)) if share else self


class _Iterate(NamedTuple):
    factors: _Factors  # before the branch's rounding
    seen: _Factors  # as the product used them
    weighted: Tensor  # D of what was seen, its channels times their importance
    grams: Pair  # UᵀU and the weighted DDᵀ of what was seen
    error: Tensor  # R − Qw(R), (batch, out, in); valid until the next evaluation
    rounded: Tensor  # Qw(R); valid until the next evaluation
    objective: Tensor  # J, (batch,)

    def gradient(self, pull: float) -> Tensor:
        """Direction in the product that lowers ‖R − Qw(R)‖² + pull ‖Qw(R)‖²; overwrites `error`."""
        return self.error.add_(self.rounded, alpha=pull) if pull else self.error

    def keep_better(self, other: "_Iterate") -> "_Iterate":
        """The factors with the smaller J for each layer of the batch; everything else becomes the other's."""
        better = (other.objective < self.objective)[:, None, None]
        if better.all():
            return other
        if not better.any():
            return other._replace(factors=self.factors, objective=self.objective)
        up = torch.where(better, other.factors.up, self.factors.up)
        down = torch.where(better, other.factors.down, self.factors.down)
        return other._replace(
            factors=_Factors(up, down), objective=torch.minimum(self.objective, other.objective)
        )


class _Problem:
    """The weights of one batch, and two buffers that every evaluation reuses: fresh pages cost more than the sums."""

    def __init__(
        self,
        weight: Tensor,
        main: Format,
        factor: Format,
        noise: ActivationNoise,
        importance: Tensor | None,
    ) -> None:
        self.weight, self.main, self.factor, self.noise = weight, main, factor, noise
        self.importance, self._root = importance, None if importance is None else importance.sqrt()
        self._residual, self._rounded = torch.empty_like(weight), torch.empty_like(weight)

    def evaluate(self, factors: _Factors, *, rounded: bool) -> _Iterate:
        """Round what the factors leave of the weight, and price it; `rounded` looks through the branch's format."""
        seen = _Factors(*(self.factor.round(f, "fitted") for f in factors)) if rounded else factors
        torch.baddbmm(self.weight, *seen, alpha=-1, out=self._residual)
        self.main.round(self._residual, "fitted", out=self._rounded)
        error = self._residual.sub_(self._rounded)
        weighted = seen.down if self.importance is None else seen.down * self.importance
        grams = seen.up.mT @ seen.up, weighted @ seen.down.mT
        branch_energy = (grams[0].double() * grams[1]).sum((-2, -1))
        objective = self.noise.objective(error, self._rounded, branch_energy, self._root)
        return _Iterate(factors, seen, weighted, grams, error, self._rounded, objective)


def _move(iterate: _Iterate, gradient: Tensor, step: float, cap: float) -> _Factors:
    """Step the factors along the gradient, projected on the tangent space at the factors that are seen.

    The projection of G at U D is P_U G + G P_D − P_U G P_D with P_U = U (UᵀU)⁻¹ Uᵀ and P_D alike;
    the overlap is shared by both factors. If channels differ in importance M, P_D = M Dᵀ (D M Dᵀ)⁻¹
    D is orthogonal in that metric. Rows and columns of G whose leverage (diagonal of P) times the
    step exceeds `cap` are scaled down: there the branch has nearly all freedom, and an over-relaxed
    step would diverge.
    """
    up, down = iterate.seen
    up_dual, down_dual = (
        up @ _inverse(iterate.grams[0]),
        _inverse(iterate.grams[1]) @ iterate.weighted,
    )
    rows = (cap / (step * (up_dual * up).sum(-1, keepdim=True))).clamp_(max=1)
    columns = (cap / (step * (down_dual * down).sum(-2, keepdim=True))).clamp_(max=1)
    # In place wherever it can be: on a CPU, fresh pages for these factors cost more than the
    # arithmetic.
    down_step = ((up_dual.mul_(rows)).mT @ gradient).mul_(columns)
    overlap = down_step @ down_dual.mT / 2
    up_step = (gradient @ down_dual.mul_(columns).mT).mul_(rows)
    up_step.baddbmm_(up, overlap, alpha=-1).mul_(step).add_(iterate.factors.up)
    down_step.baddbmm_(overlap, down, alpha=-1).mul_(step).add_(iterate.factors.down)
    return _Factors(up_step, down_step)


def _inverse(gram: Tensor) -> Tensor:
    """Inverse of a Gram matrix in double precision; a tiny ridge covers factors without full rank."""
    gram = gram.double()
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    ridge = torch.where(mean > 0, 1e-7 * mean, 1.0)
    return torch.linalg.inv(
        gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    ).float()


def _spread(up: Tensor, down: Tensor, seed: int | None) -> Pair:
    """The same product, rotated in rank space so that no rank direction stands out; unchanged without a seed.

    It does nothing for the weight, but the intermediate x Dᵀ shares scales along the rank: in an
    SVD's own basis its first entries would drown the others (docs/log.md).
    """
    if seed is None:
        return up, down
    rotation = spreading_rotation(up.shape[-1], seed=seed).to(up.device)
    return up @ rotation, rotation.mT @ down


def _of_batch(importance: Sequence[Tensor | None]) -> Tensor | None:
    """(batch, 1, in), or `None` if nothing is known; the layers of a batch are either all known or none."""
    known = [channel for channel in importance if channel is not None]
    assert len(known) in (0, len(importance)), "statistics for a part of a batch"
    return torch.stack(known)[:, None] if known else None


def _stack(pairs: Sequence[tuple[Tensor, Tensor]]) -> _Factors:
    return _Factors(torch.stack([up for up, _ in pairs]), torch.stack([down for _, down in pairs]))
