"""Families of model classes: which of their layers are kept, and which are weight-only."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from loraq.rules import Rule


@dataclass(frozen=True)
class Family:
    """Model classes whose layers need the same rules; a class may belong to several."""

    #: Names of model classes; none means all.
    classes: tuple[str, ...]
    #: Read from top to bottom, after those of the recipe.
    rules: tuple[Rule, ...]


@cache
def families() -> dict[str, Family]:
    """Return the families by name, in the order in which their rules are read.

    The last one is for all classes.
    """
    tables = tomllib.loads(
        files("loraq").joinpath("data/families.toml").read_text(encoding="utf-8")
    )
    return {
        name: Family(
            tuple(table.get("classes", ())), tuple(Rule(**rule) for rule in table["rules"])
        )
        for name, table in tables.items()
    }


def known_class(names: Sequence[str]) -> str:
    """Return the first of some class names that a family has, or ""."""
    return next((name for name in names if name in _classes()), "")


@cache
def _classes() -> frozenset[str]:
    return frozenset(name for family in families().values() for name in family.classes)


@cache
def family_rules(model_class: str) -> tuple[Rule, ...]:
    """Return the rules of all families that a model class belongs to."""
    chosen = (
        family
        for family in families().values()
        if model_class in family.classes or not family.classes
    )
    return tuple(rule for family in chosen for rule in family.rules)
