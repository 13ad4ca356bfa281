"""LoRAs on the branch of a packed weight: what they add, and that each goes without a trace."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor

from loraq.appended import BranchStack, Part, append, branch_for, remove
from loraq.errors import LayerError
from loraq.linalg import relative_error
from loraq.methods import METHODS
from loraq.packed import PackedWeight
from loraq.scheme import Branch, Scheme

N_OUT, N_IN = 64, 96
#: The most that a format may leave of ΔW: twice what it leaves of factors it was made for.
BOUNDS = {
    "bf16": 0.004,
    "fp16": 0.001,
    "mxint8": 0.015,
    "int8": 0.015,
    "int8_b24": 0.015,
    "fp8_e4m3": 0.07,
    "mxfp8_e4m3": 0.07,
    "mxfp6_e2m3": 0.06,
    "mxfp4": 0.22,
    "int4": 0.16,
    "nvfp4": 0.18,
}


def weight(seed: int = 0) -> Tensor:
    return torch.randn(N_OUT, N_IN, generator=torch.Generator().manual_seed(seed)) / 8


def lora(rank: int, seed: int, size: float = 0.05) -> tuple[Tensor, Tensor]:
    """Factors with singular values and rows of many sizes, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(N_OUT, rank, generator=generator) * torch.logspace(0, -1, rank)
    up *= (torch.randn(N_OUT, 1, generator=generator) / 3).exp()
    return size * up, torch.randn(rank, N_IN, generator=generator)


def solve(scheme: Scheme, matrix: Tensor | None = None) -> PackedWeight:
    method = METHODS["svdquant" if scheme.branch else "rtn"]()
    return method.solve(weight() if matrix is None else matrix, scheme).packed


def put(
    packed: PackedWeight, stack: BranchStack, name: str, factors: tuple[Tensor, Tensor]
) -> tuple[PackedWeight, BranchStack, float]:
    rank = min(factors[0].shape[1], *packed.shape)
    branch = branch_for(packed.scheme, (), Branch(0, "mxint8", "mxint8", "int8"))
    return append(packed, stack, Part(name, "0" * 64, 1.0, 0, rank), branch, factors)


def bare(packed: PackedWeight) -> BranchStack:
    return BranchStack.of({}, packed.scheme)


def assert_same(ours: PackedWeight, theirs: PackedWeight) -> None:
    assert ours.scheme == theirs.scheme
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)


@pytest.mark.parametrize("rotation", [0, 32])
@pytest.mark.parametrize("rank", [8, 13])
@pytest.mark.parametrize("fmt", BOUNDS)
def test_the_weight_gains_the_lora_and_keeps_all_that_it_was(fmt, rank, rotation):
    before = solve(Scheme("mxfp4", "bf16", Branch(rank, fmt), rotation))
    up, down = lora(5, 1)
    after, stack, error = put(before, bare(before), "one", (up, down))
    change = after.reconstruct() - before.reconstruct()
    assert relative_error(up @ down, change) < BOUNDS[fmt]
    assert error == pytest.approx(relative_error(up @ down, change), rel=1e-3, abs=1e-6)
    assert torch.equal(after.main.packed, before.main.packed)
    assert after.main is before.main
    old, new = before.branch, after.branch
    assert torch.equal(
        new.proj_up.dequantize()[:, :rank].nan_to_num(9), old.proj_up.dequantize().nan_to_num(9)
    )
    assert torch.equal(new.proj_down.tensors["packed"][:rank], old.proj_down.packed)
    n_whole = rank * new.proj_up.format.bits // 8  # bytes that hold old codes only
    assert torch.equal(new.proj_up.packed[:, :n_whole], old.proj_up.packed[:, :n_whole])
    assert_same(remove(after, stack, "one")[0], before)


@pytest.mark.parametrize("fmt", BOUNDS)
@pytest.mark.parametrize("base", ["a branch", "none", "zeros"])
def test_several_are_removed_in_any_order(fmt, base):
    scheme = Scheme("mxfp4", "bf16", None if base == "none" else Branch(9, fmt))
    before = solve(scheme, torch.zeros(N_OUT, N_IN) if base == "zeros" else None)
    loras = {name: lora(rank, rank) for name, rank in (("a", 3), ("b", 8), ("c", 17))}
    full, full_stack, branch = before, bare(before), Branch(0, fmt)
    for name, factors in loras.items():
        part = Part(name, "0" * 64, 1.0, 0, factors[0].shape[1])
        full, full_stack, _ = append(full, full_stack, part, branch, factors)
    for order in permutations(loras):
        packed, stack, left = full, full_stack, dict(loras)
        for name in order:
            packed, stack = remove(packed, stack, name)
            del left[name]
            if left:
                exact = sum(up @ down for up, down in left.values())
                change = packed.reconstruct() - before.reconstruct()
                assert relative_error(exact, change) < 3 * BOUNDS[fmt]
        assert_same(packed, before)
        assert stack == bare(before)


def test_what_stays_of_a_lora_is_what_it_would_be_alone():
    before = solve(Scheme("mxfp4", "bf16", Branch(8, "mxint8")))
    alone, alone_stack, _ = put(before, bare(before), "b", lora(8, 2))
    both, stack, _ = put(before, bare(before), "a", lora(4, 1))
    both, stack, _ = put(both, stack, "b", lora(8, 2))
    left, left_stack = remove(both, stack, "a")
    assert_same(left, alone)
    assert left_stack == alone_stack


@pytest.mark.parametrize("fmt", ["mxint8", "int8", "mxfp4"])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
def test_the_size_of_a_lora_does_not_matter(fmt, size):
    before = solve(Scheme("mxfp4", "bf16", Branch(16, fmt)))
    up, down = lora(4, 1, size)
    after, stack, error = put(before, bare(before), "one", (up, down))
    assert error < BOUNDS[fmt]
    assert_same(remove(after, stack, "one")[0], before)


def test_a_lora_far_larger_than_an_nvfp4_branch_is_refused():
    """That has one scale above all others, which is full."""
    before = solve(Scheme("mxfp4", "bf16", Branch(16, "nvfp4")))
    with pytest.raises(LayerError, match="keeps too little of the LoRA"):
        put(before, bare(before), "one", lora(4, 1, 4.0))


def test_a_lora_wider_than_the_layer_takes_the_rank_of_the_layer():
    before = solve(Scheme("mxfp4", "bf16", Branch(60, "mxint8")))
    up, down = lora(200, 1)
    after, stack, error = put(before, bare(before), "one", (up, down))
    assert stack.loras[0].rank == N_OUT
    assert after.scheme.branch.rank == 128  # more than min(out, in)
    assert error < BOUNDS["mxint8"]


def test_a_lora_begins_at_a_block_and_takes_a_multiple_of_eight():
    stack = BranchStack(9, (Part("a", "", 1.0, 0, 5), Part("b", "", 1.0, 0, 16)))
    starts = {
        fmt: [part.start for part in stack.arranged(Branch(0, *fmt)).loras]
        for fmt in (
            ("bf16",),
            ("mxint8",),
            ("int4",),
            ("bf16", "mxint8"),
            ("mxint8", "mxint8", "int8"),
        )
    }
    assert list(starts.values()) == [[16, 24], [32, 64], [64, 128], [32, 64], [32, 64]]


def test_the_intermediate_is_as_large_as_it_was():
    """One scale a token holds for all ranks: neither part may drown the other."""
    before = solve(Scheme("mxfp4", "bf16", Branch(16, "mxint8", "bf16", "int8")))
    for size in (1e-3, 1e3):
        after, _, _ = put(before, bare(before), "one", lora(8, 1, size))
        rows = after.branch.proj_down.dequantize().norm(dim=-1)
        assert rows[32:40].max() == pytest.approx(rows[:16].max().item(), rel=0.02)


def test_a_lora_of_zeros_is_one():
    before = solve(Scheme("mxfp4", "bf16", Branch(8, "int8")))
    after, stack, error = put(before, bare(before), "one", (torch.zeros(N_OUT, 2), lora(2, 1)[1]))
    assert error == 0
    assert torch.equal(after.reconstruct(), before.reconstruct())
    assert_same(remove(after, stack, "one")[0], before)


def test_numbers_beyond_fp32_are_refused():
    before = solve(Scheme("mxfp4", "bf16", Branch(8, "mxint8")))
    up, down = lora(4, 1)
    for factors in ((up * torch.inf, down), (up * 1e30, down * 1e30)):
        with pytest.raises(LayerError, match=r"beyond fp32\. Use a smaller scale"):
            put(before, bare(before), "one", factors)


def test_what_could_not_be_restored_is_refused():
    before = solve(Scheme("mxfp4", "bf16", Branch(8, "int8")))
    up = before.branch.proj_up
    packed = up.packed.clone()
    packed[3] = 0  # a row of zeros under the scale of what was there
    odd = replace(before, branch=replace(before.branch, proj_up=replace(up, packed=packed)))
    factors = lora(4, 1)
    factors[0][3] = 0
    with pytest.raises(LayerError, match="could not be restored"):
        put(odd, bare(odd), "one", factors)


def test_a_layer_without_a_branch_takes_the_most_frequent_one():
    w8a8, bf16 = Branch(0, "mxint8", "mxint8", "int8"), Branch(0, "bf16")
    rounded, plain = Scheme("mxfp4", "mxint8"), Scheme("mxfp4")
    others = [replace(bf16, rank=3), replace(bf16, rank=5), replace(w8a8, rank=9)]
    assert branch_for(rounded, others, w8a8) == bf16
    assert branch_for(rounded, others[1:] + others[2:], bf16) == w8a8
    assert branch_for(rounded, [], w8a8) == w8a8
    assert branch_for(plain, [], w8a8) == Branch(0, "mxint8")
    own = replace(plain, branch=Branch(7, "int8"))
    assert branch_for(own, others, w8a8) == Branch(7, "int8")


GOOD = {"rank": 8, "loras": [{"name": "a", "sha256": "", "scale": 1, "start": 32, "rank": 5}]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda noted: "nothing",
        lambda noted: noted | {"loras": "nothing"},
        lambda noted: noted | {"loras": []},
        lambda noted: noted | {"rank": True},
        lambda noted: noted | {"rank": 33},
        lambda noted: noted | {"rank": -8},
        lambda noted: noted | {"kept": 3},
        lambda noted: noted | {"kept": "F32"},
        lambda noted: noted | {"loras": noted["loras"] * 2},
        lambda noted: noted | {"loras": [noted["loras"][0] | {"start": 8}]},
        lambda noted: noted | {"loras": [noted["loras"][0] | {"rank": 9}]},
        lambda noted: noted | {"loras": [noted["loras"][0] | {"rank": 0}]},
        lambda noted: noted | {"loras": [noted["loras"][0] | {"rank": 5.0}]},
        lambda noted: noted | {"loras": [noted["loras"][0] | {"name": "a\n"}]},
        lambda noted: noted | {"loras": [noted["loras"][0] | {"scale": "1"}]},
        lambda noted: noted | {"loras": [noted["loras"][0] | {"more": 1}]},
        lambda noted: noted | {"loras": [3]},
    ],
)
def test_a_record_that_contradicts_the_scheme_is_refused(damage):
    scheme = Scheme("mxfp4", "bf16", Branch(40, "mxint8"))
    stack = BranchStack.of({"appended": GOOD}, scheme)
    assert stack.note() == GOOD
    assert stack.base_of(scheme) == Scheme("mxfp4", "bf16", Branch(8, "mxint8"))
    with pytest.raises(ValueError, match="appended"):
        BranchStack.of({"appended": damage(GOOD)}, scheme)
