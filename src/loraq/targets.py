"""What the targets of `loraq export` ask of a model, and the recipes that are solved for them.

Both are data, in `data/targets.toml`, and are asked here alone: by a recipe when it is made, by a
plan before the work, and by an export of what came out.
"""

import math
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from loraq.budget import DEFAULT_BUDGET
from loraq.errors import RecipeError, unknown
from loraq.formats import BlockFormat, Format
from loraq.recipe_names import parse_scheme
from loraq.scheme import Branch, Scheme

#: What stands above a list of the recipes.
INTRODUCTION = (
    "A recipe that is solved for a target of `loraq export` has a name of its own, after which a "
    "rank may stand, as in nunchaku-int4-r64:"
)

_NAME = re.compile(r"(?P<recipe>.+?)(?:-r(?P<rank>[1-9][0-9]{0,8}))?")


@dataclass(frozen=True)
class Sizes:
    """What the sizes of a layer are multiples of."""

    outputs: int = 1
    inputs: int = 1

    def explain(self, n_out: int, n_in: int) -> str:
        """Return why a layer does not have these sizes; "" if it has."""
        if not (n_out % self.outputs or n_in % self.inputs):
            return ""
        return f"{n_out}×{n_in} is not in multiples of {self}"

    def __str__(self) -> str:
        return f"{self.outputs}×{self.inputs}"


@dataclass(frozen=True)
class Modulations:
    """What a target that has a layer for modulations holds there: weight-only, no branch."""

    #: Format of the weight.
    weight: str
    sizes: Sizes

    @property
    def scheme(self) -> Scheme:
        """Of a modulation that is solved for the target."""
        return Scheme(self.weight)


@dataclass(frozen=True)
class Limits:
    """What a target asks; `data/targets.toml` explains each field."""

    #: As `--to` takes it.
    name: str
    classes: tuple[str, ...] = ()
    because: str = ""
    one_format: bool = False
    branch: str = ""
    rank_step: int = 1
    one_rank: bool = False
    sizes: Sizes = Sizes()
    whole_blocks: bool = False
    convolutions: bool = False
    modulations: Modulations | None = None

    @classmethod
    def of(cls, name: str, table: dict[str, Any]) -> "Limits":
        """Return the limits that a table of the file gives a target."""
        table = dict(table)
        table["classes"] = tuple(table.get("classes", ()))
        if apart := table.pop("modulations", None):
            table["modulations"] = Modulations(apart.pop("weight"), Sizes(**apart))
        sizes = {key: table.pop(key) for key in ("outputs", "inputs") if key in table}
        return cls(name, sizes=Sizes(**sizes), **table)

    def explain_class(self, kind: type) -> str:
        """Return why the target takes no model of a class; "" if it does."""
        names = [base.__name__ for base in kind.__mro__]
        if "PreTrainedModel" in names:
            return "targets are for models of diffusers"
        is_known = not self.classes or any(name in self.classes for name in names)
        return "" if is_known else self.because

    def explain_misfit(
        self, scheme: Scheme, shape: tuple[int, ...], *, is_conv: bool = False, lora_rank: int = 0
    ) -> str:
        """Return why the target does not hold a layer of these sizes; "" if it does.

        Args:
            scheme: of the layer.
            shape: (out, in), or (experts, out, in).
            is_conv: whether it is a 1×1 convolution.
            lora_rank: rank that LoRAs add to its branch.
        """
        if len(shape) == 3:
            return f"no layer of {self.name} holds stacked experts"
        if is_conv and not self.convolutions:
            return f"{self.name} has no quantized convolution"
        n_out, n_in = shape
        block = block_of(scheme.weight_format)
        if self.whole_blocks and n_in % block:
            return f"its input of {n_in} is not a multiple of {block}"
        apart = None if lora_rank else self.modulations
        sizes = apart.sizes if apart and scheme == apart.scheme else self.sizes
        return sizes.explain(n_out, n_in)

    def step_of(self, branch: Branch) -> int:
        """Return what the rank of a branch is a multiple of."""
        return math.lcm(self.rank_step, block_of(branch.weight_format) if self.whole_blocks else 1)

    def describe(self, scheme: Scheme) -> tuple[str, ...]:
        """Return what the target asks of the layers of a model, in words."""
        step = self.step_of(scheme.branch) if scheme.branch else 1
        found = []
        if scheme.branch and self.one_rank:
            found.append(
                "one rank for all layers" + (f", a multiple of {step}" if step > 1 else "")
            )
        elif step > 1:
            found.append(f"ranks in multiples of {step}")
        if scheme.branch and self.branch:
            found.append(f"branches in {self.branch}")
        block = block_of(scheme.weight_format) if self.whole_blocks else 1
        inputs = math.lcm(self.sizes.inputs, block)
        for what, size in (("outputs", self.sizes.outputs), ("inputs", inputs)):
            if size > 1:
                found.append(f"{what} in multiples of {size}")
        if not self.convolutions:
            found.append("no 1×1 convolutions")
        if apart := self.modulations:
            found.append(
                f"modulations in {apart.weight} without a branch, in multiples of {apart.sizes}"
            )
        return (*found, "no rotation or smoothing", "no stacked experts")


@dataclass(frozen=True)
class TargetRecipe:
    """A recipe whose layers a target holds."""

    name: str
    #: What it exports to.
    limits: Limits
    scheme: Scheme
    #: A line for users.
    summary: str
    budget: str = str(DEFAULT_BUDGET)
    keep: str = "int8"

    @property
    def weights(self) -> tuple[str, ...]:
        """Formats of the main weight that layers may have beside each other."""
        if self.limits.one_format:
            return (self.scheme.weight,)
        return tuple(made.scheme.weight for made in recipes_of(self.limits.name))

    def explain_breach(self, scheme: Scheme) -> str:
        """Return what of a scheme the target does not hold; "" for nothing."""
        limits, branch = self.limits, scheme.branch
        if limits.modulations and scheme == limits.modulations.scheme:
            return ""
        if scheme.weight not in self.weights:
            return f"its main weight is {scheme.weight}, and not {' or '.join(self.weights)}"
        if scheme.rotation:
            return f"its layers are rotated by blocks of {scheme.rotation}, and not by 0"
        if scheme.smoothing:
            return "its inputs are smoothed, which it has no factors for"
        if branch is None:
            return "it has no branch" if limits.one_rank else ""
        if limits.branch and branch.weight != limits.branch:
            return f"its branch is in {branch.weight}, and not in {limits.branch}"
        if branch.rank % (step := limits.step_of(branch)):
            lower = branch.rank // step * step
            nearest = " or ".join(str(rank) for rank in (lower, lower + step) if rank)
            return f"its rank {branch.rank} is not a multiple of {step}, such as {nearest}"
        return ""

    def check(self, schemes: dict[str, Scheme], *, is_shared: bool) -> None:
        """Require that the target holds layers of these schemes.

        Args:
            schemes: by what gives them, in words.
            is_shared: whether layers share a budget, so that their ranks are whatever helps most.

        Raises:
            RecipeError: it does not; the message says what to use instead.
        """
        limits, way_out = self.limits, f"Use the recipe '{self.name}' as it is."
        for where, scheme in schemes.items():
            if breach := self.explain_breach(scheme):
                raise RecipeError(
                    f"{where} does not fit target '{limits.name}' of '{self.name}': {breach}. "
                    f"Change that, or leave the target out. {way_out}"
                )
        branches = [scheme.branch for scheme in schemes.values() if scheme.branch]
        ranks = sorted({branch.rank for branch in branches})
        if limits.one_rank and len(ranks) > 1:
            listed = ", ".join(str(rank) if rank else "that of the budget" for rank in ranks)
            raise RecipeError(
                f"Target '{limits.name}' of '{self.name}' needs one rank for all layers, and the "
                f"recipe has {listed}. Give all layers one rank. {way_out}"
            )
        steps = {limits.step_of(branch) for branch in branches}
        if is_shared and (limits.one_rank or steps - {1}):
            raise RecipeError(
                f"Target '{limits.name}' of '{self.name}' takes "
                f"{'one rank' if limits.one_rank else f'ranks in multiples of {max(steps)}'}, and "
                "layers that share a budget (`--allocate`, allocation 'greedy') get any. Leave "
                "that out."
            )


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(files("loraq").joinpath("data/targets.toml").read_text(encoding="utf-8"))


@cache
def limits_of(target: str) -> Limits:
    """Return what a target of `loraq export` asks; one that is not in the file asks for nothing."""
    return Limits.of(target, _tables()["exports"].get(target, {"convolutions": True}))


@cache
def target_recipes() -> dict[str, TargetRecipe]:
    """Return the recipes that are solved for a target, by name."""
    return {
        name: TargetRecipe(
            name,
            limits_of(table["export"]),
            parse_scheme(table["scheme"]),
            **{key: table[key] for key in ("summary", "budget", "keep") if key in table},
        )
        for name, table in _tables()["recipes"].items()
    }


def recipes_of(target: str) -> tuple[TargetRecipe, ...]:
    """Return the recipes for a target of `loraq export`, the one to try first at the top."""
    return tuple(made for made in target_recipes().values() if made.limits.name == target)


def fallback() -> TargetRecipe:
    """Return the recipe for what another target does not take."""
    return target_recipes()[_tables()["fallback"]]


def get_target_recipe(name: str) -> TargetRecipe:
    """Return a recipe for a target by name.

    Raises:
        RecipeError: there is none of this name.
    """
    if name not in target_recipes():
        raise RecipeError(unknown("recipe for a target", name, target_recipes()))
    return target_recipes()[name]


def parse_target_name(name: str) -> tuple[TargetRecipe, int] | None:
    """Return recipe and rank, or 0, of a name such as "nunchaku-int4-r64"; `None` for others."""
    match = _NAME.fullmatch(name)
    if match is None or match["recipe"] not in target_recipes():
        return None
    return target_recipes()[match["recipe"]], int(match["rank"] or 0)


def block_of(fmt: Format) -> int:
    """Return the values that share a scale; 1 for a format of rows, or without scales."""
    return (fmt.block_size or 1) if isinstance(fmt, BlockFormat) else 1
