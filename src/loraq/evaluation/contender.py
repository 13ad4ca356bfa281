"""A way to quantize a model, and what was measured of it: the two types all comparisons share."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from torch import nn

from loraq.integrations.activations import set_activations
from loraq.layers import set_backend
from loraq.recipe import Recipe
from loraq.rules import Rule


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
    #: In floats, so that what is compared is the method alone.
    keep: str = "float"
    rules: tuple[Rule, ...] = ()
    #: What to make of the recipe for this model before it is quantized.
    adapt: Callable[[nn.Module, Recipe], Recipe] | None = None
    #: What to do to the quantized model before it is measured.
    finish: Callable[[nn.Module], None] | None = None

    def to_recipe(self, *, effort: str, budget: str | None = None) -> Recipe:
        """Return the recipe.

        Args:
            effort: of method "loraq", unless the contender has its own.
            budget: of branches whose rank is open, unless the contender has its own; without
                either, that of the name.

        Raises:
            RecipeError: the recipe's name or one of the fields is not valid.
        """
        named = Recipe.named(self.recipe)
        return replace(
            named,
            method=self.method,
            options=self.options,
            budget=self.budget or budget or named.budget,
            effort=self.effort or effort,
            allocation=self.allocation,
            keep=self.keep,
            rules=self.rules,
        )


def simulate(model: nn.Module) -> None:
    """Let a quantized model round its activations as its recipe says, on every machine.

    That is what comparisons are about. Its decoded weights are kept: it is called many times.
    """
    set_backend(model, "resident")
    set_activations(model, "stored", simulate=True)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What every comparison measures of a contender; a subclass has what one measures besides."""

    #: The table it belongs to.
    group: str
    label: str
    recipe: str = ""
    method: str = "loraq"
    bits_per_weight: float
    #: Mean over the layers of ‖W − Ŵ‖ / ‖W‖.
    weight_error: float
    #: Time that the solver took, all layers.
    seconds: float

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Return a row from its record; entries that a row does not have are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in record.items() if name in known})

    def to_record(self) -> dict[str, Any]:
        """Return what was measured, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}
