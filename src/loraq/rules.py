"""What a recipe, or a family of model classes, does differently for layers of some names."""

import re
from dataclasses import dataclass, field, replace
from fnmatch import translate
from functools import cached_property
from typing import Any

from loraq.errors import RecipeError
from loraq.options import check_fields
from loraq.scheme import Branch, Scheme


@dataclass(frozen=True)
class Rule:
    """What is different for the layers whose name matches; a field of `None` changes nothing."""

    #: Shell pattern for the dotted layer name, or several with "|" between; `*` also matches dots.
    match: str
    #: True leaves the layer as it is; False quantizes it even where the model's class keeps it.
    skip: bool | None = None
    #: True keeps the layer out of the scheme: it is stored as the recipe's `keep` says, in eight
    #: bits or as it is.
    keep: bool | None = None
    #: True leaves all activations in 16 bits, also those of the branch, and stores the weights as
    #: the recipe says.
    weight_only: bool | None = None
    #: Why, shown by `loraq plan`.
    reason: str | None = None
    #: Format of the main weight.
    weight: str | None = None
    #: Format of the main path's input.
    activation: str | None = None
    #: Fields of the branch that change; `{}` changes none.
    branch: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, RecipeError, "the rule")
        if self.keep and self.skip is not None:
            raise RecipeError(
                f"Rule '{self.match}' has both `keep = true` and `skip`. `skip = true` leaves a "
                "layer as it is, `keep = true` stores it as the recipe's `keep` says. Leave one of "
                "them out."
            )

    def matches(self, name: str) -> bool:
        """Return whether the rule is for a layer of this dotted name."""
        return self._pattern.match(name) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # Compiled once: a model has a thousand layers, and its class dozens of rules.
        return re.compile("|".join(map(translate, self.match.split("|"))))

    def apply(self, scheme: Scheme) -> Scheme:
        """Return the scheme of a layer that this rule is for, given that of all others.

        Raises:
            FormatError: the rule names an unknown format.
            SchemeError: the rule gives the branch a rank that cannot be.
        """
        if self.branch:
            scheme = replace(scheme, branch=replace(scheme.branch or Branch(), **self.branch))
        scheme = replace(
            scheme,
            weight=self.weight or scheme.weight,
            activation=self.activation or scheme.activation,
        )
        return scheme.weight_only() if self.weight_only else scheme


def leave_module(name: str) -> Rule:
    """Return the rule that leaves a module, and all that is in it, as it is."""
    places = f"{name}|{name}.*|*.{name}|*.{name}.*"
    return Rule(places, skip=True, reason=f"modules_to_not_convert: '{name}'")
