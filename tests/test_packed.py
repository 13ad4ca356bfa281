"""What a layer is in bytes: `PackedWeight`, and `LayerSolution` around it."""

import math

import pytest
import torch

from loraq.errors import FormatError
from loraq.formats import get_format
from loraq.packed import LayerSolution, LowRankBranch, PackedWeight
from loraq.scheme import Branch, Scheme
from loraq.transforms import rotate

SHAPE = (8, 64)
FORMATS = ("mxfp4", "int4", "nvfp4", "int5", "int8", "fp8_e4m3", "bf16")


def packed_of(main: str, branch: str | None = None, *, rotation: int = 0) -> PackedWeight:
    random = torch.Generator().manual_seed(0)
    weight, up, down = (torch.randn(shape, generator=random) for shape in (SHAPE, (8, 2), (2, 64)))
    stored = get_format(main).quantize(weight)
    if branch is None:
        return PackedWeight(Scheme(main, rotation=rotation), stored)
    fmt = get_format(branch)
    factors = LowRankBranch(proj_up=fmt.quantize(up), proj_down=fmt.quantize(down))
    return PackedWeight(Scheme(main, branch=Branch(2, branch), rotation=rotation), stored, factors)


@pytest.mark.parametrize("branch", [None, "mxint8", "nvfp4", "bf16"])
@pytest.mark.parametrize("main", FORMATS)
def test_its_tensors_are_those_of_the_scheme_and_make_it_again(main, branch):
    packed = packed_of(main, branch)
    storage = packed.scheme.storage(SHAPE)
    assert {name: tuple(t.shape) for name, t in packed.tensors.items()} == storage
    assert packed.nbytes == packed.scheme.nbytes(SHAPE)
    assert packed.bits_per_weight == 8 * packed.nbytes / (8 * 64)
    assert (packed.shape, packed.device.type) == (SHAPE, "cpu")
    again = PackedWeight.from_tensors(packed.tensors, packed.scheme, SHAPE)
    assert list(again.tensors) == list(packed.tensors)
    assert all(again.tensors[name] is tensor for name, tensor in packed.tensors.items())
    assert torch.equal(again.reconstruct(), packed.reconstruct())


def test_it_reconstructs_from_both_of_its_parts():
    plain, full = packed_of("int4"), packed_of("int4", "mxint8")
    assert torch.equal(plain.reconstruct(), plain.main.dequantize())
    up, down = full.branch.proj_up.dequantize(), full.branch.proj_down.dequantize()
    assert torch.equal(full.branch.reconstruct(), up @ down)
    assert torch.equal(full.reconstruct(), full.main.dequantize() + up @ down)


def test_what_was_rotated_is_rotated_back():
    packed = packed_of("int4", "mxint8", rotation=16)
    rotated = packed_of("int4", "mxint8").reconstruct()
    torch.testing.assert_close(rotate(packed.reconstruct(), 16), rotated)


def test_it_moves_to_a_device_as_a_whole():
    packed = packed_of("nvfp4", "mxint8")
    moved = packed.to("meta")
    assert moved.device.type == "meta"
    assert {t.device.type for t in moved.tensors.values()} == {"meta"}
    assert moved.scheme == packed.scheme
    assert moved.nbytes == packed.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"proj_up_scale": None},
            r"'proj_up_scale' is missing\. Raw bytes \(uint8\) of shape \(8, 1\)",
        ),
        ({"weight_packed": torch.zeros(8, 31, dtype=torch.uint8)}, r"uint8 of shape \(8, 31\)"),
        ({"weight_packed": torch.zeros(8, 32)}, r"'weight_packed' is torch\.float32 of shape"),
    ],
)
def test_bytes_that_do_not_fit_the_scheme_are_refused_by_name(change, message):
    packed = packed_of("int4", "mxint8")
    tensors = {name: t for name, t in (packed.tensors | change).items() if t is not None}
    with pytest.raises(FormatError, match=message):
        PackedWeight.from_tensors(tensors, packed.scheme, SHAPE)


def test_a_tenth_of_error_is_twenty_decibels():
    packed = packed_of("int4")
    assert LayerSolution(packed, 0.1).sqnr_db == pytest.approx(20)
    assert LayerSolution(packed, 0.0).sqnr_db == math.inf


def test_a_solution_tells_what_its_packed_weight_is():
    solution = LayerSolution(packed_of("int4", "mxint8"), 0.1)
    assert solution.nbytes == solution.packed.nbytes
    assert solution.bits_per_weight == solution.packed.bits_per_weight
    assert torch.equal(solution.reconstruct(), solution.packed.reconstruct())
