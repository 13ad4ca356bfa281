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
    #: Instead of the world's; empty for that.
    budget: str = ""
    #: As in `Contender`.
    same_bytes: bool = True
    #: Of the solver, each with images and noise of its own.
    seeds: tuple[int, ...] = ()
    #: For each seed of the solver, ‖v − v̂‖ / ‖v‖ of one forward on noised real images against the
    #: model as trained. The discriminating figure.
    velocity_errors: tuple[float, ...]
    #: Mean relative output error of a layer on its own real inputs, with the first seed.
    output_error: float
    #: Of LoRaQ: layers whose best branch was the optimized one, layers in which the best was
    #: refitted afterwards, and all layers, with the first seed.
    optimized: int | None = None
    refitted: int | None = None
    n_layers: int | None = None
    #: From the mean square error of all samples, against those of the model as trained.
    psnr_db: float | None = None
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
        errors = tuple(record["velocity_errors"])
        seeds = tuple(record.get("seeds", range(len(errors))))
        return super().from_record({**record, "velocity_errors": errors, "seeds": seeds})

    @classmethod
    def of_lines(cls, lines: list[dict[str, Any]]) -> Self:
        """Return a row from the lines of its seeds; what one seed says is that of the first."""
        errors = [line["velocity_error"] for line in lines]
        seeds = [line["seed"] for line in lines]
        pictures = next((line for line in lines if "psnr_db" in line), {})
        return cls.from_record({**pictures, **lines[0], "velocity_errors": errors, "seeds": seeds})
