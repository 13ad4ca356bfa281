"""What was measured of a contender on a trained transformer."""

from dataclasses import dataclass
from typing import Any, Self

from loraq.evaluation.contender import Row


@dataclass(frozen=True, kw_only=True)
class ModelRow(Row):
    """One line of a table."""

    #: Which trained transformer.
    world: str
    effort: str
    #: As in `Contender`.
    same_bytes: bool
    #: For each seed of the solver, ‖v − v̂‖ / ‖v‖ of one forward on noised real images against the
    #: model as trained. The discriminating figure.
    velocity_errors: tuple[float, ...]
    #: Mean relative output error of a layer on its own real inputs, with the first seed.
    output_error: float
    #: From the mean square error of all samples, against those of the model as trained.
    psnr_db: float
    #: Where pictures are large enough.
    ssim: float | None = None
    #: Distance of the judge's features to those of real images, and that of the model as trained.
    frechet: float | None = None
    frechet_as_trained: float | None = None
    #: What the process grew by while it quantized.
    peak_bytes: int

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Return a row from its record."""
        return super().from_record({**record, "velocity_errors": tuple(record["velocity_errors"])})
