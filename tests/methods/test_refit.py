"""Branch and main weight answer each other: what a turn is worth, and where there is none."""

from dataclasses import replace

import pytest
import torch
from correlated_inputs import correlated, output_error, stats_of
from torch import Tensor

from benchmarks.worlds.matrices import dit_like
from loraq.methods import GPTQ, LoRaQ
from loraq.methods.inputs import Inputs
from loraq.methods.refit import Turns
from loraq.recipe_names import parse_scheme
from loraq.stats import ActivationStats

WEIGHT, X = dit_like(64, 96), correlated(2000, 96)
STATS = stats_of(X)
FAST = LoRaQ.at("fast")


def packed(method, name: str, stats: ActivationStats | None = STATS) -> list[Tensor]:
    solution = method.solve(WEIGHT, parse_scheme(f"{name}-r8"), stats=stats)
    return list(solution.packed.tensors.values())


def turns(
    name: str, count: int = 1, stats: ActivationStats | None = STATS, weight: Tensor = WEIGHT
):
    scheme = parse_scheme(f"{name}-r8")
    inputs = Inputs(stats, activation=scheme.activation_format)
    main = scheme.weight_format.quantize(weight, "search")
    return list(Turns(scheme.branch, count, "search", False, 0).take(weight, main, inputs))


@pytest.mark.parametrize(
    "name", ["int4-a16+bf16", "int4-aint8+int8", "nvfp4-a16+w8a8", "int4-a8+bf16"]
)
@pytest.mark.parametrize("method", [FAST, GPTQ(), GPTQ(noise_filter=True)], ids=repr)
def test_outputs_are_nearer_with_it(method, name):
    errors = [
        output_error(
            X,
            WEIGHT,
            replace(method, refits=count).solve(WEIGHT, parse_scheme(f"{name}-r8"), stats=STATS),
        )
        for count in (0, 2)
    ]
    assert errors[1] < 0.97 * errors[0]


def test_the_objective_is_never_more_with_it():
    for name in ("int4-a16+w8a8-r8", "int4-a4+bf16-r8-h32", "mxfp4-a8+w8a8-r8"):
        without, with_it = (
            replace(FAST, refits=count)
            .solve(WEIGHT, parse_scheme(name), stats=STATS)
            .metrics["objective"]
            for count in (0, 3)
        )
        assert with_it <= without, name


def test_no_other_up_projection_would_be_better():
    ((branch, main),) = turns("int4-a16+bf16")
    moment = Inputs(STATS).moment
    left = WEIGHT.double() - main.dequantize() - branch.reconstruct()
    # The gradient of tr(E H Eᵀ) in U is −2 E H Dᵀ: zero but for the rounding of U to bf16.
    down = branch.proj_down.dequantize().double()
    gradient = left @ moment @ down.mT
    scale = left.norm() * (moment @ down.mT).norm()
    assert gradient.norm() < 0.01 * scale


def test_what_the_main_weight_does_where_the_branch_reads_is_left_to_the_branch():
    ((branch, main),) = turns("int4-a16+bf16")
    plain = Inputs(STATS).round(branch.subtract_from(WEIGHT), main.format, "search")
    inputs = Inputs(STATS)
    errors = [
        inputs.error_energy(WEIGHT - stored.dequantize() - branch.reconstruct())
        for stored in (main, plain)
    ]
    # Rounded for this branch as it is, the weight would leave less than rounded for any other.
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", ["int4-a16+w6a6", "int4-a16+w4a8"])
def test_factors_of_few_bits_are_not_refitted(name):
    # Nothing absorbs their rounding.
    for method in (FAST, GPTQ()):
        for first, second in zip(
            packed(replace(method, refits=0), name),
            packed(replace(method, refits=2), name),
            strict=True,
        ):
            assert torch.equal(first, second)


@pytest.mark.parametrize(
    "stats", [None, stats_of(X, full=False)], ids=["no statistics", "mean squares"]
)
def test_without_all_second_moments_there_is_no_turn(stats):
    assert turns("int4-a16+bf16", stats=stats) == []
    for first, second in zip(
        packed(replace(FAST, refits=0), "int4-a16+w8a8", stats),
        packed(FAST, "int4-a16+w8a8", stats),
        strict=True,
    ):
        assert torch.equal(first, second)


def test_the_same_seed_gives_the_same_bytes():
    for first, second in zip(
        packed(FAST, "int4-aint8+int8"), packed(FAST, "int4-aint8+int8"), strict=True
    ):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["int4-a16+bf16", "int4-a4+w8a8", "nvfp4-a16+w8a8"])
@pytest.mark.parametrize(
    "moment",
    [torch.zeros(96, 96), torch.ones(96, 96), torch.eye(96) * 1e-30, torch.eye(96) * 1e36],
    ids=["nothing seen", "one direction", "tiny", "huge"],
)
@pytest.mark.parametrize(
    "weight",
    [WEIGHT, 1e4 * WEIGHT, torch.zeros(64, 96), torch.ones(64, 96)],
    ids=["usual", "large", "zeros", "ones"],
)
def test_odd_inputs_and_weights_are_no_trouble(name, moment, weight):
    for branch, main in turns(name, 2, ActivationStats(10, moment), weight):
        left = weight - main.dequantize() - branch.reconstruct()
        assert left.isfinite().all()
        assert left.norm() <= 0.5 * weight.norm()
