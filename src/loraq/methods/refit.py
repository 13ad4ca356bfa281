"""A branch and a main weight that answer each other, for inputs whose second moments are known.

Let D be held. Then the best U beside a main weight Q is (W − Q) H Dᵀ (D H Dᵀ)⁻¹, and the output
error that it leaves is

    tr((W − Q) P (W − Q)ᵀ),  P = H − H Dᵀ (D H Dᵀ)⁻¹ D H

So what Q does wrong in the directions that the branch reads costs nothing: it is rounded with
feedback through the deflated P, and U is refitted afterwards (H-SVDQuant, 2026: "Deflating the
Hessian"). The best D beside a given Q is QERA's, SVD_r((W − Q) C) C⁻¹ with H = C Cᵀ. A turn finds
D, then Q, then U. Nothing absorbs the rounding of a refitted U, so it is for factors of 8 bits or
more: with fewer the gain is lost (docs/log.md, 2026-11-29).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.formats import QTensor
from loraq.formats.scale_rules import RuleName
from loraq.linalg import damped_cholesky, svd_of_product
from loraq.methods.descent import Factors, spread
from loraq.methods.fits import quantize_branch
from loraq.methods.inputs import Inputs
from loraq.packed import LowRankBranch
from loraq.scheme import Branch

#: Of the factors.
FEWEST_BITS = 8
#: Of the subspace iteration: directions beside those that are wanted, and passes.
_EXTRA, _ITERATIONS = 16, 6
#: How much of H counts in the directions that the branch reads: U is rounded, too. From 1e-3 to
#: 1e-1 it is as good.
_SHARE = 0.01


@dataclass(frozen=True)
class Turns:
    """How branch and main weight answer each other."""

    branch: Branch
    #: How many turns.
    count: int
    #: Of main weight and factors.
    scale_rule: RuleName | None
    #: Whether the factors are rotated in rank space; see `spread`.
    rotate: bool
    #: Of that rotation, and of the randomized SVD.
    seed: int

    def take(
        self, weight: Float[Tensor, "out in"], main: QTensor, inputs: Inputs
    ) -> Iterator[tuple[LowRankBranch, QTensor]]:
        """Yield the branch and the main weight after each turn.

        There is none if not all second moments are known, or if the factors have too few bits.

        Args:
            weight: W.
            main: Q, to begin with.
            inputs: of the layer.
        """
        fmt, rule = self.branch.weight_format, self.scale_rule
        known = inputs.stats is not None and inputs.stats.is_full
        if not self.count or not known or fmt.bits < FEWEST_BITS:
            return
        for _ in range(self.count):
            moment = inputs.moment  # (in, in) in doubles: one at a time
            fitted = quantize_branch(*self._answer(weight, main, moment), self.branch, rule)
            down = fitted.proj_down.dequantize().double()
            read = moment @ down.mT  # (in, rank)
            inner = damped_cholesky(down @ read, 1e-9)
            solution = torch.cholesky_solve(read.mT, inner)  # (D H Dᵀ)⁻¹ D H, (rank, in)
            deflated = moment.addmm_(read, solution, beta=1 + _SHARE, alpha=-1)
            rounding = inputs.answer_to(deflated)  # before there is a target beside it
            main = rounding.round(fitted.subtract_from(weight), main.format, rule)
            up = (weight - main.dequantize()) @ solution.mT.float()
            fitted = LowRankBranch(fmt.quantize(up, rule), fitted.proj_down)
            yield fitted, main

    def _answer(self, weight: Tensor, main: QTensor, moment: Tensor) -> Factors:
        """Return the branch that answers what a main weight leaves.

        SVD_r(E C) C⁻¹ is V Vᵀ E with the leading left singular vectors V of E C, which are the
        leading eigenvectors of E H Eᵀ: no root of H is needed.
        """
        error = weight - main.dequantize()
        # A power of two, which changes no digit: products of large moments would leave fp32.
        _, exponent = math.frexp(moment.diagonal().mean().item())
        seen = moment.mul(2.0**-exponent).float()
        size = min(self.branch.rank + _EXTRA, *error.shape)
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        start = torch.randn((len(error), size), generator=generator).to(error.device)
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(start).Q
            start = error @ (seen @ (error.mT @ basis))
        # What the last basis spans, in the order of what it answers.
        _, vectors = torch.linalg.eigh(basis.mT @ start)
        up = basis @ vectors[:, -self.branch.rank :]
        factors = svd_of_product(up.contiguous(), up.mT @ error)
        if not self.rotate:
            return Factors(*factors.to_canonical())
        return spread(Factors(*factors.to_balanced()), self.seed)
