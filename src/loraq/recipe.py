"""Which scheme and method a model's layers get: `Recipe`, its TOML and JSON forms, and the grammar of its names."""

import json
import re
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

from loraq.budget import DEFAULT_BUDGET, Budget, with_rank
from loraq.errors import LoraqError, RecipeError, SchemeError, unknown
from loraq.formats import FORMATS, CastFormat, get_format, is_format
from loraq.methods import EFFORTS, GPTQ, LQER, QERA, RTN, LoRaQ, Method, SVDQuant
from loraq.scheme import Branch, Scheme

METHODS: dict[str, type[RTN | LQER | SVDQuant | LoRaQ | GPTQ | QERA]] = {
    "rtn": RTN,
    "lqer": LQER,
    "svdquant": SVDQuant,
    "loraq": LoRaQ,
    "gptq": GPTQ,
    "qera": QERA,
}

ALLOCATIONS = ("uniform", "greedy")


@dataclass(frozen=True)
class Rule:
    """What is different for the layers whose name matches; fields that are `None` change nothing."""

    #: Shell pattern for the dotted layer name; `*` also matches dots.
    match: str
    #: True leaves the layer as it is; False quantizes it even where the model's class skips it.
    skip: bool | None = None
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


@dataclass(frozen=True)
class Family:
    """Model classes whose layers need the same rules; a class may belong to several."""

    #: Names of model classes; none means all.
    classes: tuple[str, ...]
    #: Read from top to bottom, after those of the recipe.
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Recipe:
    """Which scheme and method, where."""

    #: What every layer gets unless a rule says otherwise; a branch of rank 0 is sized by `budget`.
    scheme: Scheme
    #: One of `METHODS`; without a branch, every method but "gptq" means round to nearest.
    method: str = "loraq"
    #: How long method "loraq" works: "fast", "default" or "best".
    effort: str = "default"
    #: Other fields of the method's dataclass.
    options: dict[str, Any] = field(default_factory=dict)
    #: Seed of everything random; each layer derives its own from this and its name.
    seed: int = 0
    #: Storage of a layer whose branch has no rank: "5.25" (bits per weight) or "r16=32" (a 16-bit
    #: branch's bytes).
    budget: str = str(DEFAULT_BUDGET)
    #: How a model's layers share what the budget gives them: "uniform" (each keeps its own) or
    #: "greedy" (ranks go where they lower the summed squared error most, with the same bytes in
    #: all; see `loraq.pipeline.sharing`).
    allocation: str = "uniform"
    #: Read from top to bottom before the rules of the model's class; the first match wins.
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, Scheme):
            raise RecipeError(
                f"The recipe's scheme is {self.scheme!r}. Use a `Scheme`, or `Recipe.named` for a "
                f"name."
            )
        if self.method not in METHODS:
            raise RecipeError(unknown("method", self.method, METHODS))
        if self.effort not in EFFORTS:
            raise RecipeError(unknown("effort", self.effort, EFFORTS))
        if self.allocation not in ALLOCATIONS:
            raise RecipeError(unknown("allocation", self.allocation, ALLOCATIONS))
        legal = [f.name for f in fields(METHODS[self.method])]
        for name in self.options:
            if name not in legal:
                raise RecipeError(unknown(f"option of method '{self.method}'", name, legal))
        _checked(METHODS[self.method], self.options, "options")
        object.__setattr__(self, "budget", str(Budget.parse(self.budget)))
        for rule in self.rules:
            _checked(Branch, rule.branch, f"branch of rule '{rule.match}'")
            if rule.weight_only and (
                rule.activation or {"activation", "intermediate"} & rule.branch.keys()
            ):
                raise RecipeError(
                    f"Rule '{rule.match}' is weight-only and names a format of activations. Leave "
                    f"one of them out."
                )
            _changed(self.scheme, rule)  # unknown formats are found now, not at the layer

    def solver(self, scheme: Scheme) -> Method:
        """Return the method for a layer of this scheme."""
        if scheme.branch is None and self.method not in ("rtn", "gptq"):
            return RTN()
        if self.method == "loraq":
            return replace(LoRaQ.at(self.effort), **self.options)
        return METHODS[self.method](**self.options)

    def rule_for(self, name: str, model_class: str = "") -> Rule | None:
        """Return the first rule that matches a layer of a model class, or `None`."""
        rules = (*self.rules, *family_rules(model_class))
        return next((rule for rule in rules if fnmatchcase(name, rule.match)), None)

    def asked_for(self, name: str, model_class: str = "") -> Scheme | None:
        """Return the scheme of one layer, with rank 0 if a budget is to settle it, or `None` if it is skipped."""
        rule = self.rule_for(name, model_class)
        if rule is not None and rule.skip:
            return None
        scheme = _changed(self.scheme, rule)
        return (
            replace(scheme, branch=None) if self.method == "rtn" else scheme
        )  # rounding to nearest has no branch

    def scheme_for(self, name: str, shape: tuple[int, int], model_class: str = "") -> Scheme | None:
        """Return the scheme of one layer with its rank settled, or `None` if the layer is skipped.

        Raises:
            SchemeError: what the recipe asks for does not fit the shape; the message carries the
            layer's name.
        """
        scheme = self.asked_for(name, model_class)
        if scheme is None:
            return None
        try:
            scheme = with_rank(scheme, shape, Budget.parse(self.budget))
            scheme.check(shape)
        except SchemeError as error:
            raise SchemeError(f"Layer '{name}': {error}" if name else str(error)) from error
        return scheme

    def to_dict(self) -> dict[str, Any]:
        """Return plain data from which `from_dict` makes an equal recipe."""
        plain = asdict(self)
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
        plain = _checked(cls, plain, "recipe")
        if "scheme" not in plain:
            raise RecipeError(
                "The recipe has no scheme. Add a [scheme] table with at least `weight`."
            )
        scheme = plain.pop("scheme")
        if isinstance(scheme, str):
            base = Recipe.named(scheme).scheme
        else:
            table = _checked(Scheme, scheme, "scheme", required="weight")
            if isinstance(table.get("branch"), dict):
                table["branch"] = Branch(**_checked(Branch, table["branch"], "scheme.branch"))
            base = Scheme(**table)
        tables = enumerate(plain.pop("rules", ()))
        rules = tuple(
            Rule(**_checked(Rule, rule, f"rules[{i}]", required="match")) for i, rule in tables
        )
        if "budget" in plain:
            plain["budget"] = str(plain["budget"])
        return cls(scheme=base, rules=rules, **plain)

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """Read a `.toml` or `.json` recipe.

        Raises:
            RecipeError: the file is missing, is neither TOML nor JSON, or is no recipe.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            plain = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
            return cls.from_dict(plain)
        except (OSError, ValueError, LoraqError) as error:
            raise RecipeError(f"Cannot read the recipe '{path}': {error}") from error

    @classmethod
    def named(cls, name: str) -> "Recipe":
        """Return the recipe that a name stands for; see `GRAMMAR`.

        Raises:
            RecipeError: the name does not follow the grammar.
        """
        return cls(scheme=parse_scheme(NAMED.get(name, name)))

    @classmethod
    def of(cls, what: "str | Path | Scheme | Recipe") -> "Recipe":
        """Return a recipe from any of its forms: itself, a scheme, a name, or a path to a .toml or .json file."""
        if isinstance(what, Recipe):
            return what
        if isinstance(what, Scheme):
            return cls(scheme=what)
        if str(what).endswith((".toml", ".json")):
            return cls.read(what)
        return cls.named(str(what))


GRAMMAR = """MAIN[-aBITS][+BRANCH[-rRANK]][-hSIDE]

MAIN    format of the main weight, 4 to 8 bits: mxfp4, int4, nvfp4, mxint4, int5 …
BITS    activations of the main path: 4, 8 or 16, or a format's name; left out: 4 for a 4-bit MAIN, else 8.
        a16 is weight-only: the branch leaves its activations in 16 bits too
BRANCH  low-rank branch, its weights and activations: w8a8 (mxint8), w6a6 (mxfp6_e2m3), w6a8 and w4a8 (mxfp6_e2m3 or
        mxfp4 weights, mxint8 activations), all with the rank-space intermediate in int8, one scale a token; or one
        format for all, such as bf16
RANK    rank of the branch; left out: as many as fit in the bytes of a 16-bit rank-32 branch, all scales counted
SIDE    side of the Hadamard blocks that rotate the layer's input at run time and its weight beforehand, a power of
        two, or 0 for none; left out: 32 for 4-bit MX and INT activations beside a quantized branch, else none"""

#: Names beyond the grammar. Of the recipes with 8-bit activations that store and multiply nothing
#: in 16 bits, block scales included (which leaves out int4, whose scales are bf16), the default has
#: the least velocity error on both trained transformers, from weights alone (docs/quality.md).
NAMED = {"default": "mxfp4-a8+w8a8"}

#: Names worth knowing, with a line for `loraq formats`.
SHOWCASE = {
    "default": f"{NAMED['default']}: the best 8-bit-activation recipe without any 16-bit part (docs/quality.md)",
    "mxfp4+w8a8": "W4A4 with an 8-bit branch; mxfp4-a8+w8a8 and mxfp4-a16+w8a8 for wider activations",
    "mxfp4+w6a6": "W4A4 with a 6-bit branch",
    "mxfp4+w6a8": "W4A4 with a 6-bit branch that runs on 8-bit activations",
    "mxfp4+w4a8": "W4A4 with a 4-bit branch of high rank",
    "mxfp4+bf16-r32": "W4A4 with SVDQuant's 16-bit branch",
    "mxint4+w8a8": "MX integers",
    "nvfp4+w8a8": "NVFP4 main weight",
    "nvfp4+bf16-r32": "SVDQuant's native NVFP4 form",
    "int4+bf16-r32": "SVDQuant's native INT4 form",
    "int4-a16+w6a6": "weight-only; INT4 with signed scales leaves less error than MXFP4",
    "int5-a16": "a plain 5-bit format without a branch",
}

#: The named branch precisions. The intermediate is int8 in all of them: it is never stored, small,
#: and at 6 bits costs more than everything else in the branch; with power-of-two scales the
#: velocity error is mostly larger (docs/log.md).
_BRANCHES = {
    "w8a8": Branch(weight="mxint8", activation="mxint8", intermediate="int8"),
    "w6a6": Branch(weight="mxfp6_e2m3", activation="mxfp6_e2m3", intermediate="int8"),
    "w6a8": Branch(weight="mxfp6_e2m3", activation="mxint8", intermediate="int8"),
    "w4a8": Branch(weight="mxfp4", activation="mxint8", intermediate="int8"),
}

#: Activation format of the main path for each family of main formats and width.
_ACTIVATIONS = {
    "mxint": {"4": "mxint4", "8": "mxint8"},
    "mxfp": {
        "4": "mxfp4",
        "8": "mxint8",
    },  # half the output error of mxfp8_e4m3 (docs/log.md), which -amxfp8_e4m3 asks for
    "nvfp": {"4": "nvfp4", "8": "mxint8"},
    "int": {"4": "int4", "8": "int8"},
    "fp8": {"4": "mxfp4", "8": "fp8_e4m3"},
}

#: Activations for which a rotation lowers the velocity error of the digits model; NVFP4, whose
#: blocks are small and whose scales are fine, loses by it. Sides from 16 to 128 do as well as each
#: other (`benchmarks/quality/tables.py`).
_ROTATED = ("mxfp4", "mxint4", "int4")
_ROTATION = 32

_NAME = re.compile(
    r"(?P<main>[a-z0-9_]+)(?:-a(?P<bits>[a-z0-9_]+))?(?:\+(?P<branch>[a-z0-9_]+)(?:-r(?P<rank>\d+))?)?(?:-h(?P<rotation>\d+))?"
)
#: The grammar before this one, in which a name looked like that of a layer with the branch's
#: precision.
_OLD_NAME = re.compile(
    r"(?P<main>[a-z0-9_]+)(?:-(?P<branch>(?![rha]\d)[a-z][a-z0-9_]*))??(?:-r(?P<rank>\d+))?"
    r"(?:-h(?P<rotation>\d+))?(?:-a(?P<bits>[a-z0-9_]+))?"
)


def parse_scheme(name: str) -> Scheme:
    """Return the scheme that a name of the grammar stands for.

    Raises:
        RecipeError: the name does not follow `GRAMMAR`.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise RecipeError(_unreadable(name))
    parts = match.groupdict()
    try:
        main = get_format(parts["main"])
    except LoraqError as error:
        raise RecipeError(
            f"Recipe name '{name}': {error} Named recipes: {', '.join(NAMED)}."
        ) from error
    if not 4 <= main.bits <= 8:
        raise RecipeError(
            f"Recipe name '{name}': MAIN '{main.name}' has {main.bits} bits. Use a format of 4 to "
            f"8 bits."
        )
    family = next(prefix for prefix in _ACTIVATIONS if main.name.startswith(prefix))
    bits = parts["bits"] or ("4" if main.bits == 4 else "8")
    activation = {"16": "bf16", **_ACTIVATIONS[family]}.get(bits, bits)
    if not is_format(activation):
        raise RecipeError(
            f"Recipe name '{name}': activations 'a{bits}'. Use -a4, -a8, -a16, or -a and a "
            f"format's name."
        )
    if parts["branch"] is None:
        return Scheme(main.name, activation, rotation=int(parts["rotation"] or 0))
    branch = _named_branch(name, parts["branch"], parts["rank"])
    if bits == "16":
        branch = Branch(rank=branch.rank, weight=branch.weight)
    rotates = activation in _ROTATED and not isinstance(branch.weight_format, CastFormat)
    rotation = int(parts["rotation"] or 0) if parts["rotation"] or not rotates else _ROTATION
    return Scheme(main.name, activation, branch, rotation)


def _named_branch(name: str, branch: str, rank: str | None) -> Branch:
    """Return BRANCH and RANK of a recipe name."""
    if rank is not None and int(rank) < 1:
        raise RecipeError(
            f"Recipe name '{name}': rank 0. Use a rank of at least 1, or leave it to the budget."
        )
    if branch in _BRANCHES:
        return replace(_BRANCHES[branch], rank=int(rank or 0))
    if is_format(branch):
        return Branch(rank=int(rank or 0), weight=branch, activation=branch)
    raise RecipeError(f"Recipe name '{name}': {unknown('branch', branch, (*_BRANCHES, *FORMATS))}")


def _unreadable(name: str) -> str:
    """Message for a name outside the grammar, with today's spelling if it follows the grammar before this one."""
    if old := _OLD_NAME.fullmatch(name):
        main, branch, rank, rotation, bits = (
            old[part] for part in ("main", "branch", "rank", "rotation", "bits")
        )
        branch = {"w16a16": "bf16", None: "bf16" if rank else None}.get(branch, branch)
        new = main + (f"-a{bits}" if bits else "") + (f"+{branch}" if branch else "")
        new += (f"-r{rank}" if rank else "") + (f"-h{rotation}" if rotation else "")
        try:
            parse_scheme(new)
        except LoraqError:
            pass
        else:
            return f"The recipe name '{name}' is written '{new}': the branch stands behind a +. A name is\n\n{GRAMMAR}"
    return f"Cannot read the recipe name '{name}'. A name is\n\n{GRAMMAR}\n\n`loraq formats` lists them."


@cache
def families() -> dict[str, Family]:
    """Return the families of model classes in the order in which their rules are read; the last is for all classes."""
    tables = tomllib.loads(
        files("loraq").joinpath("data/families.toml").read_text(encoding="utf-8")
    )
    return {
        name: Family(
            tuple(table.get("classes", ())), tuple(Rule(**rule) for rule in table["rules"])
        )
        for name, table in tables.items()
    }


@cache
def family_rules(model_class: str) -> tuple[Rule, ...]:
    """Return the rules of all families that a model class belongs to."""
    chosen = (
        family
        for family in families().values()
        if model_class in family.classes or not family.classes
    )
    return tuple(rule for family in chosen for rule in family.rules)


def _changed(scheme: Scheme, rule: Rule | None) -> Scheme:
    if rule is None:
        return scheme
    if rule.branch and scheme.branch is None:
        scheme = replace(scheme, branch=Branch())
    if rule.branch and scheme.branch is not None:
        scheme = replace(scheme, branch=replace(scheme.branch, **rule.branch))
    changes = {
        key: value for key in ("weight", "activation") if (value := getattr(rule, key)) is not None
    }
    scheme = replace(scheme, **changes)
    return scheme.weight_only() if rule.weight_only else scheme


def _checked(kind: type, table: Any, where: str, *, required: str | None = None) -> dict[str, Any]:
    """Return a copy of a table whose keys are all fields of a dataclass and whose values have its types."""
    if not isinstance(table, dict):
        raise RecipeError(f"'{where}' is {table!r}. A table is required.")
    known = get_type_hints(kind)
    for key, value in table.items():
        if key not in known:
            raise RecipeError(unknown(f"key in {where}", key, known))
        if not _fits(value, known[key]) and key != "budget":
            kind_name = _TOML_KINDS.get(known[key]) or getattr(
                known[key], "__name__", str(known[key])
            )
            raise RecipeError(f"'{key}' in {where} is {value!r}. It must be of type {kind_name}.")
    if required is not None and required not in table:
        raise RecipeError(f"'{where}' has no '{required}'. It is required.")
    return dict(table)


#: What a field that is not plain is written as.
_TOML_KINDS: dict[Any, str] = {
    Scheme: "table or string",
    Branch | None: "table",
    dict[str, Any]: "table",
    tuple[Rule, ...]: "array of tables",
}


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, bool):
        return hint in (bool, bool | None)
    kinds: dict[Any, Any] = {
        Scheme: dict | str,
        Branch | None: dict | None,
        dict[str, Any]: dict,
        tuple[Rule, ...]: list | tuple,
        float: float | int,
        float | None: float | int | None,
    }
    return isinstance(value, kinds.get(hint, hint))
