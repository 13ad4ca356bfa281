"""The grammar of recipe names: what each name means, and how a wrong one is answered."""

import re

import pytest

from loraq.errors import RecipeError
from loraq.formats import FORMATS, get_format
from loraq.recipe import Recipe
from loraq.recipe_names import GRAMMAR, NAMED, SHOWCASE, parse_scheme
from loraq.scheme import Scheme

#: What the branch names mean: weight, activation, intermediate.
W8A8 = ("mxint8", "mxint8", "int8")
W6A6 = ("mxfp6_e2m3", "mxfp6_e2m3", "int8")
W6A8 = ("mxfp6_e2m3", "mxint8", "int8")
W4A8 = ("mxfp4", "mxint8", "int8")
W16A16 = ("bf16", "bf16", None)

#: The canonical meaning of names: main weight, its activations, rank (0 is left to the budget),
#: branch formats.
MEANING = {
    "mxfp4": ("mxfp4", "mxfp4", None, None),
    "mxfp4+w8a8": ("mxfp4", "mxfp4", 0, W8A8),
    "mxfp4+w6a6": ("mxfp4", "mxfp4", 0, W6A6),
    "mxfp4+w6a8": ("mxfp4", "mxfp4", 0, W6A8),
    "mxfp4-a8+w6a8": ("mxfp4", "mxint8", 0, W6A8),
    "mxfp4+w4a8": ("mxfp4", "mxfp4", 0, W4A8),
    "mxfp4-a8+w8a16": ("mxfp4", "mxint8", 0, ("mxint8", "bf16", None)),
    "int4-aint8+w6a16": ("int4", "int8", 0, ("mxfp6_e2m3", "bf16", None)),
    "mxfp4+w4a16-r64": ("mxfp4", "mxfp4", 64, ("mxfp4", "bf16", None)),
    "mxfp4+bf16": ("mxfp4", "mxfp4", 0, W16A16),
    "mxfp4+bf16-r32": ("mxfp4", "mxfp4", 32, W16A16),
    "mxfp4+w8a8-r64": ("mxfp4", "mxfp4", 64, W8A8),
    "mxfp4-a4+w8a8-r64": ("mxfp4", "mxfp4", 64, W8A8),
    "mxfp4-a8+w8a8": ("mxfp4", "mxint8", 0, W8A8),
    "mxfp4-a8+w6a6": ("mxfp4", "mxint8", 0, W6A6),
    "mxfp4-a16+w8a8": ("mxfp4", "bf16", 0, ("mxint8", "bf16", None)),
    "mxfp4-a16+w6a6": ("mxfp4", "bf16", 0, ("mxfp6_e2m3", "bf16", None)),
    "mxfp4-a16": ("mxfp4", "bf16", None, None),
    "mxfp4-amxfp8_e4m3": ("mxfp4", "mxfp8_e4m3", None, None),
    "mxfp4-amxint8+bf16-r32": ("mxfp4", "mxint8", 32, W16A16),
    "mxfp4-amxfp8_e4m3+w8a8-r64": ("mxfp4", "mxfp8_e4m3", 64, W8A8),
    "mxfp4+mxint8": ("mxfp4", "mxfp4", 0, ("mxint8", "mxint8", None)),
    "mxfp4+mxfp6_e3m2-r85": ("mxfp4", "mxfp4", 85, ("mxfp6_e3m2", "mxfp6_e3m2", None)),
    "mxfp4+nvfp4-r8": ("mxfp4", "mxfp4", 8, ("nvfp4", "nvfp4", None)),
    "mxfp4+int4-r8": ("mxfp4", "mxfp4", 8, ("int4", "int4", None)),
    "mxfp4+fp16-r8": ("mxfp4", "mxfp4", 8, ("fp16", "fp16", None)),
    "nvfp4+w8a8": ("nvfp4", "nvfp4", 0, W8A8),
    "nvfp4+bf16-r32": ("nvfp4", "nvfp4", 32, W16A16),
    "nvfp4-a8": ("nvfp4", "mxint8", None, None),
    "int4+bf16-r32": ("int4", "int4", 32, W16A16),
    "int4-a16+bf16-r32": ("int4", "bf16", 32, W16A16),
    "int4-a8+w8a8": ("int4", "int8", 0, W8A8),
    "int4_b128-a16": ("int4_b128", "bf16", None, None),
    "mxint4+w8a8": ("mxint4", "mxint4", 0, W8A8),
    "mxint4-a8": ("mxint4", "mxint8", None, None),
    "int5": ("int5", "int8", None, None),
    "int5-a16": ("int5", "bf16", None, None),
    "int6-a4": ("int6", "int4", None, None),
    "int8": ("int8", "int8", None, None),
    "int8_b64-a16": ("int8_b64", "bf16", None, None),
    "mxint6": ("mxint6", "mxint8", None, None),
    "mxfp6_e3m2": ("mxfp6_e3m2", "mxint8", None, None),
    "fp8_e4m3": ("fp8_e4m3", "fp8_e4m3", None, None),
    "fp8_e4m3-a4+w8a8-r4": ("fp8_e4m3", "mxfp4", 4, W8A8),
}


def meaning(scheme: Scheme) -> tuple:
    branch = scheme.branch
    if branch is None:
        return scheme.weight, scheme.activation, None, None
    return (
        scheme.weight,
        scheme.activation,
        branch.rank,
        (branch.weight, branch.activation, branch.intermediate),
    )


@pytest.mark.parametrize(("name", "expected"), MEANING.items())
def test_a_name_has_one_meaning(name, expected):
    scheme = parse_scheme(name)
    assert meaning(scheme) == expected
    assert Recipe.named(name) == Recipe(scheme)
    assert Recipe.of(name) == Recipe(scheme)


@pytest.mark.parametrize("name", [*SHOWCASE, *NAMED.values()])
def test_a_name_worth_knowing_can_be_used_and_fits_a_layer(name):
    scheme = Recipe.of(name).scheme_for("blocks.0.attn.to_q", (1152, 1152))
    assert scheme is not None
    assert scheme.nbytes((1152, 1152)) < 1152 * 1152


@pytest.mark.parametrize("main", ["mxfp4", "nvfp4", "int4", "mxint4", "int5"])
@pytest.mark.parametrize(
    "branch",
    ["", "+bf16", "+w8a8", "+w6a6", "+w6a8", "+w4a8", "+w8a16", "+w4a16", "+bf16-r32", "+w8a8-r7"],
)
@pytest.mark.parametrize("width", ["", "-a4", "-a8", "-a16"])
def test_any_combination_can_be_asked_for(main, branch, width):
    scheme = parse_scheme(main + width + branch)
    assert scheme.weight == main
    assert (scheme.branch is None) == (branch == "")
    bits = int(width[2:] or (8 if main == "int5" else 4))
    assert get_format(scheme.activation).bits == bits
    if bits == 16 and scheme.branch is not None:
        assert (
            scheme.branch.activation_format
            == scheme.branch.intermediate_format
            == get_format("bf16")
        )


@pytest.mark.parametrize("main", [name for name in FORMATS if FORMATS[name].bits <= 8])
def test_every_format_of_up_to_8_bits_can_be_the_main_one(main):
    for width in ("", "-a4", "-a8", "-a16"):
        assert parse_scheme(main + width).weight == main


def test_every_format_can_be_that_of_the_branch_or_of_the_activations():
    for name in FORMATS:
        assert parse_scheme(f"mxfp4+{name}-r8").branch.weight == name
        assert parse_scheme(f"mxfp4-a{name}").activation == name


def test_the_default_stores_no_16_bit_part_and_rounds_what_the_4_bit_part_reads():
    scheme = Recipe.named("default").scheme
    assert scheme.branch is not None
    formats = (scheme.weight, scheme.activation, scheme.branch.weight)
    assert all(get_format(name).bits < 16 for name in formats)


def test_the_grammar_explains_its_own_words():
    words = set(re.findall(r"\bw\d+a\d+\b", GRAMMAR))
    assert words == {"w8a8", "w6a6", "w6a8", "w4a8", "w8a16", "w6a16", "w4a16"}
    for word in words:
        assert parse_scheme(f"mxfp4+{word}").branch is not None
    for word in re.findall(r"^MAIN .*: (.*) …$", GRAMMAR, re.MULTILINE)[0].split(", "):
        assert parse_scheme(word).weight == word
    assert "a16" in GRAMMAR


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"Cannot read the recipe name ''.*MAIN\[-aBITS\]\[\+BRANCH"),
        ("MXFP4-w8a8", r"Cannot read the recipe name 'MXFP4-w8a8'.*MAIN\[-aBITS\]\[\+BRANCH"),
        ("mxfp4_w8a8!", r"Cannot read the recipe name.*MAIN\[-aBITS\]\[\+BRANCH"),
        ("mxfp4 ", "Cannot read the recipe name 'mxfp4 '"),
        ("mxfp4-", "Cannot read the recipe name"),
        ("mxfp4+", "Cannot read the recipe name"),
        ("+w8a8", "Cannot read the recipe name"),
        ("mxfp4-r8+w8a8", "Cannot read the recipe name"),
        ("mxfp4+w8a8-a8", "Cannot read the recipe name"),
        ("mxfp4--a8", "Cannot read the recipe name"),
        ("mxfp4+w8a8-r-8", "Cannot read the recipe name"),
        (
            "mxfp5",
            r"'mxfp5': Unknown number format 'mxfp5'\. Did you mean 'mxfp4'.*Named recipes: "
            r"default",
        ),
        ("defualt", r"Unknown number format 'defualt'.*Named recipes: default"),
        ("int4_b12", r"Block size 12 .* not a multiple of 8"),
        ("bf16", r"MAIN 'bf16' has 16 bits\. Use a format of 4 to 8 bits"),
        ("fp16+w8a8-r8", "MAIN 'fp16' has 16 bits"),
        ("mxfp4+w8a9", r"Unknown branch 'w8a9'\. Did you mean 'w8a8'.*bf16"),
        ("mxfp4+w4a4-r8", r"Unknown branch 'w4a4'.*w4a8"),
        ("mxfp4+w16a16", r"Unknown branch 'w16a16'. One of 16 bits is called 'bf16'"),
        ("mxfp4+w16", r"Unknown branch 'w16'. One of 16 bits is called 'bf16'"),
        ("mxfp4+rtn", "Unknown branch 'rtn'"),
        ("mxfp4-a5+w8a8", r"activations 'a5'\. Use -a4, -a8, -a16"),
        ("mxfp4-amxfp5", r"activations 'amxfp5'\. Use -a4, -a8, -a16"),
        ("mxfp4+bf16-r0", r"rank 0\. Use a rank of at least 1"),
        ("mxfp4-a8+w8a8-r0", "rank 0"),
        pytest.param(
            "mxfp4+w8a8-r" + "9" * 5000, "Cannot read the recipe", id="a rank of 5000 digits"
        ),
        pytest.param("int4_b" + "9" * 5000, "Unknown number format", id="a block of 5000 digits"),
        ("mxfp4+w8a8-r3２", "Cannot read the recipe"),
    ],
)
def test_a_name_outside_the_grammar_is_refused(name, message):
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        Recipe.named(name)
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        Recipe.of(name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mxfp4-w8a8", "mxfp4+w8a8"),
        ("mxfp4-w8a8-a8", "mxfp4-a8+w8a8"),
        ("int4-w6a6-r85-a16", "int4-a16+w6a6-r85"),
        ("mxfp4-r32", "mxfp4+bf16-r32"),
        ("int4-w16a16-r32-a16", "int4-a16+bf16-r32"),
        ("mxfp4-w8a8-r64-h0-a4", "mxfp4-a4+w8a8-r64-h0"),
        ("mxfp4-mxfp8_e4m3-r8-amxfp8_e4m3", "mxfp4-amxfp8_e4m3+mxfp8_e4m3-r8"),
    ],
)
def test_a_name_of_the_old_grammar_is_answered_with_the_new_spelling(old, new):
    with pytest.raises(RecipeError, match=re.escape(f"'{old}' is written '{new}'")):
        Recipe.of(old)
    assert parse_scheme(new)


@pytest.mark.parametrize("what", [None, 4, 4.5, b"mxfp4", ["mxfp4"]])
def test_what_is_no_recipe_is_refused(what):
    with pytest.raises(RecipeError):
        Recipe.of(what)
