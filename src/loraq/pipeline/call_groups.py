"""Mean squares of a layer's inputs call by call: `CallGroups`, a few groups of calls alike.

The channels of a diffusion transformer change their sizes from timestep to timestep (PTQ4DiT, arXiv
2405.16005), so that what suits the mean of all calls may be wrong in some. A run has thousands of
calls. They are alike where their channels have like shares of the sum of squares, and extremes
among them, which a worst case asks for, stay groups of their own.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.stats import N_CALL_GROUPS


class CallGroups:
    """Adds calls up, those of the nearest profiles together as soon as there are too many."""

    def __init__(self) -> None:
        self._squares: list[Float[Tensor, " in"]] = []
        self._tokens: list[int] = []

    def add(self, squares: Float[Tensor, " in"], tokens: int) -> None:
        """Add a call.

        Args:
            squares: sums of the squares of its inputs, in fp64.
            tokens: how many inputs they are of.
        """
        self._squares.append(squares)
        self._tokens.append(tokens)
        if len(self._tokens) > N_CALL_GROUPS:
            i, j = self._nearest()
            self._squares[i] = self._squares[i] + self._squares.pop(j)
            self._tokens[i] += self._tokens.pop(j)

    def mean_squares(self) -> Float[Tensor, "calls in"]:
        """Return E[x²] of every group, in fp64; groups that there are too few of repeat the first.

        So everyone knows the shape before a run, and no extreme among them changes.
        """
        means = [of / tokens for of, tokens in zip(self._squares, self._tokens, strict=True)]
        return torch.stack(means + means[:1] * (N_CALL_GROUPS - len(means)))

    def _nearest(self) -> tuple[int, int]:
        """Return the two groups of least Hellinger distance between their profiles, i < j."""
        squares = torch.stack(self._squares)
        roots = (squares / squares.sum(1, keepdim=True).clamp(min=1e-300)).sqrt()
        alike = roots @ roots.mT
        alike[torch.ones_like(alike, dtype=torch.bool).tril()] = -1
        return divmod(int(alike.argmax()), len(alike))
