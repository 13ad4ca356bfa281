"""What is compared with what: the contenders of each table, by its title."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import nn

from benchmarks.quality.field import DIRECT, Entrant, Main, entrants
from benchmarks.quality.sharing import WAYS, share_otherwise
from benchmarks.worlds.world import OWN_SAMPLES, OWN_SENSITIVITY, WORLDS, World
from loraq.evaluation.contender import Contender
from loraq.layers import quantized_layers
from loraq.recipe_names import NAMED, parse_scheme
from loraq.rules import Rule

Table = tuple[Contender, ...]


class Comparison(NamedTuple):
    """A table of LoRaQ and its rivals."""

    mains: tuple[Main, ...]
    #: Where everyone's statistics come from, a source of `World`; none from weights alone.
    statistics: str
    #: The LoRaQ row that the table is judged by, by its recipe. It was chosen by `QUALIFYING` seeds
    #: alone, before it was measured on any of `SEEDS`.
    declared: str
    #: Its budget, if it has one of its own.
    budget: str = ""
    #: The strongest rival is to have at least so many times its error.
    bar: float = 1.05
    #: Rows that were declared before this one and measured on `SEEDS`, at effort fast: their
    #: verdicts stay.
    withdrawn: tuple[str, ...] = ()
    #: Rows that are judged beside it, by what they are to a user: one that the declared row's bytes
    #: would hide from its strongest rivals, or that people run.
    beside: tuple[tuple[str, str], ...] = ()
    #: Rivals in formats that LoRaQ has no row in.
    others: tuple[Entrant, ...] = ()

    @property
    def effort(self) -> str:
        """Effort of the rows that the table is judged by; all others of LoRaQ are fast.

        From weights alone it is that of a user who asks for none, with which LoRaQ takes less time
        than SVDQuant ×100 beside 8- and 6-bit branches; beside 4-bit ones SVDQuant's alternation
        stands still early. With statistics it is fast: more gains nothing there (docs/log.md,
        2026-11-30).
        """
        return "fast" if self.statistics else "default"

    @property
    def label(self) -> str:
        """Label of the rows that the table is judged by."""
        return "LoRaQ" if self.effort == "fast" else f"LoRaQ, effort {self.effort}"

    @property
    def entrants(self) -> tuple[Entrant, ...]:
        """Every row."""
        rows = (*self.others, *entrants(self.mains, statistics=self.statistics))
        if self.effort == "fast":
            return rows
        judged = {("LoRaQ", name, self.budget) for name in (self.declared, *dict(self.beside))}
        slower = (row for row in rows if row.key in judged)
        return (*rows, *(replace(row, label=self.label, effort=self.effort) for row in slower))


def with_statistics(*contenders: Contender) -> Table:
    """Return contenders that get statistics of the model's own samples."""
    return tuple(replace(contender, statistics=OWN_SAMPLES) for contender in contenders)


WITHOUT, WITH = "from weights alone", "own samples"
#: Seeds of the page. No row is chosen by its result on them, but one may be because another lost.
SEEDS = (0, 1, 2, 3, 4)
#: Seeds that rows are declared and rivals qualified by.
QUALIFYING = (101, 102)
#: Rivals of each table that go on from `QUALIFYING` to `SEEDS`, beside those as published.
FINALISTS = 3
#: What the title of a table ends with where everyone's statistics are weighed by sensitivity.
WEIGHED = ", weighed by sensitivity"
#: Rivals that qualify for such a table: the strongest of the qualification without it, for each
#: row of ours that is judged.
NARROWED = 16

_FOUR = ("bf16", "w8a8", "w6a8", "w4a8")
_INT = ("bf16", "int8", "w6a8", "w4a8")
#: Quantized weights of a branch with 16-bit activations, as weight-only mains have anyway.
_WIDE_INPUT = ("w8a16", "w6a16", "w4a16")
_WEIGHT_ONLY = ("bf16", "w8a8", "w6a6", "w4a8")
_A16 = (Main("int4-a16", _WEIGHT_ONLY), Main("mxfp4-a16", _WEIGHT_ONLY))
_WIDE = (
    Main("int5-a16", ()),
    Main("int4-a16", _WEIGHT_ONLY, budget="5.25"),
    Main("int5_b256-a16", _WEIGHT_ONLY, budget="5.25", full=("bf16", "w8a8")),
)
_A8 = (
    Main("mxfp4-a8", (*_FOUR, *_WIDE_INPUT)),
    Main("int4-aint8", (*_INT, *_WIDE_INPUT)),
)
#: INT4 and NVFP4 without rotation are SVDQuant's own formats. NVFP4 takes a quarter bit
#: more, so it is there with a smaller branch as well.
_A4 = (
    Main("mxfp4-a4", (*_FOUR, *_WIDE_INPUT), (0, 32)),
    Main("int4-a4", (*_FOUR, *_WIDE_INPUT), (0, 32)),
    Main("nvfp4-a4", (*_FOUR, *_WIDE_INPUT)),
    Main("nvfp4-a4", (*_FOUR, *_WIDE_INPUT), budget="4.9"),
)
#: What ComfyUI runs: INT4 with one scale a row on both sides, rotated in the largest blocks that
#: the width has. Its W4A8 is in a table of codes that no format here has: `benchmarks/rivals`.
_CONVROT = Entrant("ConvRot", "int4_b4096-aint4_b4096-h256", "rtn", DIRECT, as_published=True)
COMPARISONS: dict[str, Comparison] = {
    f"W4A16, {WITHOUT}": Comparison(_A16, "", "int4-a16+w8a8-h0", withdrawn=("int4-a16+w8a8-h0",)),
    f"W4A16, {WITH}": Comparison(
        _A16, OWN_SAMPLES, "int4-a16+w4a8-s-h0", withdrawn=("int4-a16+w6a6-h0",)
    ),
    f"W4A16 at 5.25 bits, {WITHOUT}": Comparison(
        _WIDE, "", "int4-a16+w8a8-h0", "5.25", withdrawn=("int4-a16+w8a8-h0",)
    ),
    f"W4A16 at 5.25 bits, {WITH}": Comparison(_WIDE, OWN_SAMPLES, "int5_b256-a16+w4a8-h0", "5.25"),
    f"W4A8, {WITHOUT}": Comparison(
        _A8,
        "",
        "int4-aint8+w8a16-h0",  # the default recipe
        withdrawn=(
            "mxfp4-a8+w8a8-h0",
            "int4-aint8+w4a8-h0",
            "int4-aint8+w6a8-h0",
            "int4-aint8+w8a16-h0",
        ),
    ),
    f"W4A8, {WITH}": Comparison(
        _A8,
        OWN_SAMPLES,
        "int4-aint8+w4a16-s-h0",
        withdrawn=("int4-aint8+bf16-h0", "int4-aint8+bf16-s-h0"),
        beside=(
            ("int4-aint8+w8a16-h0", "default recipe"),
            ("int4-aint8+w8a16-s-h0", "default recipe, smoothed"),
        ),
    ),
    f"W4A4, {WITHOUT}": Comparison(
        _A4,
        "",
        "int4-a4+w4a16-h32",
        bar=1.10,
        withdrawn=("int4-a4+w4a8-h32", "nvfp4-a4+w4a8-h0"),
        beside=(("nvfp4-a4+w4a16-h0", "NVFP4, a quarter bit more"),),
        others=(_CONVROT,),
    ),
    f"W4A4, {WITH}": Comparison(
        _A4,
        OWN_SAMPLES,
        "int4-a4+w4a16-s-h32",
        bar=1.10,
        withdrawn=("int4-a4+w4a8-h32", "int4-a4+w4a8-s-h32", "nvfp4-a4+w4a8-s-h0"),
        beside=(("nvfp4-a4+w4a16-s-h0", "NVFP4, a quarter bit more"),),
    ),
}
COMPARISONS |= {
    title + WEIGHED: comparison._replace(statistics=OWN_SENSITIVITY, withdrawn=())
    for title, comparison in COMPARISONS.items()
    if comparison.statistics
}
CONTENDERS: dict[str, Table] = {
    title: comparison.entrants for title, comparison in COMPARISONS.items()
}
#: The pace of LoRaQ that is right for 16- and 8-bit activations.
HOT = {"heat": 1.8, "final_step": 1.5}
#: What each part of the solver is worth, on one world only: every row is `fast` unless it says
#: otherwise.
ABLATIONS: dict[str, Table] = {
    f"Ablations, W4A16, {WITHOUT}": (
        Contender("LoRaQ, fast", "int4-a16+w6a6"),
        Contender("branch rounded afterwards only", "int4-a16+w6a6", options={"refine_steps": 0}),
        Contender("cold start", "int4-a16+w6a6", options={"heat": 0.0}),
        Contender("direct scales at the end", "int4-a16+w6a6", options=DIRECT),
        Contender("no decay of the branch", "int4-a16+w6a6", options={"decay": 0.0}),
        Contender("effort default", "int4-a16+w6a6", effort="default"),
        Contender("effort best", "int4-a16+w6a6", effort="best"),
    ),
    f"Ablations, W4A4, {WITHOUT}": (
        Contender("LoRaQ, fast", "mxfp4-a4+w8a8"),
        Contender(
            "without activation noise in J", "mxfp4-a4+w8a8", options={"activation_aware": False}
        ),
        Contender("hot start", "mxfp4-a4+w8a8", options=HOT),
        Contender("LoRaQ, fast, 4-bit factors", "int4-a4+w4a8"),
        Contender("hot start, 4-bit factors", "int4-a4+w4a8", options=HOT),
        Contender("no rotation in rank space", "mxfp4-a4+w8a8", options={"rotate": False}),
        Contender("no rotation of the input", "mxfp4-a4+w8a8-h0"),
        Contender("rotation of 128 channels' blocks", "mxfp4-a4+w8a8-h128"),
    ),
    **{
        f"Ablations, expected inputs, {bits}, {WITHOUT}": tuple(
            Contender(label + suffix, recipe, method, options | given)
            for label, method, options in (
                ("LoRaQ, fast", "loraq", {}),
                ("SVDQuant ×20 + search", "svdquant", {"rounds": 20, "rotate": True}),
            )
            for suffix, given in (("", {}), (", inputs expected", {"input_prior": 1.0}))
        )
        for bits, recipe in (
            ("W4A16", "int4-a16+w8a8-h0"),
            ("W4A8", "int4-aint8+int8-h0"),
            ("W4A4", "int4-a4+w4a8-h32"),
        )
    },
    f"Ablations, W4A16, {WITH}": with_statistics(
        Contender("LoRaQ, fast", "int4-a16+w6a6"),
        Contender("channels not weighed", "int4-a16+w6a6", options={"importance_damping": 1e6}),
        Contender("no feedback", "int4-a16+w6a6", options={"feedback_damping": 1e6}),
        Contender("effort default", "int4-a16+w6a6", effort="default"),
    ),
    f"Ablations, W4A4, {WITH}": with_statistics(
        Contender("LoRaQ, fast", "int4-a4+w4a8"),
        Contender("noise not filtered", "int4-a4+w4a8", options={"activation_aware": False}),
    ),
}

SIDES = (0, 16, 32, 64, 128)
#: What is rotated, and what solves it.
ROTATED = (
    ("mxfp4+bf16", "svdquant"),
    ("mxfp4+w8a8", "loraq"),
    ("mxfp4+w6a8", "loraq"),
    ("mxfp4+w4a8", "loraq"),
    ("mxint4+w8a8", "loraq"),
    ("int4+bf16", "svdquant"),
    ("int4+w8a8", "loraq"),
    ("nvfp4+bf16", "svdquant"),
    ("nvfp4+w8a8", "loraq"),
)
#: Formats of the main path's input, of the branch's and of the rank-space intermediate.
ROUNDED = (
    ("bf16", "bf16", "bf16"),
    ("mxint8", "bf16", "bf16"),
    ("mxfp8_e4m3", "bf16", "bf16"),
    ("int8", "bf16", "bf16"),
    ("bf16", "mxint8", "bf16"),
    ("bf16", "mxfp6_e2m3", "bf16"),
    ("bf16", "bf16", "mxint8"),
    ("bf16", "bf16", "mxfp6_e2m3"),
    ("mxint8", "mxint8", "mxint8"),
    ("mxint8", "mxfp6_e2m3", "mxint8"),
    ("mxint8", "mxfp6_e2m3", "mxfp6_e2m3"),
)
#: Layers of the text side, which the rules of the class keep in 16 bits.
TEXT_SIDE = (Rule("*.attn2.to_[kv]", skip=False),)


def rotation() -> dict[str, Table]:
    """Does a Hadamard rotation of the input axis pay with 4-bit activations, in how large blocks?

    0 is none. A rotation stores nothing and costs as many multiplications for each value of the
    input as its blocks have channels.
    """
    return {
        f"Rotation, W4A4, {WITHOUT}": tuple(
            Contender(f"{name}, {method}, blocks of {side}", f"{name}-h{side}", method)
            for name, method in ROTATED
            for side in SIDES
        )
    }


def activations() -> dict[str, Table]:
    """What do activation formats cost end to end, and what does the rotation in rank space buy?

    The weights are the same in every row of a kind, so every difference is rounded activations.
    """
    return {
        f"Activations, {branch}, {WITHOUT}": tuple(
            Contender(
                f"{' | '.join(formats)}, {'rotated' if rotate else 'not rotated'}",
                recipe,
                options={"rotate": rotate},
                finish=partial(round_activations, formats),
            )
            for formats in ROUNDED
            for rotate in (True, False)
        )
        for branch, recipe in (
            ("8-bit branch", "mxfp4-a16+w8a8"),
            ("6-bit branch", "mxfp4-a16+w6a6"),
        )
    }


def round_activations(formats: tuple[str, str, str], model: nn.Module) -> None:
    """Set the formats of one of `ROUNDED` in every quantized layer."""
    main, branch, intermediate = formats
    for layer in quantized_layers(model).values():
        rounded = replace(layer.scheme.branch, activation=branch, intermediate=intermediate)
        layer.scheme = replace(layer.scheme, activation=main, branch=rounded)


def statistics(world: World) -> dict[str, Table]:
    """How good are statistics of a model's own samples, beside those of data?"""
    return {
        f"Statistics, W4A16{side}, {WITH}": tuple(
            Contender(source or "none", "int4-a16+w6a8", statistics=source, rules=rules)
            for source in ("", *world.sources)
        )
        for side, rules in (("", ()), (", text side too", TEXT_SIDE))
    }


def allocation(world: World) -> dict[str, Table]:
    """Does it pay to share one budget among the layers, at the same bytes in all?

    Each table has the bytes of 16-bit branches of one rank: the world's usual one, and 0.4 and 2
    of it. See `benchmarks.quality.sharing` for what the rows after the first two count.
    """
    usual = int(world.budget.removeprefix("r16="))
    tables = {}
    for bits in (16, 8, 4):
        for rank in (round(usual * share) for share in (0.4, 1, 2)):
            line = partial(Contender, recipe=f"mxfp4-a{bits}+w6a8", budget=f"r16={rank}")
            tables[f"Allocation, W4A{bits}, bytes of rank {rank}, {WITHOUT}"] = (
                line("uniform"),
                line("absolute", allocation="greedy"),
                *(
                    line(way, adapt=partial(share_otherwise, way=way, probe=world.probe))
                    for way in WAYS
                ),
            )
    return tables


def kept_layers() -> dict[str, Table]:
    """What does it cost to store the layers in eight bits that a model's class keeps?

    The bits are those of the other layers, which are the same in all rows of a table.
    """
    return {
        f"Kept layers, {title}, {WITHOUT}": tuple(
            Contender(label, recipe, keep=keep)
            for label, keep in (("in floats", "float"), ("in eight bits", "int8"))
        )
        for title, recipe in (
            ("W4A16", "int4-a16+w6a6"),
            ("W4A8, the default recipe", NAMED["default"]),
            ("W4A4", "mxfp4-a4+w8a8"),
        )
    }


#: What the label of a row ends with that has `finer_weights`.
FINER = ", 8-bit main weights"


def finer_weights() -> dict[str, Table]:
    """Return what 4-bit activations leave where the main weight has 8 bits: the room of solvers."""
    alternated = Contender(
        "SVDQuant ×20 + search",
        "nvfp4-a4+w4a16-h0",
        "svdquant",
        {"rounds": 20, "rotate": True},
    )
    filtered = Entrant(
        "SVDQuant ×1 + GPTQ", "int4-a4+w4a16-h32", "gptq", {"rotate": True, "noise_filter": True}
    )
    smoothed = replace(filtered, label=f"{filtered.label}, smoothing 0.3", smoothing="0.3")

    def pair(row: Contender) -> Table:
        main = parse_scheme(row.recipe).weight
        finer = row.recipe.replace(f"{main}-a4", f"mxint8-a{main}")
        return row, replace(row, label=row.label + FINER, recipe=finer, same_bytes=False)

    return {
        f"Finer weights, W4A4, {WITHOUT}": (
            *pair(Contender("LoRaQ, fast", "nvfp4-a4+w4a16-h0")),
            *pair(alternated),
        ),
        f"Finer weights, W4A4, {WITH}": with_statistics(
            *pair(Contender("LoRaQ, fast", "int4-a4+w4a16-s-h32")),
            *pair(filtered),
            *pair(smoothed),
        ),
    }


def all_tables(name: str) -> dict[str, Table]:
    """Return every table of a world, the comparisons first."""
    world = WORLDS[name]
    small = ABLATIONS | rotation() | activations() | statistics(world) if name == "digits" else {}
    return CONTENDERS | small | allocation(world) | kept_layers() | finer_weights()
