"""What is compared with what: the contenders of each table, by its title."""

from dataclasses import replace
from functools import partial

from torch import nn

from benchmarks.quality.sharing import WAYS, share_otherwise
from benchmarks.worlds.world import OWN_SAMPLES, WORLDS, World
from loraq.evaluation.contender import Contender
from loraq.layers import quantized_layers
from loraq.recipe_names import NAMED
from loraq.rules import Rule

DIRECT = {"scale_rule": None}
Table = tuple[Contender, ...]


def with_statistics(*contenders: Contender) -> Table:
    """Return contenders that get statistics of the model's own samples."""
    return tuple(replace(contender, statistics=OWN_SAMPLES) for contender in contenders)


WITHOUT, WITH = "from weights alone", "own samples"
#: A rule's layers are quantized even where the model's class skips them, so the text side is left
#: out by name.
INT8_BLOCK = tuple(
    Rule(f"*blocks.0.{layer}", weight="int8")
    for layer in ("attn1.*", "attn2.to_q", "attn2.to_out.0", "ff.*")
)
#: Ours with the bytes of a plain INT5 weight.
AT_INT5_BYTES = (
    Contender("LoRaQ, 6-bit branch, 5.25 bits", "int4-a16+w6a6", budget="5.25", same_bytes=False),
    Contender("LoRaQ, 8-bit branch, 5.25 bits", "int4-a16+w8a8", budget="5.25", same_bytes=False),
    Contender(
        "LoRaQ, INT5 main, 8-bit branch, 5.25 bits",
        "int5_b256-a16+w8a8",
        budget="5.25",
        same_bytes=False,
    ),
)
CONTENDERS: dict[str, Table] = {
    f"W4A16, {WITHOUT}": (
        Contender("round to nearest", "mxfp4-a16", "rtn"),
        Contender("round to nearest, INT4, no search", "int4-a16", "rtn", DIRECT),
        Contender("round to nearest, INT4", "int4-a16", "rtn"),
        Contender("INT4, first block INT8", "int4-a16", "rtn", rules=INT8_BLOCK, same_bytes=False),
        Contender("LQER, 16-bit branch", "int4-a16+bf16", "lqer"),
        Contender("SVDQuant, 16-bit branch", "int4-a16+bf16", "svdquant", DIRECT),
        Contender("SVDQuant ×20 + scale search", "int4-a16+bf16", "svdquant", {"rounds": 20}),
        Contender("LoRaQ, 16-bit branch", "int4-a16+bf16"),
        Contender("LoRaQ, 8-bit branch", "int4-a16+w8a8"),
        Contender("LoRaQ, 6-bit branch", "int4-a16+w6a6"),
        Contender("LoRaQ, 4-bit branch", "int4-a16+w4a8"),
        Contender("LoRaQ, MXFP4 main, 6-bit branch", "mxfp4-a16+w6a6"),
        Contender(
            "LoRaQ, 6-bit branch, default effort",
            "int4-a16+w6a6",
            effort="default",
            same_bytes=False,
        ),
        Contender("plain INT5 (5.25 bits)", "int5-a16", "rtn", same_bytes=False),
        *AT_INT5_BYTES,
    ),
    f"W4A16, {WITH}": with_statistics(
        Contender("GPTQ, INT4", "int4-a16", "gptq"),
        Contender("SVDQuant + GPTQ, 16-bit branch", "int4-a16+bf16", "gptq"),
        Contender("SVDQuant + GPTQ, 6-bit branch", "int4-a16+w6a6", "gptq"),
        Contender("QERA, 16-bit branch", "int4-a16+bf16", "qera"),
        Contender("LoRaQ, 8-bit branch", "int4-a16+w8a8"),
        Contender("LoRaQ, 6-bit branch", "int4-a16+w6a6"),
        Contender("LoRaQ, MXFP4 main, 6-bit branch", "mxfp4-a16+w6a6"),
        Contender("GPTQ, INT5 (5.25 bits)", "int5-a16", "gptq", same_bytes=False),
        *AT_INT5_BYTES,
        Contender(
            "LoRaQ, INT5 main, 4-bit branch, 5.25 bits",
            "int5_b256-a16+w4a8",
            budget="5.25",
            same_bytes=False,
        ),
    ),
    f"W4A8, {WITHOUT}": (
        Contender("round to nearest", "mxfp4-a8", "rtn"),
        Contender("round to nearest, INT4", "int4-a8+int8", "rtn"),
        Contender("SVDQuant, 16-bit branch", "mxfp4-a8+bf16", "svdquant", DIRECT),
        Contender("SVDQuant ×20 + scale search", "mxfp4-a8+bf16", "svdquant", {"rounds": 20}),
        Contender("LoRaQ, W8A8 branch", "mxfp4-a8+w8a8"),
        Contender("LoRaQ, W6A8 branch", "mxfp4-a8+w6a8"),
        Contender("LoRaQ, INT4 main, INT8 branch", "int4-a8+int8"),
    ),
    f"W4A8, {WITH}": with_statistics(
        Contender("GPTQ", "mxfp4-a8", "gptq"),
        Contender("SVDQuant + GPTQ, 16-bit branch", "mxfp4-a8+bf16", "gptq"),
        Contender("LoRaQ, W16A16 branch", "mxfp4-a8+bf16"),
        Contender("LoRaQ, W8A8 branch", "mxfp4-a8+w8a8"),
        Contender("LoRaQ, W6A8 branch", "mxfp4-a8+w6a8"),
        Contender("LoRaQ, INT4 main, INT8 branch", "int4-a8+int8"),
    ),
    f"W4A4, {WITHOUT}": (
        Contender("round to nearest", "mxfp4-a4", "rtn"),
        Contender("SVDQuant, 16-bit branch", "mxfp4-a4+bf16", "svdquant", DIRECT),
        Contender("SVDQuant ×20 + scale search", "mxfp4-a4+bf16", "svdquant", {"rounds": 20}),
        Contender("SVDQuant, rotated as LoRaQ's", "mxfp4-a4+bf16-h32", "svdquant", DIRECT),
        Contender("LoRaQ, W8A8 branch, not rotated", "mxfp4-a4+w8a8-h0"),
        Contender("LoRaQ, W8A8 branch", "mxfp4-a4+w8a8"),
        Contender("LoRaQ, W4A8 branch", "mxfp4-a4+w4a8"),
        Contender("LoRaQ, INT4 main, W8A8 branch", "int4-a4+w8a8"),
    ),
    f"W4A4, {WITH}": with_statistics(
        Contender("GPTQ", "mxfp4-a4", "gptq"),
        Contender("SVDQuant + GPTQ, 16-bit branch", "mxfp4-a4+bf16", "gptq"),
        Contender("SVDQuant + GPTQ, rotated as LoRaQ's", "mxfp4-a4+bf16-h32", "gptq"),
        Contender("LoRaQ, W8A8 branch", "mxfp4-a4+w8a8"),
        Contender("LoRaQ, INT4 main, W8A8 branch", "int4-a4+w8a8"),
    ),
}
#: Rows that are measured on the digits alone, for time.
SMALL_ONLY = {
    "round to nearest, INT4, no search",
    "LQER, 16-bit branch",
    "LoRaQ, 16-bit branch",
    "LoRaQ, 4-bit branch",
    "LoRaQ, MXFP4 main, 6-bit branch",
    "LoRaQ, 6-bit branch, default effort",
    "LoRaQ, W8A8 branch, not rotated",
    "LoRaQ, INT5 main, 4-bit branch, 5.25 bits",
}
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
        Contender("no rotation in rank space", "mxfp4-a4+w8a8", options={"rotate": False}),
        Contender("no rotation of the input", "mxfp4-a4+w8a8-h0"),
        Contender("rotation of 128 channels' blocks", "mxfp4-a4+w8a8-h128"),
    ),
    f"Ablations, W4A16, {WITH}": with_statistics(
        Contender("LoRaQ, fast", "int4-a16+w6a6"),
        Contender("channels not weighed", "int4-a16+w6a6", options={"importance_damping": 1e6}),
        Contender("no feedback", "int4-a16+w6a6", options={"feedback_damping": 1e6}),
        Contender("effort default", "int4-a16+w6a6", effort="default"),
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


def comparisons(name: str) -> dict[str, Table]:
    """Return the tables that a run measures unless it is told which."""
    if name == "digits":
        return CONTENDERS | ABLATIONS
    return {
        title: tuple(row for row in rows if row.label not in SMALL_ONLY)
        for title, rows in CONTENDERS.items()
    }


def all_tables(name: str) -> dict[str, Table]:
    """Return every table of a world, those of `comparisons` first."""
    world = WORLDS[name]
    small = rotation() | activations() | statistics(world) if name == "digits" else {}
    return comparisons(name) | small | allocation(world) | kept_layers()
