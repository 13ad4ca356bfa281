"""Equal memory as a tool: a budget of stored bytes, and the rank that it buys."""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated

from loraq.errors import SchemeError
from loraq.options import Range, check_fields
from loraq.scheme import Scheme

#: More than a weight and a branch of full rank take.
MOST_BITS = 64
_R16 = re.compile(r"r16=([0-9]{1,9})")


@dataclass(frozen=True)
class Budget:
    """What a layer may store: bits a weight, or the bytes of a 16-bit branch of some rank."""

    #: Total bits for each weight, main weight and branch and all scales; or `None`.
    bits_per_weight: Annotated[float, Range(0, MOST_BITS)] | None = None
    #: Rank of the 16-bit branch whose bytes the branch may take; or `None`.
    rank_16bit: Annotated[int, Range(1, 10**9)] | None = None

    def __post_init__(self) -> None:
        check_fields(self, SchemeError, "the budget")
        if (self.bits_per_weight is None) is (self.rank_16bit is None):
            raise SchemeError("A budget is either bits per weight or the rank of a 16-bit branch.")

    @classmethod
    def parse(cls, text: "str | float | Budget") -> "Budget":
        """Return the budget that a text stands for.

        "5.25" are bits per weight, "r16=32" the bytes of a 16-bit rank-32 branch.

        Raises:
            SchemeError: the text is neither.
        """
        if isinstance(text, Budget):
            return text
        if match := _R16.fullmatch(str(text).strip()):
            if int(match[1]) > 0:
                return cls(rank_16bit=int(match[1]))
        else:
            try:
                if not isinstance(text, bool) and 0 < (bits := float(text)) <= MOST_BITS:
                    return cls(bits_per_weight=bits)
            except (TypeError, ValueError, OverflowError):
                pass
        raise SchemeError(
            f"Cannot read the budget '{text}'. It is either bits per weight, such as '5.25' and at "
            f"most {MOST_BITS}, or the bytes of a 16-bit branch, such as 'r16=32'."
        )

    def __str__(self) -> str:
        return f"r16={self.rank_16bit}" if self.rank_16bit else f"{self.bits_per_weight:g}"

    def branch_bytes(self, shape: tuple[int, int], main_bytes: int) -> float:
        """Return the bytes that the budget leaves for both factors of one layer."""
        n_out, n_in = shape
        if self.rank_16bit is not None:
            return 2 * self.rank_16bit * (n_out + n_in)
        assert self.bits_per_weight is not None
        return self.bits_per_weight * n_out * n_in / 8 - main_bytes


#: The bytes of SVDQuant's branch.
DEFAULT_BUDGET = Budget(rank_16bit=32)


@lru_cache(maxsize=1024)  # a model has few shapes and many layers
def with_rank(scheme: Scheme, shape: tuple[int, int], budget: Budget = DEFAULT_BUDGET) -> Scheme:
    """Return the scheme with an open rank (0) set to the largest one the budget pays for.

    The rank is at most min(out, in). A scheme with a rank, or without a branch, is returned as it
    is.

    Raises:
        SchemeError: the budget does not even pay for rank 1.
    """
    branch = scheme.branch
    if branch is None or branch.rank:
        return scheme
    main_bytes = replace(scheme, branch=None).nbytes(shape)
    allowed = budget.branch_bytes(shape, main_bytes)
    low, high = 0, min(shape)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high)
            if replace(branch, rank=middle).nbytes(shape) <= allowed
            else (low, middle - 1)
        )
    if low == 0:
        n_out, n_in = shape
        least = 8 * (main_bytes + replace(branch, rank=1).nbytes(shape)) / (shape[0] * shape[1])
        raise SchemeError(
            f"A budget of {budget} leaves {max(0, int(allowed))} bytes for the branch of a "
            f"{n_out}×{n_in} weight in '{scheme.weight}'; with rank 1 in '{branch.weight}' it "
            f"takes {least:.2f} bits per weight. Raise the budget, or use a smaller main format."
        )
    return replace(scheme, branch=replace(branch, rank=low))
