"""Which scheme and method a model's layers get: `Recipe`, and its forms as a table or a file."""

import tomllib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

from loraq.budget import DEFAULT_BUDGET, Budget, with_rank
from loraq.errors import LoraqError, RecipeError, SchemeError, unknown
from loraq.families import family_rules
from loraq.json_files import parse_json, require_plain
from loraq.methods import METHODS, RTN, Method
from loraq.options import Seed, check_fields, suits
from loraq.recipe_names import NAMED, parse_scheme
from loraq.regular_file import read_regular
from loraq.rules import Rule, leave_module
from loraq.scheme import Branch, Scheme
from loraq.targets import TargetRecipe, get_target_recipe, parse_target_name, target_recipes

ALLOCATIONS = ("uniform", "greedy")
#: How layers can be stored that a rule keeps out of the scheme: as they are, or in eight bits,
#: rounded to nearest, with activations as they are. Of the 8-bit formats this one has the least
#: error for its bytes (docs/decisions/0025-kept-layers.md).
KEEPS: dict[str, Scheme | None] = {"float": None, "int8": Scheme("int8_b128")}

#: The longest file that is read; a rule takes 50 bytes, and Python's TOML a second for 2 MB.
_MOST_BYTES = 256_000


@dataclass(frozen=True)
class Recipe:
    """Which scheme and method, where."""

    #: What every layer gets unless a rule says otherwise; a branch of rank 0 is sized by `budget`.
    scheme: Scheme
    #: One of `loraq.methods.METHODS`; a layer without a branch is rounded to nearest by a method
    #: that needs one.
    method: str = "loraq"
    #: How long a method with levels of effort works, for `loraq` "fast", "default" or
    #: "best"; without effect on a method that has none.
    effort: str = "default"
    #: Other fields of the method's dataclass.
    options: dict[str, Any] = field(default_factory=dict)
    #: Seed of everything random; each layer derives its own from this and its name.
    seed: Seed = 0
    #: Storage of a layer whose branch has no rank: "5.25" (bits per weight) or "r16=32" (a 16-bit
    #: branch's bytes).
    budget: str = str(DEFAULT_BUDGET)
    #: How a model's layers share what the budget gives them: "uniform" (each keeps its own) or
    #: "greedy" (ranks go where they lower the summed squared error most, with the same bytes in
    #: all; see `loraq.pipeline.sharing`).
    allocation: str = "uniform"
    #: How layers are stored that the rules of the model's class keep out of the scheme: "int8"
    #: (eight bits, without a branch) or "float" (as they are).
    keep: str = "int8"
    #: Name of the recipe for a target of `loraq export` whose limits hold for every layer; "" for
    #: none (`loraq.targets`).
    target: str = ""
    #: Read from top to bottom before the rules of the model's class; the first match wins.
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, RecipeError, "the recipe", skip=("scheme", "budget"))
        if not isinstance(self.scheme, Scheme):
            raise RecipeError(
                f"The recipe's scheme is {self.scheme!r}. Use a `Scheme`, or `Recipe.named` for a "
                "name."
            )
        if self.method not in METHODS:
            raise RecipeError(unknown("method", self.method, METHODS))
        efforts = METHODS[self.method].efforts or {
            effort for method in METHODS.values() for effort in method.efforts
        }
        if self.effort not in efforts:
            raise RecipeError(unknown("effort", self.effort, efforts))
        _require_known("allocation", self.allocation, ALLOCATIONS)
        _require_known("way to keep layers", self.keep, KEEPS)
        legal = [f.name for f in fields(METHODS[self.method])]
        for name in self.options:
            if name not in legal:
                raise RecipeError(unknown(f"option of method '{self.method}'", name, legal))
        check_table(METHODS[self.method], self.options, "options")
        try:
            _ = self._solver
        except SchemeError as error:
            raise RecipeError(str(error)) from error
        object.__setattr__(self, "budget", str(Budget.parse(self.budget)))
        for rule in self.rules:
            check_table(Branch, rule.branch, f"branch of rule '{rule.match}'")
            rounds = rule.activation or {"activation", "intermediate"} & rule.branch.keys()
            if rule.weight_only and rounds:
                raise RecipeError(
                    f"Rule '{rule.match}' is weight-only and names a format of activations. Leave "
                    "one of them out."
                )
            rule.apply(self.scheme)  # unknown formats are found now, not at the layer
        if self.solved_for is not None:
            self._check_target(self.solved_for)

    def _check_target(self, target: TargetRecipe) -> None:
        """Require that whatever a rule asks for fits the target, shapes aside."""
        asked = {
            f"Rule '{rule.match}'": self._apply(rule)
            for rule in self.rules
            if not (rule.skip or rule.keep)
        }
        target.check(
            {"The recipe": self._apply(None), **asked}, is_shared=self.allocation != "uniform"
        )

    @property
    def solved_for(self) -> TargetRecipe | None:
        """The recipe for a target whose limits hold for every layer.

        Raises:
            RecipeError: there is none of this name.
        """
        return get_target_recipe(self.target) if self.target else None

    def adjusted(
        self,
        *,
        effort: str | None = None,
        budget: str | float | None = None,
        rank: int | None = None,
        keep: str | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
    ) -> "Recipe":
        """Return the recipe with some of what is changed most often; `None` changes nothing.

        Args:
            effort: how long the method works.
            budget: storage of a layer, for a recipe that leaves the rank open.
            rank: of every layer's branch, in place of the recipe's.
            keep: how the layers are stored that the model's class keeps: "int8" or "float".
            modules_to_not_convert: modules that stay as they are, with all that is in them: whole
                dotted names, or the end or the middle of one ("proj_out", "blocks.0", "ff");
                patterns of the shell too.

        Raises:
            RecipeError: the recipe has nothing that an argument could change, or it contradicts
                another.
        """
        changes: dict[str, Any] = {} if keep is None else {"keep": keep}
        if effort is not None:
            if not METHODS[self.method].efforts:
                raise RecipeError(
                    f"effort={effort!r}: method '{self.method}' has no levels of effort. Leave it "
                    "out."
                )
            changes["effort"] = effort
        if rank is not None or budget is not None:
            branch, given = self.scheme.branch, f"rank={rank}" if rank else f"budget={budget!r}"
            if branch is None:
                raise RecipeError(
                    f"{given}: the recipe has no branch, whose rank it would set. Use one that "
                    "has, such as 'mxfp4-a8+w8a8'."
                )
            if budget is not None and (rank or branch.rank):
                raise RecipeError(
                    f"budget={budget!r}: the rank is {rank or branch.rank} already, and a budget "
                    "settles it. Leave one of them out."
                )
            if budget is not None:
                changes["budget"] = str(budget)
            elif rank is not None:
                changes["scheme"] = replace(self.scheme, branch=replace(branch, rank=rank))
        if modules_to_not_convert:
            kept = (leave_module(name) for name in modules_to_not_convert)
            changes["rules"] = (*kept, *self.rules)
        try:
            return replace(self, **changes)
        except SchemeError as error:
            raise RecipeError(str(error)) from error

    def solver(self, scheme: Scheme) -> Method:
        """Return the method for a layer of this scheme."""
        needs_branch = METHODS[self.method].branch == "required"
        return RTN() if needs_branch and scheme.branch is None else self._solver

    @cached_property
    def _solver(self) -> Method:  # checked once: a model has a thousand layers
        return replace(METHODS[self.method].at(self.effort), **self.options)

    def rule_for(self, name: str, model_class: str = "", within: str = "") -> Rule | None:
        """Return the first rule that matches a layer of a model class, or `None`.

        Args:
            name: dotted name of the layer; the recipe's own rules are for this one.
            model_class: selects the rules of its families.
            within: what stands before the name that the layer has in the model of that class, as in
                "transformer.".
        """
        inner = name.removeprefix(within)
        of_class = (rule for rule in family_rules(model_class) if rule.matches(inner))
        return next((rule for rule in self.rules if rule.matches(name)), next(of_class, None))

    def keeps(self, name: str, model_class: str = "", within: str = "") -> bool:
        """Return whether a rule keeps a layer out of the scheme, however it is stored then.

        The arguments are those of `rule_for`.
        """
        rule = self.rule_for(name, model_class, within)
        return rule is not None and bool(rule.keep)

    def requested_scheme(self, name: str, model_class: str = "", within: str = "") -> Scheme | None:
        """Return the scheme of one layer as requested, or `None` if the layer stays as it is.

        Its rank is 0 if a budget is to settle it. The arguments are those of `rule_for`.
        """
        rule = self.rule_for(name, model_class, within)
        if rule is not None and rule.skip:
            return None
        if rule is not None and rule.keep:
            return KEEPS[self.keep]
        return self._apply(rule)

    def _apply(self, rule: Rule | None) -> Scheme:
        """Return the scheme of the layers that a rule is for, or of all others."""
        target = self.solved_for
        if rule is not None and rule.weight_only and target and target.limits.modulations:
            return target.limits.modulations.scheme
        scheme = self.scheme if rule is None else rule.apply(self.scheme)
        return replace(scheme, branch=None) if METHODS[self.method].branch == "none" else scheme

    def scheme_for(
        self, name: str, shape: tuple[int, int], model_class: str = "", within: str = ""
    ) -> Scheme | None:
        """Return the scheme of one layer with its rank settled, or `None` if it stays as it is.

        So does a layer that is kept and so narrow that eight bits and their scales store no less
        than 16. The arguments beside the shape, (out, in), are those of `rule_for`.

        Raises:
            SchemeError: the request does not fit the shape; the message carries the layer's name.
        """
        scheme = self.requested_scheme(name, model_class, within)
        if scheme is None:
            return None
        try:
            scheme = with_rank(scheme, shape, Budget.parse(self.budget))
            scheme.check(shape)
        except SchemeError as error:
            raise SchemeError(f"Layer '{name}': {error}" if name else str(error)) from error
        saves = scheme.nbytes(shape) < 2 * shape[0] * shape[1]
        return scheme if saves or not self.keeps(name, model_class, within) else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data from which `from_dict` makes an equal recipe."""
        plain = {key: value for key, value in asdict(self).items() if key != "target" or value}
        plain["scheme"] = self.scheme.to_dict()
        plain["rules"] = [
            {key: value for key, value in asdict(rule).items() if value not in (None, {})}
            for rule in self.rules
        ]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Recipe":
        """Return the recipe that plain data describes.

        Raises:
            RecipeError: a key is unknown or missing, or a value has the wrong type.
        """
        if isinstance(plain, dict) and "budget" in plain:  # bits per weight may be a number
            plain = plain | {"budget": str(plain["budget"])}
        plain = check_table(cls, plain, "recipe")
        if "scheme" not in plain:
            raise RecipeError(
                "The recipe has no scheme. Add a [scheme] table with at least `weight`."
            )
        scheme = plain.pop("scheme")
        if isinstance(scheme, str):
            named = cls.named(scheme)
            base, plain = named.scheme, _differences(named) | plain
        else:
            table = check_table(Scheme, scheme, "scheme", required="weight")
            if isinstance(table.get("branch"), dict):
                table["branch"] = Branch(**check_table(Branch, table["branch"], "scheme.branch"))
            base = Scheme(**table)
        tables = enumerate(plain.pop("rules", ()))
        rules = tuple(
            Rule(**check_table(Rule, rule, f"rules[{i}]", required="match")) for i, rule in tables
        )
        return cls(scheme=base, rules=rules, **plain)

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """Read a `.toml` or `.json` recipe.

        Raises:
            RecipeError: the file is missing, is neither TOML nor JSON, is too long, or is not a
                recipe.
        """
        path = Path(path)
        try:
            content = read_regular(path, _MOST_BYTES)
            if path.suffix == ".json":
                plain = parse_json(content)
            else:
                plain = tomllib.loads(content.decode("utf-8"))
                require_plain(plain)
            return cls.from_dict(plain)
        except RecursionError as error:
            raise RecipeError(f"Cannot read the recipe '{path}': it is nested too deep.") from error
        except (OSError, ValueError, LoraqError) as error:
            raise RecipeError(f"Cannot read the recipe '{path}': {error}") from error

    @classmethod
    def named(cls, name: str) -> "Recipe":
        """Return the recipe that a name stands for; see `GRAMMAR`.

        Raises:
            RecipeError: the name does not follow the grammar.
        """
        if (found := parse_target_name(name)) is not None:
            target, rank = found
            made = cls(target.scheme, budget=target.budget, keep=target.keep, target=target.name)
            return made.adjusted(rank=rank) if rank else made
        try:
            return cls(scheme=parse_scheme(NAMED.get(name, name)))
        except RecipeError as error:
            raise RecipeError(f"{error} For a target: {', '.join(target_recipes())}.") from error

    @classmethod
    def of(cls, what: "str | Path | Scheme | Recipe") -> "Recipe":
        """Return a recipe from any of its forms.

        Args:
            what: a recipe, a scheme, a name, or a path to a .toml or .json file.

        Raises:
            RecipeError: the name does not follow the grammar, or the file is not a recipe.
        """
        if isinstance(what, Recipe):
            return what
        if isinstance(what, Scheme):
            return cls(scheme=what)
        file = file_of(what)
        return cls.named(str(what)) if file is None else cls.read(file)


def _differences(recipe: Recipe) -> dict[str, Any]:
    """Return the fields beside the scheme in which a named recipe is not as every other one."""
    plain, other = recipe.to_dict(), Recipe(recipe.scheme).to_dict()
    return {key: value for key, value in plain.items() if value != other.get(key)}


def _require_known(what: str, chosen: str, known: Collection[str]) -> None:
    if chosen not in known:
        raise RecipeError(unknown(what, chosen, known))


def file_of(what: object) -> Path | None:
    """Return the file that a recipe is read from, or `None` if it is given in another form."""
    is_file = isinstance(what, str | Path) and str(what).endswith((".toml", ".json"))
    return Path(str(what)) if is_file else None


def check_table(
    kind: type, table: Any, where: str, *, required: str | None = None
) -> dict[str, Any]:
    """Return a copy of a table whose keys and values are those of a dataclass.

    Args:
        kind: the dataclass.
        table: plain data of TOML or JSON.
        where: what the table is called in messages.
        required: a key that must not be missing.

    Raises:
        RecipeError: it is not a table, a key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(table, dict):
        raise RecipeError(f"'{where}' is {table!r}. A table is required.")
    hints = get_type_hints(kind)
    for key, value in table.items():
        if key not in hints:
            raise RecipeError(unknown(f"key in {where}", key, hints))
        hint = hints[key]
        accepted, written = _WRITTEN.get(hint, (hint, getattr(hint, "__name__", str(hint))))
        if not suits(value, accepted):
            raise RecipeError(f"'{key}' in {where} is {value!r}. It must be of type {written}.")
    if required is not None and required not in table:
        raise RecipeError(f"'{where}' has no '{required}'. It is required.")
    return dict(table)


#: What a field that is not plain is written as: accepted types of plain data, and their name.
_WRITTEN: dict[Any, tuple[Any, str]] = {
    Scheme: (dict | str, "table or string"),
    Branch | None: (dict | None, "table"),
    dict[str, Any]: (dict, "table"),
    tuple[Rule, ...]: (list | tuple, "array of tables"),
}
