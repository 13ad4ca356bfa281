"""LoRAs on the branch of a packed weight: `W + Σ s B A` with no byte of W stored anew.

The factors of a LoRA are stacked on those of the branch, `U' = [U, s B]` and `D' = [D; A]`, in the
branch's formats. The main weight and the old codes keep their bytes, so that each LoRA can be taken
away again. The branch sees the layer's smoothed and rotated input, so A is transformed as W was.

A LoRA begins at a block of the rank, because blocks of U, and of the intermediate x Dᵀ, share
scales along it; and it takes a multiple of `STEP` ranks, which the matrix units of GPUs want. What
is between is zeros.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import lcm
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loraq.errors import LayerError, SchemeError
from loraq.formats import BlockFormat, QTensor
from loraq.formats.stacking import (
    RULE,
    Move,
    add_columns,
    add_rows,
    move_columns,
    move_rows,
    room_of_rows,
    round_columns,
    round_rows,
    same_bytes,
    shares_rows,
)
from loraq.linalg import relative_error, spreading_rotation, svd_of_product
from loraq.packed import LowRankBranch, PackedWeight
from loraq.scheme import Branch, Scheme
from loraq.transforms import rotate, unsmooth

#: Key of a layer's record under which a `BranchStack` stands.
KEY = "appended"
#: Each LoRA takes a multiple of so many ranks.
STEP = 8
#: A LoRA of which a branch keeps less than this is refused: ‖ΔW − U D‖ / ‖ΔW‖.
_MOST_ERROR = 0.5
#: Half octaves of gains that are tried where scales are fixed.
_HALF_OCTAVES = 24


@dataclass(frozen=True)
class Part:
    """One LoRA on a branch."""

    name: str
    #: Of the file that it came from.
    sha256: str
    #: Strength that it was appended with.
    scale: float
    #: First of its ranks.
    start: int
    rank: int

    @property
    def end(self) -> int:
        """One past its last rank, those of zeros that fill it up included."""
        return self.start + _round_up(self.rank, STEP)


@dataclass(frozen=True)
class BranchStack:
    """What a layer's branch is made of."""

    #: Rank of the branch without any LoRA; 0 if the layer had no branch.
    rank: int
    #: In the order of their ranks.
    loras: tuple[Part, ...] = ()
    #: Dtype, in safetensors' notation, of a layer that was kept in floats: its main weight is the
    #: float weight.
    kept: str | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any], scheme: Scheme) -> "BranchStack":
        """Return the stack that a layer's record notes, else its branch alone.

        Raises:
            ValueError: it is not what `note` writes, or does not fit the scheme.
        """
        if KEY not in record:
            return cls(scheme.branch.rank if scheme.branch else 0)
        noted = record[KEY]
        if not isinstance(noted, dict) or not isinstance(noted.get("loras"), list):
            raise ValueError(f"'{KEY}' is not a table with 'rank' and 'loras'.")
        rank, kept = noted.get("rank"), noted.get("kept")
        parts = [_parse_part(entry) for entry in noted["loras"]]
        stack = cls(rank if type(rank) is int else -1, tuple(parts), kept)
        names = [part.name for part in parts]
        if (
            stack.rank < 0
            or not parts
            or len(set(names)) < len(names)
            or not (kept is None or (isinstance(kept, str) and not stack.rank))
            or scheme.branch is None
            or stack.arranged(scheme.branch) != stack
            or parts[-1].end != scheme.branch.rank
        ):
            raise ValueError(
                f"'{KEY}' names the LoRAs {names} on a branch of rank {rank!r}, which is not what "
                "the scheme has."
            )
        return stack

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """Raise `SchemeError` unless a weight (out, in) can be stored this way."""
        self.base_of(scheme).check(shape)
        if wide := [part.name for part in self.loras if part.rank > min(shape)]:
            raise SchemeError(
                f"The LoRAs {wide} have a rank larger than min(out, in) of shape {shape}."
            )

    def note(self) -> dict[str, Any]:
        """Return the stack as a layer's record has it."""
        noted: dict[str, Any] = {"rank": self.rank, "loras": [asdict(part) for part in self.loras]}
        return noted if self.kept is None else noted | {"kept": self.kept}

    def arranged(self, branch: Branch) -> "BranchStack":
        """Return the same LoRAs where they stand on a branch of these formats."""
        end, parts = self.rank, []
        for part in self.loras:
            parts.append(replace(part, start=_round_up(end, _unit(branch))))
            end = parts[-1].end
        return replace(self, loras=tuple(parts))

    def base_of(self, scheme: Scheme) -> Scheme:
        """Return the scheme of the layer without any LoRA."""
        if not self.loras:
            return scheme
        assert scheme.branch is not None
        return replace(scheme, branch=replace(scheme.branch, rank=self.rank) if self.rank else None)

    def scheme_of(self, base: Scheme, branch: Branch) -> Scheme:
        """Return the scheme of the layer with the LoRAs, on a branch of these formats."""
        rank = self.loras[-1].end if self.loras else self.rank
        return replace(base, branch=replace(branch, rank=rank) if rank else None)


def branch_for(scheme: Scheme, others: Iterable[Branch], default: Branch) -> Branch:
    """Return the formats of the branch that a LoRA is stacked on.

    Those of the layer's branch; a layer without one takes the most frequent of the model, and
    leaves activations as they are if its main path does.

    Args:
        scheme: of the layer.
        others: branches of the model's layers.
        default: for a model without any.
    """
    if scheme.branch is not None:
        return scheme.branch
    counted: dict[Branch, int] = {}
    for branch in others:
        formats = replace(branch, rank=0)
        counted[formats] = counted.get(formats, 0) + 1
    branch = max(counted, key=counted.__getitem__) if counted else default
    if isinstance(scheme.activation_format, BlockFormat):
        return branch
    return Branch(weight=branch.weight)


def append(
    packed: PackedWeight,
    stack: BranchStack,
    part: Part,
    branch: Branch,
    factors: tuple[Tensor, Tensor],
) -> tuple[PackedWeight, BranchStack, float]:
    """Return a weight with one more LoRA on its branch, its stack, and the error of the LoRA.

    Args:
        packed: the weight.
        stack: what is on its branch.
        part: the LoRA; its `start` is settled here.
        branch: formats of the branch, from `branch_for`.
        factors: B (out, rank) and A (rank, in) in fp32, the strength in B.

    Returns:
        The error is ‖ΔW − U D‖ / ‖ΔW‖ of the LoRA's own U and D.

    Raises:
        FormatError: the formats do not hold the factors.
        LayerError: too little of the LoRA is left on the branch; or the branch's bytes are not
            what loraq writes, and could not be restored.
    """
    if not all(factor.isfinite().all() for factor in factors):
        raise LayerError("the LoRA times its scale is beyond fp32. Use a smaller scale.")
    base = stack.base_of(packed.scheme)
    new = replace(stack, loras=(*stack.loras, part)).arranged(branch)
    part = new.loras[-1]
    # What the branch is to hold: it sees the layer's input smoothed and rotated.
    factors = factors[0], rotate(unsmooth(factors[1], packed.smooth_factor), base.rotation)
    up, down = _balance(factors, part.rank)
    up, down = _fit(packed.branch, stack.rank, up, down)
    if not (up.isfinite().all() and down.isfinite().all()):
        raise LayerError("the LoRA times its scale is beyond fp32. Use a smaller scale.")
    height, at = part.end - part.start, part.start
    up = torch.nn.functional.pad(up, (0, height - part.rank))
    down = torch.nn.functional.pad(down, (0, 0, 0, height - part.rank))
    if packed.branch is None:
        fmt = branch.weight_format
        stacked = LowRankBranch(fmt.quantize(up, RULE), fmt.quantize(down, RULE))
    else:
        stacked = LowRankBranch(
            add_columns(packed.branch.proj_up, up, at), add_rows(packed.branch.proj_down, down, at)
        )
    result = replace(packed, scheme=new.scheme_of(base, branch), branch=stacked)
    if not _same_bytes(remove(result, new, part.name)[0], packed):
        raise LayerError(
            "its branch has scales of nothing but zeros, which could not be restored. Quantize it "
            "again, or load the LoRA on top."
        )
    exact = factors[0] @ factors[1]
    stored_up, stored_down = stacked.proj_up.dequantize(), stacked.proj_down.dequantize()
    error = relative_error(exact, stored_up[:, at:] @ stored_down[at:])
    if not error < _MOST_ERROR and exact.any():
        raise LayerError(
            f"'{branch.weight}' keeps too little of the LoRA there: its relative error would be "
            f"{error:.2f}, because the branch's scales are made for other numbers. Use "
            "`loraq.absorb_lora`, or load the LoRA on top."
        )
    return result, new, error


def remove(packed: PackedWeight, stack: BranchStack, name: str) -> tuple[PackedWeight, BranchStack]:
    """Return a weight without one of its LoRAs, and its stack; all else keeps its bytes."""
    branch, factors = packed.scheme.branch, packed.branch
    assert branch is not None
    assert factors is not None
    left = [part for part in stack.loras if part.name != name]
    new = replace(stack, loras=tuple(left)).arranged(branch)
    scheme = new.scheme_of(stack.base_of(packed.scheme), branch)
    if scheme.branch is None:
        return replace(packed, scheme=scheme, branch=None), new
    moves = [Move(0, stack.rank, 0)] if stack.rank else []
    moves += [
        Move(old.start, old.end, part.start) for old, part in zip(left, new.loras, strict=True)
    ]
    rank = scheme.branch.rank
    kept = LowRankBranch(
        move_columns(factors.proj_up, moves, rank), move_rows(factors.proj_down, moves, rank)
    )
    return replace(packed, scheme=scheme, branch=kept), new


def _balance(
    factors: tuple[Tensor, Tensor], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Return factors of the same product that round best.

    They share the singular values equally and are spread over the rank, so that no column stands
    out in the blocks of U, nor in the intermediate.
    """
    up, down = factors
    svd = svd_of_product(up.double(), down.double())
    up, down = svd.to_balanced()
    rotation = spreading_rotation(rank, seed=0).to(up)
    return (up[:, :rank] @ rotation).float(), (rotation.mT @ down[:rank]).float()


def _fit(
    branch: LowRankBranch | None, rank: int, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the factors with the split of their size that suits a branch.

    The intermediate may have one scale for all ranks, so those of the LoRA are made as large as
    those that are there. Where rows of U share one scale, or all of a matrix does, the split is the
    one with the least error under the scales that are there.
    """
    if branch is None or not up.any():
        return up, down
    if shares_rows(branch.proj_up):
        gains = _best_gains(branch.proj_up, up)
        return up * gains, down / gains[:, None]
    there = branch.proj_down.dequantize()[:rank]
    largest = there.norm(dim=-1).amax().item() if rank else 0.0
    gain = down.norm(dim=-1).amax().item() / largest if largest > 0 else 1.0
    if branch.proj_up.global_scale is not None:
        steps = range(-_HALF_OCTAVES, _HALF_OCTAVES + 1)
        tried = [gain * 2.0 ** (step / 2) for step in steps]
        gain = min(tried, key=lambda gain: _product_error(branch, up, down, gain))
    return up * gain, down / gain


def _best_gains(q: QTensor, up: Tensor) -> Tensor:
    """Return the gain of each column that leaves it the least error under the scales of rows.

    The first that is tried lets no value saturate; larger ones let more and more do so.
    """
    rooms = room_of_rows(q)[:, None] / up.abs()
    first = torch.where(up == 0, torch.inf, rooms).amin(0)
    first = torch.where(first.isfinite(), first, 1.0)
    tried = [first * 2.0 ** (step / 2) for step in range(_HALF_OCTAVES)]
    errors = torch.stack([(round_columns(q, up * gain) / gain - up).norm(dim=0) for gain in tried])
    return torch.stack(tried).gather(0, errors.argmin(0)[None])[0]


def _product_error(branch: LowRankBranch, up: Tensor, down: Tensor, gain: float) -> float:
    up_error = relative_error(up, round_columns(branch.proj_up, up * gain) / gain)
    down_error = relative_error(down, round_rows(branch.proj_down, down / gain) * gain)
    return up_error**2 + down_error**2


def _parse_part(entry: Any) -> Part:
    kinds = {"name": str, "sha256": str, "scale": (int, float), "start": int, "rank": int}
    if not isinstance(entry, dict) or entry.keys() != kinds.keys():
        raise ValueError(f"'{KEY}' has {entry!r}, which is no LoRA.")
    for key, kind in kinds.items():
        if isinstance(entry[key], bool) or not isinstance(entry[key], kind):  # type: ignore[arg-type]
            raise ValueError(f"'{KEY}' has a LoRA whose '{key}' is {entry[key]!r}.")
    part = Part(**entry)
    if not (0 < part.rank < 2**31 and part.name.isprintable()):
        raise ValueError(f"'{KEY}' has the LoRA {part.name!r} of rank {part.rank}.")
    return part


def _unit(branch: Branch) -> int:
    """Return what the first rank of a LoRA is a multiple of."""
    formats = branch.weight_format, branch.intermediate_format
    sizes = [fmt.block_size or 1 for fmt in formats if isinstance(fmt, BlockFormat)]
    return lcm(STEP, *sizes)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _same_bytes(a: PackedWeight, b: PackedWeight) -> bool:
    if a.branch is None or b.branch is None:
        return a.branch is b.branch
    return same_bytes(a.branch.proj_up, b.branch.proj_up) and same_bytes(
        a.branch.proj_down, b.branch.proj_down
    )
