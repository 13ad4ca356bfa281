"""Which schemes run the same stored bytes with activations of other precisions."""

from dataclasses import replace

import pytest

from loraq.errors import KernelError
from loraq.precision import PRECISIONS, schemes_at
from loraq.recipe_names import parse_scheme

STORED = [
    parse_scheme(name)
    for name in ("mxfp4+w8a8-r8", "int4-a8+int8-r8", "nvfp4", "mxint4-a16+w6a6-r8", "int5-a8-h32")
]


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_activations_differ_from_what_is_stored(stored, precision):
    schemes = schemes_at(stored, precision)
    assert schemes
    assert len(set(schemes)) == len(schemes)
    for scheme in schemes:
        branch = stored.branch and replace(
            scheme.branch,
            activation=stored.branch.activation,
            intermediate=stored.branch.intermediate,
        )
        assert replace(scheme, activation=stored.activation, branch=branch) == stored
        assert scheme.storage((64, 64)) == stored.storage((64, 64))


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_each_has_the_bits_that_were_asked_for(stored):
    assert schemes_at(stored, "stored") == (stored,)
    (wide,) = schemes_at(stored, "a16")
    assert wide.is_weight_only
    assert wide.rotation == stored.rotation
    for bits in (8, 4):
        found = schemes_at(stored, f"a{bits}")
        assert {scheme.activation_format.bits for scheme in found} == {bits}
        if stored.activation_format.bits == bits:
            assert found[0] == stored
        else:
            assert found[0].activation == stored.weight_format.activations[bits]


def test_formats_that_some_device_multiplies_are_among_them():
    names = {scheme.activation for scheme in schemes_at(parse_scheme("mxfp4+w8a8-r8"), "a8")}
    assert names >= {"mxint8", "int8", "mxfp8_e4m3", "fp8_e4m3"}
    whole = [
        scheme
        for scheme in schemes_at(parse_scheme("mxfp4+w8a8-r8"), "a8")
        if scheme.activation == scheme.branch.activation == "mxfp8_e4m3"
    ]
    assert whole[0].branch.intermediate is None  # as the Triton kernel wants it


def test_an_unknown_precision_is_answered_with_the_list():
    with pytest.raises(KernelError, match=r"Unknown precision of activations 'a7'.*a16, a4, a8"):
        schemes_at(STORED[0], "a7")
