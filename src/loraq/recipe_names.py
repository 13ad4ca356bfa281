"""What the name of a recipe stands for: the grammar, the named recipes, and how both are read."""

import re
from dataclasses import replace

from loraq.errors import LoraqError, RecipeError, unknown
from loraq.formats import FORMATS, CastFormat, Format, get_format, is_format
from loraq.scheme import Branch, Scheme

GRAMMAR = """MAIN[-aBITS][+BRANCH[-rRANK]][-s][-hSIDE]

MAIN    format of the main weight, 4 to 8 bits: mxfp4, int4, nvfp4, mxint4, int5 …
BITS    activations of the main path: 4, 8 or 16, or a format's name; left out: 4 for a 4-bit MAIN,
        else 8. a16 is weight-only: the branch leaves its activations in 16 bits too, so that
        +w8a8 and +w8a16 are the same there
BRANCH  low-rank branch, its weights and activations: w8a8 (mxint8), w6a6 (mxfp6_e2m3), w6a8 and
        w4a8 (mxfp6_e2m3 or mxfp4 weights, mxint8 activations), all with the rank-space intermediate
        in int8, one scale a token; w8a16, w6a16 and w4a16, the same weights with activations and
        intermediate in 16 bits; or one format for all, such as bf16
RANK    rank of the branch; left out: as many as fit in the bytes of a 16-bit rank-32 branch, all
        scales counted
-s      smooth the input channels: x / s and W s, with s from statistics, which are required
SIDE    side of the Hadamard blocks that rotate the layer's input at run time and its weight
        beforehand, a power of two, or 0 for none; left out: 32 for 4-bit MX and INT activations
        beside a quantized branch, else none"""

_GRAMMAR_HINT = f"A name is {GRAMMAR.splitlines()[0]}; `loraq formats` explains each part."

#: Names beyond the grammar. The default is INT4 with INT8 activations, which today's CPUs multiply
#: (back ends int8_row and openvino), beside a branch whose weights alone are rounded; elsewhere it
#: runs with 16-bit activations (docs/decisions/0032-default-recipe.md).
NAMED = {"default": "int4-a8+w8a16"}

#: Names worth knowing, with a line for `loraq formats`.
SHOWCASE = {
    "default": (
        f"{NAMED['default']}: INT4 with an 8-bit branch on 16-bit activations; the 4-bit part runs "
        "in integers where a back end for them is asked for (int8_row), else in 16 bits, too"
    ),
    "int4-a8+int8": "the same with an INT8 branch, which runs in integers, too",
    "mxfp4-a8+w8a8": "MX formats throughout, block scales of 8 bits: nothing in it has 16",
    "mxfp4+w8a8": (
        "W4A4 with an 8-bit branch; mxfp4-a8+w8a8 and mxfp4-a16+w8a8 for wider activations"
    ),
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

#: The named branch precisions. With rounded activations the intermediate is int8: it is never
#: stored, small, and at 6 bits costs more than everything else in the branch; with power-of-two
#: scales the velocity error is mostly larger (docs/log.md).
BRANCHES = {
    "w8a8": Branch(weight="mxint8", activation="mxint8", intermediate="int8"),
    "w6a6": Branch(weight="mxfp6_e2m3", activation="mxfp6_e2m3", intermediate="int8"),
    "w6a8": Branch(weight="mxfp6_e2m3", activation="mxint8", intermediate="int8"),
    "w4a8": Branch(weight="mxfp4", activation="mxint8", intermediate="int8"),
    "w8a16": Branch(weight="mxint8"),
    "w6a16": Branch(weight="mxfp6_e2m3"),
    "w4a16": Branch(weight="mxfp4"),
}

_NAME = re.compile(
    r"(?P<main>[a-z0-9_]+)(?:-a(?P<bits>[a-z0-9_]+))?"
    r"(?:\+(?P<branch>[a-z0-9_]+)(?:-r(?P<rank>[0-9]{1,9}))?)?(?P<smoothing>-s)?"
    r"(?:-h(?P<rotation>[0-9]{1,9}))?"
)
#: The grammar before this one, in which a name looked like that of a layer with the branch's
#: precision.
_OLD_NAME = re.compile(
    r"(?P<main>[a-z0-9_]+)(?:-(?P<branch>(?![rha]\d)[a-z][a-z0-9_]*))??(?:-r(?P<rank>[0-9]{1,9}))?"
    r"(?:-h(?P<rotation>[0-9]{1,9}))?(?:-a(?P<bits>[a-z0-9_]+))?"
)


def parse_scheme(name: str) -> Scheme:
    """Return the scheme that a name of the grammar stands for.

    Raises:
        RecipeError: the name does not follow `GRAMMAR`.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise RecipeError(_explain_unreadable(name))
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
            "8 bits."
        )
    activation = _parse_activation(name, main, parts["bits"])
    branch = None
    if parts["branch"] is not None:
        branch = _parse_branch(name, parts["branch"], parts["rank"])
        if parts["bits"] == "16":  # weight-only, so the branch leaves its activations alone too
            branch = Branch(rank=branch.rank, weight=branch.weight)
    if parts["rotation"] is not None:
        rotation = int(parts["rotation"])
    elif branch is None or isinstance(branch.weight_format, CastFormat):
        rotation = 0
    else:
        rotation = get_format(activation).rotation
    return Scheme(main.name, activation, branch, rotation, parts["smoothing"] is not None)


def _parse_activation(name: str, main: Format, bits: str | None) -> str:
    """Return the format that BITS of a recipe name stands for beside MAIN."""
    bits = bits or ("4" if main.bits == 4 else "8")
    named = {str(width): fmt for width, fmt in main.activations.items()}
    activation = {"16": "bf16", **named}.get(bits, bits)
    if is_format(activation):
        return activation
    if bits in ("4", "8"):
        raise RecipeError(
            f"Recipe name '{name}': '{main.name}' has no default activations of {bits} bits. Name "
            f"their format, as in '{main.name}-amxint8', or write '{main.name}-a16' to leave them "
            "as they are."
        )
    raise RecipeError(
        f"Recipe name '{name}': activations 'a{bits}'. Use -a4, -a8, -a16, or -a and a format's "
        "name."
    )


def _parse_branch(name: str, branch: str, rank: str | None) -> Branch:
    """Return the branch that BRANCH and RANK of a recipe name stand for."""
    if rank is not None and int(rank) < 1:
        raise RecipeError(
            f"Recipe name '{name}': rank 0. Use a rank of at least 1, or leave it to the budget."
        )
    if branch in BRANCHES:
        return replace(BRANCHES[branch], rank=int(rank or 0))
    if is_format(branch):
        return Branch(rank=int(rank or 0), weight=branch, activation=branch)
    if branch in ("w16", "w16a16"):
        raise RecipeError(
            f"Recipe name '{name}': Unknown branch '{branch}'. One of 16 bits is called 'bf16'."
        )
    raise RecipeError(f"Recipe name '{name}': {unknown('branch', branch, (*BRANCHES, *FORMATS))}")


def _explain_unreadable(name: str) -> str:
    """Message for a name outside the grammar; a name of the old one gets its new spelling."""
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
            return (
                f"The recipe name '{name}' is written '{new}': the branch stands behind a +. "
                f"{_GRAMMAR_HINT}"
            )
    return f"Cannot read the recipe name '{name}'. {_GRAMMAR_HINT}"
