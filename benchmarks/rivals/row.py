"""What was measured of a rival package, and of LoRaQ at its bytes."""

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Self

from torch import Tensor

from loraq.evaluation.contender import Row


@dataclass(frozen=True)
class Found:
    """What one contender makes of one weight."""

    nbytes: int
    weight_error: float
    #: Relative output error by the main path's activations: A16, A8, A4; `None` where it cannot
    #: be known.
    output_errors: dict[str, float | None]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RivalRow(Row):
    """One line of a table: means over its weights; seconds are process time."""

    #: As in `Found`.
    output_errors: dict[str, float | None] = field(default_factory=dict)
    #: Of the 4-bit codes, which is also that of the 4-bit activations.
    family: str = ""
    #: Name and version of the package.
    package: str = "loraq"
    #: "stored" or how the bytes were counted.
    counted: str = "stored"
    #: LoRaQ at the same or fewer bytes.
    loraq: "RivalRow | None" = None

    @classmethod
    def of(cls, group: str, label: str, found: list[tuple[Tensor, Found]], **more: Any) -> Self:
        """Average over weights; bits are of all bytes."""
        values = sum(weight.numel() for weight, _ in found)
        each = [one for _, one in found]
        errors = {}
        for column in ("A16", "A8", "A4"):
            of_column = [one.output_errors[column] for one in each]
            errors[column] = None if None in of_column else fmean(of_column)
        return cls(
            group=group,
            label=label,
            bits_per_weight=8 * sum(one.nbytes for one in each) / values,
            weight_error=fmean(one.weight_error for one in each),
            seconds=sum(one.seconds for one in each),
            output_errors=errors,
            **more,
        )

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Return a row from its record, the one of LoRaQ inside it too."""
        ours = record.get("loraq")
        return super().from_record({**record, "loraq": cls.from_record(ours) if ours else None})
