"""LoRaQ: never worse than its start, hot enough to be better, and aware of activation noise."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.worlds.matrices import (
    dit_like,
    gaussian,
    heavy_tailed,
    low_rank,
    outlier_columns,
)
from loraq.errors import SchemeError
from loraq.formats import FORMATS, get_format
from loraq.methods import EFFORTS, RTN, LoRaQ, SVDQuant, layer_seed
from loraq.methods.noise import ActivationNoise, rounding_noise
from loraq.nn import QuantizedLinear
from loraq.packed import LayerSolution
from loraq.recipe_names import parse_scheme
from loraq.scheme import Branch, Scheme


def one_outlier_column(m: int, n: int) -> torch.Tensor:
    weight = gaussian(m, n)
    weight[:, 17] *= 100
    return weight


def low_rank_and_tiny_noise(m: int, n: int) -> torch.Tensor:
    return low_rank(m, n, 4) + 1e-4 * gaussian(m, n, seed=2)


def sparse(m: int, n: int) -> torch.Tensor:
    return gaussian(m, n) * (torch.rand(m, n, generator=torch.Generator().manual_seed(1)) < 0.05)


HARD = [
    dit_like,
    gaussian,
    heavy_tailed,
    outlier_columns,
    one_outlier_column,
    low_rank_and_tiny_noise,
    sparse,
]
each_matrix = pytest.mark.parametrize("matrix", HARD, ids=lambda matrix: matrix.__name__)
each_main = pytest.mark.parametrize("main", ["int4", "mxfp4", "nvfp4", "mxint4"])
each_branch = pytest.mark.parametrize("branch", ["bf16", "mxint8", "mxfp6_e2m3", "mxfp4"])

FEW_STEPS = LoRaQ(steps=4, refine_steps=2)
#: Nothing, too little, enough, and steps that only harm: the promise to be never worse must not
#: depend on them.
SETTINGS = {
    "no_steps": LoRaQ(steps=0, refine_steps=0),
    "few_steps": FEW_STEPS,
    "default": LoRaQ(),
    "far_too_hot": LoRaQ(steps=5, refine_steps=0, heat=50.0, leverage_cap=math.inf),
}


def objective(solution: LayerSolution) -> float:
    """J of a solution for a weight of norm 1, from what is stored: the main rounding error is
    the whole error.
    """
    assert solution.packed.branch is not None
    scheme = solution.packed.scheme
    assert scheme.branch is not None
    noise = ActivationNoise.of(scheme, scheme.branch)
    main, branch = (
        solution.packed.main.dequantize().double(),
        solution.packed.branch.reconstruct().double(),
    )
    return solution.relative_error**2 + float(
        noise.main * main.square().sum() + noise.branch * branch.square().sum()
    )


def objective_without_branch(solution: LayerSolution, scheme: Scheme) -> float:
    """J of round-to-nearest for a weight of norm 1, with the activation formats of a scheme."""
    main = solution.packed.main.dequantize().double()
    return solution.relative_error**2 + float(
        rounding_noise(scheme.activation) * main.square().sum()
    )


def of_unit_norm(weight: torch.Tensor) -> torch.Tensor:
    return weight / torch.linalg.vector_norm(weight)


def output_error(weight: torch.Tensor, solution: LayerSolution, x: torch.Tensor) -> float:
    layer = QuantizedLinear.from_packed(solution.packed)
    layer.backend = "reference"
    exact = x @ weight.T
    return (torch.linalg.vector_norm(layer(x) - exact) / torch.linalg.vector_norm(exact)).item()


# --- never worse ----------------------------------------------------------------------------------


def better_than(settings: LoRaQ, weight: torch.Tensor, scheme: Scheme) -> list[str]:
    """Return the baselines that leave less error than LoRaQ; there must be none."""
    error = settings.solve(weight, scheme, seed=5).relative_error
    baselines = {
        f"{kind.name}, {rule}": kind(scale_rule=rule).solve(weight, of, seed=5).relative_error
        for kind, of in ((SVDQuant, scheme), (RTN, Scheme(scheme.weight)))
        for rule in (None, "search")
    }
    return [name for name, theirs in baselines.items() if error > theirs * (1 + 1e-6)]


@each_branch
@each_main
def test_it_is_never_worse_than_one_shot_svdquant_or_round_to_nearest(main, branch):
    scheme = Scheme(main, branch=Branch(6, branch))
    beaten = {matrix.__name__: better_than(FEW_STEPS, matrix(48, 96), scheme) for matrix in HARD}
    assert not any(beaten.values()), beaten


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@each_matrix
def test_it_is_never_worse_whatever_its_settings(matrix, settings):
    for main, branch in (("int4", "mxint8"), ("mxfp4", "mxfp4")):
        scheme = Scheme(main, branch=Branch(6, branch))
        assert not better_than(settings, matrix(48, 96), scheme), scheme


@pytest.mark.parametrize(
    "activations", [("mxfp4", "mxfp4", None), ("int4", "mxint8", "bf16")], ids=str
)
@each_branch
@each_matrix
def test_with_4_bit_activations_the_promise_is_about_the_objective(matrix, branch, activations):
    weight = of_unit_norm(matrix(48, 96))
    scheme = Scheme("mxfp4", activations[0], Branch(6, branch, *activations[1:]))
    price = objective(FEW_STEPS.solve(weight, scheme))
    assert price <= objective(SVDQuant(scale_rule=FEW_STEPS.scale_rule).solve(weight, scheme)) * (
        1 + 1e-5
    )
    assert price <= objective_without_branch(RTN().solve(weight, Scheme("mxfp4")), scheme) * (
        1 + 1e-5
    )


def test_under_4_bit_activations_the_annealing_finds_a_better_branch_than_it_starts_from():
    # At the pace of quiet activations, too hot for the noise term, it finds next to none.
    scheme = parse_scheme("nvfp4-a4+w4a8-r18")
    for seed in range(3):
        weight = dit_like(192, 192, seed)
        found = LoRaQ.at("fast").solve(weight, scheme, seed=seed).metrics
        hot = replace(LoRaQ.at("fast"), heat=1.8, final_step=1.5)
        assert found["optimized"] == 1
        assert found["objective"] < hot.solve(weight, scheme, seed=seed).metrics["objective"]


@each_branch
def test_the_metrics_are_the_objective_and_that_of_the_start(branch):
    weight = of_unit_norm(dit_like(48, 96))
    for activations in (("bf16", "bf16"), ("mxfp4", "mxint8")):
        scheme = Scheme("mxfp4", activations[0], Branch(6, branch, activations[1]))
        solution = LoRaQ().solve(weight, scheme)
        start = SVDQuant().solve(weight, scheme)
        assert solution.metrics["objective"] == pytest.approx(objective(solution) ** 0.5, rel=1e-4)
        # Where the intermediate is rounded, the start is rotated in rank space, and its factors
        # round otherwise.
        same = 1e-4 if activations[1] == "bf16" else 0.02
        assert solution.metrics["start_objective"] == pytest.approx(
            objective(start) ** 0.5, rel=same
        )
        assert solution.metrics["objective"] <= solution.metrics["start_objective"]


def test_without_activation_noise_the_objective_is_the_weight_error():
    solution = LoRaQ().solve(dit_like(48, 96), Scheme("int4", branch=Branch(6)))
    assert solution.metrics["objective"] == pytest.approx(solution.relative_error, rel=1e-4)


# --- how good -------------------------------------------------------------------------------------

# LoRaQ with rank 24 at 8 bits over SVDQuant with rank 12 at 16 bits and direct scales: the same
# nominal bytes. Measured 0.502 to 0.514, 0.528 to 0.540 and 0.551 to 0.560 on seeds 0 to 2.
CLAIMS = {"int4": 0.53, "mxfp4": 0.555, "nvfp4": 0.575}


@pytest.mark.parametrize(("main", "claim"), CLAIMS.items(), ids=CLAIMS.keys())
def test_an_8_bit_branch_nearly_halves_the_error_of_svdquant(main, claim):
    weight = dit_like(384, 384)
    baseline = SVDQuant(scale_rule=None).solve(weight, Scheme(main, branch=Branch(12)))
    solution = LoRaQ().solve(weight, Scheme(main, branch=Branch(24, "mxint8")))
    assert solution.relative_error <= claim * baseline.relative_error


@pytest.mark.parametrize(
    ("main", "branch", "gain"),
    # At this size a 4-bit branch has converged at "default": over seeds 0 to 3 "best" gains -0.2 to
    # 0.5 %.
    [
        ("int4", "bf16", 0.02),
        ("int4", "mxint8", 0.02),
        ("mxfp4", "mxint8", 0.02),
        ("mxfp4", "mxfp4", -0.005),
    ],
)
def test_more_effort_is_a_smaller_error(main, branch, gain):
    weight, scheme = dit_like(256, 256), Scheme(main, branch=Branch(16, branch))
    fast, default, best = (
        LoRaQ.at(effort).solve(weight, scheme).relative_error for effort in EFFORTS
    )
    assert default < 0.98 * fast
    assert best < (1 - gain) * default


def test_efforts_are_more_and_more_steps_and_an_unknown_one_is_an_error():
    steps = [LoRaQ.at(effort).steps + LoRaQ.at(effort).refine_steps for effort in EFFORTS]
    assert list(EFFORTS) == ["fast", "default", "best"]
    assert steps == sorted(steps)
    assert LoRaQ.at("default") == LoRaQ()
    with pytest.raises(SchemeError, match=r"effort 'slow'.*best, default, fast"):
        LoRaQ.at("slow")


def test_annealing_beats_alternation():
    weight, scheme = dit_like(192, 256), Scheme("int4", branch=Branch(8))
    alternated = SVDQuant(rounds=100).solve(weight, scheme).relative_error
    assert LoRaQ().solve(weight, scheme).relative_error < 0.92 * alternated


def test_full_rank_in_16_bits_leaves_nearly_no_error():
    assert LoRaQ().solve(dit_like(64, 96), Scheme("int4", branch=Branch(64))).relative_error < 1e-3


@each_main
def test_scaling_by_a_power_of_four_changes_nothing(main):
    # Squares and roots of the scale are powers of two, so every step is the same one.
    weight, scheme, method = (
        dit_like(48, 96),
        Scheme(main, branch=Branch(6, "mxint8")),
        LoRaQ.at("fast"),
    )
    expected = method.solve(weight, scheme).reconstruct()
    for factor in (4.0**-5, 4.0**5):
        assert torch.equal(method.solve(weight * factor, scheme).reconstruct(), expected * factor)


# --- activation noise -----------------------------------------------------------------------------


def test_rounding_noise_is_none_at_16_bits_and_falls_with_every_bit():
    assert rounding_noise("bf16") == rounding_noise("fp16") == 0
    assert all(rounding_noise(name) > 0 for name in FORMATS if name not in ("bf16", "fp16"))
    for names in (
        ("int4", "int5", "int6", "int8_b64"),
        ("mxint4", "mxint6", "mxint8"),
        ("mxfp4", "mxfp6_e2m3"),
    ):
        noises = [rounding_noise(name) for name in names]
        assert noises == sorted(noises, reverse=True)
    assert rounding_noise("int4") > 20 * rounding_noise("mxint8")


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4", "mxint8", "fp8_e4m3"])
def test_rounding_noise_is_what_a_heavy_tailed_activation_suffers(name):
    x = heavy_tailed(256, 512, seed=11)
    error = x - get_format(name).for_rows().round(x)
    assert rounding_noise(name) == pytest.approx(
        (error.square().sum() / x.square().sum()).item(), rel=0.25
    )


def test_the_noise_of_a_scheme_counts_both_roundings_of_the_branch():
    branch = Branch(8, "mxint8", "mxint8", "mxfp4")
    noise = ActivationNoise.of(Scheme("int4", "nvfp4", branch), branch)
    assert noise.main == rounding_noise("nvfp4")
    assert noise.input == rounding_noise("mxint8")
    assert noise.intermediate == rounding_noise("mxfp4", width=8, degrees=None)
    assert noise.branch == noise.input + noise.intermediate
    assert ActivationNoise.of(Scheme("int4"), Branch(8)) == ActivationNoise(0, 0, 0)


# A8 in the branch: the main path's noise counts; A4: the branch's as well.
ACTIVATIONS = {
    "a4-a8": ("mxfp4", "mxint8"),
    "a4-a4": ("mxfp4", "mxfp4"),
    "int4-a8": ("int4", "mxint8"),
}


@pytest.mark.parametrize("activations", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
@pytest.mark.parametrize("branch", ["bf16", "mxint8", "mxfp4"])
def test_awareness_shrinks_the_4_bit_part_and_the_output_error(branch, activations):
    weight = dit_like(256, 256)
    scheme = Scheme("mxfp4", activations[0], Branch(16, branch, activations[1]))
    pace = LoRaQ(heat=1.8, final_step=1.5)
    aware, unaware = (
        replace(pace, activation_aware=flag).solve(weight, scheme) for flag in (True, False)
    )
    sizes = [
        torch.linalg.vector_norm(solution.packed.main.dequantize()) for solution in (aware, unaware)
    ]
    # With A4 in the branch the branch shrinks, and the 4-bit part grows.
    if activations[1] != "mxfp4":
        assert sizes[0] < sizes[1]
    for x in (gaussian(256, 256, seed=1), heavy_tailed(256, 256, seed=1)):
        assert output_error(weight, aware, x) <= output_error(weight, unaware, x) * 1.002


def test_the_objective_predicts_the_output_error():
    weight = of_unit_norm(dit_like(256, 256))
    for activations in ACTIVATIONS.values():
        scheme = Scheme("mxfp4", activations[0], Branch(16, "mxint8", activations[1]))
        solution = LoRaQ().solve(weight, scheme)
        measured = output_error(weight, solution, heavy_tailed(512, 256, seed=3))
        assert solution.metrics["objective"] == pytest.approx(measured, rel=0.1)


def test_awareness_changes_nothing_with_16_bit_activations():
    weight, scheme = dit_like(48, 96), Scheme("int4", branch=Branch(6, "mxint8"))
    aware, unaware = (LoRaQ(activation_aware=flag).solve(weight, scheme) for flag in (True, False))
    assert torch.equal(aware.reconstruct(), unaware.reconstruct())


# --- the seed of a layer --------------------------------------------------------------------------


def test_the_seed_of_a_layer_is_the_same_for_ever():
    assert layer_seed(0, "") == 4312713675196038031
    assert layer_seed(0, "transformer_blocks.0.attn1.to_q") == 8883491727361020599
    assert layer_seed(1, "transformer_blocks.0.attn1.to_q") == 3412507703938712756


def test_the_seed_of_a_layer_depends_on_its_name_and_on_the_seed():
    seeds = {layer_seed(seed, name) for seed in (0, 1, 12) for name in ("a", "b", "a.b", "2/a", "")}
    assert len(seeds) == 15
    assert all(0 <= seed < 2**63 for seed in seeds)
    for seed in seeds:
        torch.Generator().manual_seed(seed)
