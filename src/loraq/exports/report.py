"""What becomes of each layer in an export, before the work and after it."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from loraq.exports.target import About, BranchFile

#: What may become of a layer.
EXACT, ROUNDED, DENSE = "exact", "rounded", "dense"


@dataclass(frozen=True)
class LayerFate:
    """What becomes of one layer."""

    name: str
    #: (out, in), or (experts, out, in).
    shape: tuple[int, ...]
    #: "exact", "rounded" (factors or scales, never codes) or "dense".
    fate: str
    #: What is rounded, or why it is dense; "" for nothing.
    reason: str
    #: Bytes of the weight, before and after.
    nbytes_before: int
    nbytes: int
    #: Whether the rules of the class kept it out of the recipe's scheme, in 8 bits.
    is_kept: bool = False
    #: Layers of the source that it is put together from; none for the one of its name.
    parts: tuple[str, ...] = ()
    #: ‖Ŵ' − Ŵ‖ / ‖Ŵ‖ of what the target decodes; `None` before it is written.
    relative_change: float | None = None

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, without its name."""
        return {
            "layers": list(self.parts or (self.name,)),
            "fate": self.fate,
            "reason": self.reason,
            "shape": list(self.shape),
            "bytes_before": self.nbytes_before,
            "bytes": self.nbytes,
            "relative_change": self.relative_change,
        }


@dataclass(frozen=True)
class ExportReport:
    """What an export holds, or would hold."""

    about: About
    layers: tuple[LayerFate, ...]
    #: What a user should know of this model in this target.
    notes: tuple[str, ...] = ()
    #: The file that the branch has of its own, if it has one.
    branch_file: BranchFile | None = None
    #: Bytes of all files of the model; 0 before they are written.
    nbytes: int = 0
    #: Sizes of the files that were written, by their path in the target.
    files: dict[str, int] = field(default_factory=dict)

    @property
    def traps(self) -> tuple[str, ...]:
        """What goes wrong there without an error."""
        return (*(self.branch_file.traps if self.branch_file else ()), *self.about.traps)

    @property
    def counts(self) -> dict[str, int]:
        """How many layers are exact, rounded and dense."""
        found = Counter(layer.fate for layer in self.layers)
        return {fate: found[fate] for fate in (EXACT, ROUNDED, DENSE)}

    @property
    def dense_share(self) -> float:
        """Share of the quantized weights that is written dense.

        Layers that the rules of the class keep in 8 bits do not count: they are floats wherever
        else the model is quantized.
        """
        counted = [layer for layer in self.layers if not layer.is_kept]
        total = sum(layer.numel for layer in counted)
        return sum(each.numel for each in counted if each.fate == DENSE) / max(1, total)

    @property
    def largest_change(self) -> float:
        """Largest relative change of a layer."""
        return max((layer.relative_change or 0.0 for layer in self.layers), default=0.0)

    @property
    def bits(self) -> tuple[float, float]:
        """Bits for each quantized weight, before and after."""
        total = max(1, sum(layer.numel for layer in self.layers))
        before = sum(layer.nbytes_before for layer in self.layers)
        return 8 * before / total, 8 * sum(layer.nbytes for layer in self.layers) / total

    def finished(self, layers: list[LayerFate]) -> "ExportReport":
        """Return the report with what became of the layers."""
        return replace(self, layers=tuple(layers))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        before, after = self.bits
        return {
            "target": self.about.name,
            "activations": self.about.activations,
            "counts": self.counts,
            "dense_share": self.dense_share,
            "largest_relative_change": self.largest_change,
            "bits_per_weight_before": before,
            "bits_per_weight": after,
            "notes": list(self.notes),
            "traps": list(self.traps),
            "layers": {layer.name: layer.to_dict() for layer in self.layers},
        }
