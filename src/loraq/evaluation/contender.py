"""A way to quantize a model, and what was measured of it: the two types all comparisons share."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from torch import nn

from loraq.recipe import Recipe, Rule


@dataclass(frozen=True)
class Contender:
    """One way to quantize a model."""

    label: str
    #: Name of the recipe's scheme.
    recipe: str
    method: str = "loraq"
    #: Fields of the method's dataclass.
    options: dict[str, Any] = field(default_factory=dict)
    #: Where its statistics come from, by a name that whoever measures knows; empty for none.
    statistics: str = ""
    #: Whether its bytes are those of the table, so that LoRaQ's best may be among them.
    same_bytes: bool = True
    #: Instead of the table's.
    budget: str | None = None
    effort: str | None = None
    allocation: str = "uniform"
    rules: tuple[Rule, ...] = ()
    #: What to make of the recipe for this model before it is quantized.
    adapt: Callable[[nn.Module, Recipe], Recipe] | None = None
    #: What to do to the quantized model before it is measured.
    finish: Callable[[nn.Module], None] | None = None

    def to_recipe(self, *, budget: str, effort: str) -> Recipe:
        """Return the recipe.

        Args:
            budget: of branches whose rank is open, unless the contender has its own.
            effort: of method "loraq", unless the contender has its own.

        Raises:
            RecipeError: the recipe's name or one of the fields is not valid.
        """
        return replace(
            Recipe.named(self.recipe),
            method=self.method,
            options=self.options,
            budget=self.budget or budget,
            effort=self.effort or effort,
            allocation=self.allocation,
            rules=self.rules,
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one contender; `None` is what a comparison does not measure."""

    #: The table it belongs to.
    group: str
    label: str
    bits_per_weight: float
    #: Mean over the layers of ‖W − Ŵ‖ / ‖W‖.
    weight_error: float
    #: Time that the solver took, all layers.
    seconds: float
    recipe: str = ""
    method: str = "loraq"
    effort: str | None = None
    #: Which trained transformer.
    world: str | None = None
    #: As in `Contender`.
    same_bytes: bool = True
    #: Bytes of the quantized layers.
    nbytes: int | None = None
    #: ‖v − v̂‖ / ‖v‖ of one forward on noised real images, against the model as trained. The
    #: discriminating figure.
    velocity_error: float | None = None
    #: The same for each seed of the solver, where several were tried.
    velocity_errors: tuple[float, ...] = ()
    #: Mean relative output error of a layer on its own real inputs.
    output_error: float | None = None
    #: Samples against those of the model as trained from the same noise.
    psnr_db: float | None = None
    ssim: float | None = None
    #: Share of samples that the judge reads as their class. Cannot see differences at 4 bits.
    accuracy: float | None = None
    #: Fréchet distance of the judge's features to real digits, and that of the model as trained.
    #: Cannot see differences at 4 bits.
    frechet: float | None = None
    frechet_as_trained: float | None = None
    #: Most memory, as whoever measures counts it.
    peak_bytes: int | None = None
    seconds_per_image: float | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Return a row from its record; entries that a row does not have are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in record.items() if name in known})

    def to_record(self) -> dict[str, Any]:
        """Return what was measured, by name."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}
