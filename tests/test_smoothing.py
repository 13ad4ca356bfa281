"""Smoothing: what it does to a layer, and that everyone who touches the layer knows of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import loraq
from loraq.appended import BranchStack, Part, append, branch_for, remove
from loraq.budget import Budget, with_rank
from loraq.errors import CalibrationError, FormatError
from loraq.linalg import relative_error
from loraq.methods import METHODS
from loraq.methods.fits import prepare_weight
from loraq.methods.smoothing import balance_channels, relieves_calls
from loraq.nn import QuantizedLinear
from loraq.packed import PackedWeight
from loraq.pipeline.module import quantize_weight
from loraq.recipe_names import parse_scheme
from loraq.scheme import Scheme
from loraq.stats import ActivationStats
from loraq.transforms import ONE, STEPS, rotate, smooth, unsmooth

N_OUT, N_IN = 64, 96


def outlying(rows: int, seed: int) -> Tensor:
    """Inputs of which every eighth channel is thirty times as large as the others."""
    x = torch.randn(rows, N_IN, generator=torch.Generator().manual_seed(seed))
    x[:, ::8] *= 30
    return x


def stats_of(x: Tensor) -> ActivationStats:
    return ActivationStats(len(x), x.mT @ x / len(x))


def weight(seed: int = 0) -> Tensor:
    return torch.randn(N_OUT, N_IN, generator=torch.Generator().manual_seed(seed)) / 8


def solve(name: str, method: str = "svdquant") -> PackedWeight:
    stats = stats_of(outlying(512, 1))
    return quantize_weight(weight(), name, method=method, stats=stats).packed


def test_smoothing_and_its_inverse():
    codes = torch.tensor([0, 64, ONE, 200, 255], dtype=torch.uint8)
    factors = 2.0 ** ((codes.double() - ONE) / STEPS)
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(smooth(x, codes), x / factors, rtol=1e-6, atol=0)
    torch.testing.assert_close(unsmooth(x, codes), x * factors, rtol=1e-6, atol=0)
    assert smooth(x, None) is x
    assert unsmooth(x, None) is x
    assert smooth(x.bfloat16(), codes).dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_the_factors_are_those_of_svdquant(alpha):
    """Equation 4 of arXiv 2411.05007, of geometric mean 1, to half a step."""
    x, w = outlying(512, 1), weight()
    codes = balance_channels(w, stats_of(x), alpha)
    octaves = (codes.float() - ONE) / STEPS
    sizes = (each.square().mean(0).sqrt() for each in (x, w))
    expected = (next(sizes) ** alpha / next(sizes) ** (1 - alpha)).log2()
    expected -= expected.mean()
    assert (octaves - expected).abs().max() <= 0.51 / STEPS
    assert torch.equal(codes, balance_channels(1e-25 * w, stats_of(x), alpha))


@pytest.mark.parametrize(
    ("name", "alpha"), [("int4-a4", 0.5), ("nvfp4-a4", 0.5), ("int4-a8", 0.3), ("int5-a16", 0.3)]
)
def test_four_bit_activations_are_relieved_of_more(name, alpha):
    scheme = parse_scheme(f"{name}-s-h0")
    codes = prepare_weight(weight(), scheme, stats := stats_of(outlying(512, 1))).smooth_factor
    assert torch.equal(codes, balance_channels(weight(), stats, alpha))


def told_apart(moves: bool) -> ActivationStats:
    """Statistics of two calls with the same outliers, or with large channels that change places."""
    first = outlying(512, 1)
    second = first.roll(1, 1) * 0.9 if moves else first
    calls = torch.stack([x.square().mean(0) for x in (first, second)])
    return replace(stats_of(torch.cat([first, second])), call_mean_squares=calls)


@pytest.mark.parametrize("rotation", [0, 32])
@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_beside_four_bits_a_layer_is_smoothed_if_no_call_is_worse_by_it(fmt, rotation):
    scheme = parse_scheme(f"{fmt}-a4-s-h{rotation}")
    kept = prepare_weight(weight(), scheme, stats := told_apart(moves=False)).smooth_factor
    assert torch.equal(kept, balance_channels(weight(), stats, 0.5))
    # What is small in the second call and was large in the first would be rounded coarsely.
    stats = told_apart(moves=True)
    rare = replace(stats, second_moment=stats_of(outlying(512, 1)).second_moment)
    given_up = prepare_weight(weight(), scheme, rare).smooth_factor
    assert (given_up == ONE).all()
    unknown = prepare_weight(weight(), scheme, replace(rare, call_mean_squares=None)).smooth_factor
    assert torch.equal(unknown, balance_channels(weight(), rare, 0.5))


@pytest.mark.parametrize("name", ["int4-a8-s-h0", "int4-a16-s-h0"])
def test_finer_activations_do_not_ask_the_calls(name):
    stats = told_apart(moves=True)
    codes = prepare_weight(weight(), parse_scheme(name), stats).smooth_factor
    assert torch.equal(codes, balance_channels(weight(), stats, 0.3))


@pytest.mark.parametrize("rotation", [0, 32])
def test_what_is_said_of_a_call_is_what_its_rounding_leaves(rotation):
    """Random signs and sizes, calls one by one: prediction and rounded inputs agree."""
    scheme = parse_scheme(f"int4_b32-aint4_b32-h{rotation}")
    generator, agreed = torch.Generator().manual_seed(5), 0
    w = weight() * torch.exp(torch.randn(N_IN, generator=generator) / 2)
    for seed in range(20):
        channels = torch.exp(torch.randn(N_IN, generator=generator))
        x = channels * torch.randn(400, N_IN, generator=generator)
        s = torch.exp(torch.randn(N_IN, generator=generator) * (seed + 1) / 20)
        calls = x.square().mean(0, keepdim=True)
        stats = ActivationStats(400, calls[0], call_mean_squares=calls)
        lost = []
        for factor in (s, torch.ones(N_IN)):
            turned = rotate(x / factor, rotation)
            off = scheme.activation_format.for_rows().round(turned) - turned
            lost.append((off @ rotate(w * factor, rotation).mT).norm().item())
        agreed += relieves_calls(w, scheme, stats, s.double()) == (lost[0] <= lost[1])
    assert agreed >= 18


def test_a_call_of_zeros_is_made_no_worse():
    stats = told_apart(moves=False)
    calls = torch.cat([stats.call_mean_squares, torch.zeros(1, N_IN)])
    codes = prepare_weight(
        weight(), parse_scheme("int4-a4-s-h0"), replace(stats, call_mean_squares=calls)
    ).smooth_factor
    assert (codes != ONE).any()


@pytest.mark.parametrize("kind", ["dead channels", "no inputs", "a weight of zeros"])
def test_what_is_not_there_sets_no_factors(kind):
    x, w = outlying(512, 1), weight()
    if kind == "dead channels":
        x[:, 1::8], w[:, 2::8] = 0, 0
    elif kind == "no inputs":
        x = torch.zeros_like(x)
    else:
        w = torch.zeros_like(w)
    name = "int4-aint8+int8-r8-s-h0"
    solved = quantize_weight(w, name, method="svdquant", stats=stats_of(x))
    assert solved.reconstruct().isfinite().all()
    assert solved.relative_error < 0.2


@pytest.mark.parametrize("method", ["loraq", "svdquant", "gptq", "qera"])
@pytest.mark.parametrize("rotation", [0, 32])
def test_outlying_channels_cost_less(method, rotation):
    name = f"int4-aint4+int8-r8{{}}-h{rotation}"
    x, stats = outlying(64, 2), stats_of(outlying(512, 1))
    errors = []
    for smoothing in ("", "-s"):
        solved = quantize_weight(weight(), name.format(smoothing), method=method, stats=stats)
        layer = QuantizedLinear.from_packed(solved.packed)
        layer.ask_activations("stored", simulate=True)
        errors.append(relative_error(x @ weight().mT, layer(x).detach()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    "name", ["int4-aint8+int8-r8-s-h0", "mxfp4-a4+w8a8-r8-s-h32", "int5-a16-s"]
)
def test_the_noted_error_is_that_of_the_weight(name):
    stats = stats_of(outlying(512, 1))
    method = "svdquant" if parse_scheme(name).branch else "rtn"
    solved = quantize_weight(weight(), name, method=method, stats=stats)
    found = relative_error(weight(), solved.reconstruct())
    assert solved.relative_error == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("name", ["int4-a16+w8a8-r8-s-h0", "mxfp4-a4+w8a8-r8-s-h32"])
@pytest.mark.parametrize("backend", ["reference", "resident", "low_memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_back_end_runs_the_smoothed_weight(name, backend, dtype):
    layer = QuantizedLinear.from_packed(solve(name))
    layer.ask_activations("a16")
    layer.backend = backend
    x = outlying(24, 2).to(dtype)
    expected = x.float() @ layer.reconstruct().mT
    assert relative_error(expected, layer(x).float().detach()) < (
        1e-5 if dtype.itemsize == 4 else 0.02
    )


def test_a_scheme_without_smoothing_reads_the_same_bytes_without_it():
    layer = QuantizedLinear.from_packed(solve("int4-a16+w8a8-r8-s-h0"))
    smoothed, x = layer.reconstruct(), outlying(4, 2)
    layer.scheme = replace(layer.scheme, smoothing=False)
    assert relative_error(smoothed, layer.reconstruct()) > 0.1
    assert relative_error(x @ layer.reconstruct().mT, layer(x).detach()) < 1e-5


def test_a_compiled_layer_and_its_gradient():
    layer = QuantizedLinear.from_packed(solve("int4-a16+w8a8-r8-s-h0"))
    x = outlying(4, 2).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(
        x.grad, layer.reconstruct().sum(0).expand_as(x), rtol=1e-3, atol=1e-3
    )
    assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))


def test_bytes_are_counted_and_paid_by_the_budget():
    plain, smoothed = (parse_scheme(f"int4-a16+int8{s}") for s in ("", "-s"))
    shape = 1152, 1152
    plain, smoothed = with_rank(plain, shape), with_rank(smoothed, shape)
    assert smoothed == replace(plain, smoothing=True)  # "r16=32" is what the branch may take
    assert smoothed.nbytes(shape) == plain.nbytes(shape) + shape[1]
    packed = solve("int4-a16+w8a8-r8-s-h0")
    assert packed.nbytes == packed.scheme.nbytes(packed.shape)
    # A budget of bits per weight is for all that is stored.
    smoothed = with_rank(parse_scheme("int4+int8-s"), (64, 1152), Budget.parse("7"))
    plain = with_rank(parse_scheme("int4+int8"), (64, 1152), Budget.parse("7"))
    assert smoothed.branch.rank < plain.branch.rank
    assert 8 * smoothed.nbytes((64, 1152)) <= 7 * 64 * 1152


def test_without_statistics_it_is_refused_before_work():
    model = nn.Sequential(nn.Linear(N_IN, N_OUT))
    with pytest.raises(
        CalibrationError, match=r"Smoothing needs .* none are given for 1 layers.*'-s'"
    ):
        loraq.quantize_(model, "int4-a8+int8-r8-s", progress=False)
    recipe = replace(loraq.Recipe.named("int4-a8+int8-r8-s"), method="gptq")
    with pytest.raises(CalibrationError, match="Method 'gptq' needs activation statistics"):
        loraq.quantize_(model, recipe, progress=False)  # which leaving out '-s' would not help
    with pytest.raises(CalibrationError, match="Smoothing needs activation statistics"):
        quantize_weight(weight(), "int4-a8+int8-r8-s")
    stats = stats_of(torch.randn(32, 8))
    with pytest.raises(CalibrationError, match="of 8 input channels, the weight has 96"):
        quantize_weight(weight(), "int4-a8+int8-r8-s", method="svdquant", stats=stats)


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(N_IN, N_OUT), nn.GELU(), nn.Linear(N_OUT, N_OUT)).eval()


def count(model: nn.Module, *, second_moment: bool) -> dict[str, ActivationStats]:
    def run() -> None:
        model(outlying(256, 3))

    return loraq.collect_stats(model, run, ["0", "2"], second_moment=second_moment)


def smoothed_model(recipe: str = "int4-a16+int8-r8-s") -> nn.Sequential:
    model = model_of()
    stats = count(model, second_moment=True)
    loraq.quantize_(model, recipe, stats=stats, progress=False)
    return model


def test_a_folder_has_the_factors_and_nothing_else_changes(tmp_path: Path):
    model = smoothed_model()
    loraq.save(model, tmp_path / "out")
    again = model_of()
    loraq.load_into(again, tmp_path / "out")
    x = outlying(8, 4)
    assert torch.equal(again(x), model(x))
    assert again[0].scheme.smoothing
    assert "smooth_factor" in dict(again[0].named_parameters())
    plain = model_of()
    loraq.quantize_(plain, "int4-a16+int8-r8", progress=False)
    loraq.save(plain, tmp_path / "plain")
    assert "smoothing" not in (tmp_path / "plain" / "loraq.json").read_text()


def test_layers_without_a_branch_of_their_own_method_use_the_statistics():
    model = model_of()
    recipe = replace(loraq.Recipe.named("int8-a8-s"), method="rtn")
    stats = count(model, second_moment=False)
    loraq.quantize_(model, recipe, stats=stats, progress=False)
    assert model[0].scheme.smoothing
    assert relative_error(model_of()(outlying(8, 4)), model(outlying(8, 4)).detach()) < 0.02


def test_the_dense_model_is_the_effective_weight():
    model = smoothed_model()
    x, expected = outlying(8, 4), None
    expected = model(x).detach()
    dense = loraq.dequantize_(model)
    assert not any(isinstance(layer, QuantizedLinear) for layer in dense.modules())
    assert relative_error(expected, dense(x).detach()) < 1e-5


@pytest.mark.parametrize("rotation", [0, 32])
def test_a_lora_is_added_for_the_input_as_it_comes(rotation):
    packed = solve(f"mxfp4-a16+int8-r8-s-h{rotation}")
    generator = torch.Generator().manual_seed(7)
    factors = (
        0.05 * torch.randn(N_OUT, 4, generator=generator),
        torch.randn(4, N_IN, generator=generator),
    )
    stack = BranchStack.of({}, packed.scheme)
    branch = branch_for(packed.scheme, (), packed.scheme.branch)
    part = Part("one", "0" * 64, 1.0, 0, 4)
    new, noted, _ = append(packed, stack, part, branch, factors)
    added = new.reconstruct() - packed.reconstruct()
    assert relative_error(factors[0] @ factors[1], added) < 0.05
    gone, _ = remove(new, noted, "one")
    assert gone.tensors.keys() == packed.tensors.keys()
    assert all(torch.equal(gone.tensors[name], packed.tensors[name]) for name in gone.tensors)


def test_missing_factors_are_an_error_that_names_them():
    packed = solve("int4-a16+w8a8-r8-s-h0")
    tensors = {name: t for name, t in packed.tensors.items() if name != "smooth_factor"}
    with pytest.raises(FormatError, match="'smooth_factor' is missing"):
        PackedWeight.from_tensors(tensors, packed.scheme, packed.shape)


def test_prediction_needs_no_statistics():
    scheme = Scheme("int4", branch=parse_scheme("int4+int8-r8").branch, smoothing=True)
    assert METHODS["loraq"]().predict(weight(), scheme, 8).left


def test_the_name():
    scheme = parse_scheme("int4-a8+int8-r8-s-h32")
    assert scheme.smoothing
    assert scheme.rotation == 32
    assert not parse_scheme("int4-a8+int8-r8-h32").smoothing
    assert scheme.to_dict()["smoothing"] is True
    assert "smoothing" not in parse_scheme("int4").to_dict()
