"""GPTQ: round to nearest where inputs are not correlated, far less output error where they are."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from correlated_inputs import correlated, output_error, stats_of

from benchmarks.worlds.matrices import dit_like, gaussian
from loraq.errors import CalibrationError
from loraq.formats import FORMATS, FixedScales, get_format
from loraq.methods import GPTQ, RTN, SVDQuant
from loraq.methods.feedback import Feedback
from loraq.scheme import Branch, Scheme
from loraq.stats import ActivationStats

BLOCK_FORMATS = [name for name in FORMATS if name not in ("bf16", "fp16")] + ["int4_b8", "int8_b64"]
each_format = pytest.mark.parametrize("name", BLOCK_FORMATS)


def tensors_of(q):
    return list(q.tensors.values())


@each_format
def test_without_correlation_it_is_round_to_nearest_byte_for_byte(name):
    fmt, wrong = get_format(name), []
    for width, rule in product([96, 85, 1], ["search", None]):
        weight = dit_like(33, width) if width > 1 else gaussian(33, 1)
        nearest = tensors_of(fmt.quantize(weight, rule))
        moment = torch.diag(torch.rand(width, generator=torch.Generator().manual_seed(0)) + 0.1)
        for hessian in (torch.eye(width), moment):
            rounded = tensors_of(Feedback(hessian).round(weight, fmt, rule))
            if not all(torch.equal(a, b) for a, b in zip(rounded, nearest, strict=True)):
                wrong.append((width, rule, hessian is moment))
    assert not wrong


@each_format
def test_with_correlation_the_output_error_is_far_smaller(name):
    weight, x = dit_like(48, 160), correlated(2000, 160)
    stats, scheme = stats_of(x), Scheme(name)
    ours = GPTQ().solve(weight, scheme, stats=stats)
    nearest = RTN().solve(weight, scheme)
    fresh = correlated(1000, 160, seed=0)[:500]
    assert output_error(x, weight, ours) < 0.8 * output_error(x, weight, nearest)
    assert output_error(fresh, weight, ours) < 0.8 * output_error(fresh, weight, nearest)
    assert ours.relative_error > nearest.relative_error  # what it gives for that
    assert ours.metrics["output_error"] == pytest.approx(output_error(x, weight, ours), rel=1e-3)


@each_format
def test_what_is_stored_is_what_the_feedback_reckoned_with(name):
    fmt, weight = get_format(name), dit_like(24, 85)
    scales = FixedScales(weight, fmt, "search")
    # As feedback moves channels; some saturate.
    moved = weight + 0.3 * gaussian(24, 85) * weight.std()
    rounded = scales.round(moved, scales.of_values)
    stored = scales.pack(rounded)
    assert torch.equal(stored.dequantize(), rounded)
    assert {key: tuple(t.shape) for key, t in stored.tensors.items()} == fmt.storage((24, 85))
    assert (rounded - moved).abs().max() < moved.abs().max()


def test_feedback_is_that_of_the_textbook():
    # Two channels, the one of larger mean square first: after channel 1 is rounded, the best real
    # value of channel 0 is w0 + e1 · h01 / h00, whatever it is rounded to next.
    hessian = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    weight = torch.tensor([[2.45, 0.4], [7.0, 7.0]])
    fmt = get_format("int4_b8")
    stored = Feedback(hessian, damping=0.0).round(weight, fmt, "absmax").dequantize()
    scale = (torch.tensor([2.45, 7.0]) / 7).bfloat16().float()
    first = (weight[:, 1] / scale).round() * scale
    second = weight[:, 0] + (weight[:, 1] - first) * hessian[0, 1] / hessian[0, 0]
    expected = torch.stack([(second / scale).round().clamp(-7, 7) * scale, first], 1)
    assert torch.allclose(stored, expected)


@pytest.mark.parametrize("branch", ["bf16", "mxint8"])
def test_beside_a_branch_it_rounds_what_svdquant_leaves(branch):
    weight, x = dit_like(64, 160), correlated(2000, 160)
    scheme = Scheme("mxfp4", branch=Branch(8, branch))
    ours = GPTQ().solve(weight, scheme, stats=stats_of(x), seed=3)
    plain = SVDQuant().solve(weight, scheme, seed=3)
    assert torch.equal(ours.packed.branch.proj_down.packed, plain.packed.branch.proj_down.packed)
    assert torch.equal(ours.packed.branch.proj_up.packed, plain.packed.branch.proj_up.packed)
    assert output_error(x, weight, ours) < 0.8 * output_error(x, weight, plain)
    assert output_error(x, weight, ours) < output_error(
        x, weight, GPTQ().solve(weight, Scheme("mxfp4"), stats=stats_of(x))
    )


@pytest.mark.parametrize("rotation", [0, 32])
def test_statistics_are_rotated_with_the_weight(rotation):
    weight, x = dit_like(48, 96), correlated(2000, 96)
    scheme = Scheme("mxfp4", "mxfp4", rotation=rotation)
    ours = GPTQ().solve(weight, scheme, stats=stats_of(x))
    assert output_error(x, weight, ours) < 0.8 * output_error(
        x, weight, RTN().solve(weight, scheme)
    )
    assert ours.metrics["output_error"] == pytest.approx(output_error(x, weight, ours), rel=1e-3)


@pytest.mark.parametrize("kind", ["zeros", "dead", "rank one", "tiny", "huge"])
def test_a_second_moment_without_full_rank_is_no_problem(kind):
    weight, moment = dit_like(16, 64), stats_of(correlated(300, 64)).second_moment
    if kind == "zeros":
        moment = torch.zeros(64, 64)
    elif kind == "dead":
        moment[5], moment[:, 5] = 0, 0
    elif kind == "rank one":
        moment = torch.ones(64, 64)
    else:
        moment = moment * (1e-30 if kind == "tiny" else 1e30)
    stats = ActivationStats(1, moment)
    solution = GPTQ().solve(weight, Scheme("int4"), stats=stats)
    assert solution.reconstruct().isfinite().all()
    assert solution.relative_error < 1
    if kind == "zeros":
        assert solution.relative_error == RTN().solve(weight, Scheme("int4")).relative_error


def test_more_damping_is_less_feedback():
    weight, x = dit_like(32, 96), correlated(2000, 96)
    errors = [
        GPTQ(damping=damping).solve(weight, Scheme("mxfp4"), stats=stats_of(x)).relative_error
        for damping in (0.01, 1.0, 1e6)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == RTN().solve(weight, Scheme("mxfp4")).relative_error


def test_a_16_bit_main_weight_is_cast():
    weight, stats = dit_like(8, 32), stats_of(correlated(100, 32))
    solution = GPTQ().solve(weight, Scheme("bf16"), stats=stats)
    assert torch.equal(solution.reconstruct(), weight.bfloat16().float())


def test_equal_inputs_give_equal_bytes_and_nothing_is_modified():
    weight, stats = dit_like(24, 64), stats_of(correlated(300, 64))
    scheme = Scheme("nvfp4", branch=Branch(4, "mxint8"))
    before, moment = weight.clone(), stats.second_moment.clone()
    one, other = (GPTQ().solve(weight, scheme, stats=stats, seed=5) for _ in range(2))
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.packed.tensors.values(), other.packed.tensors.values(), strict=True)
    )
    assert torch.equal(weight, before)
    assert torch.equal(stats.second_moment, moment)


def test_missing_or_foreign_statistics_are_an_error():
    weight, scheme = dit_like(24, 64), Scheme("mxfp4")
    with pytest.raises(
        CalibrationError, match=r"Method 'gptq' needs activation statistics\. Collect them"
    ):
        GPTQ().solve(weight, scheme)
    with pytest.raises(CalibrationError, match="of 32 input channels, the weight has 64"):
        GPTQ().solve(weight, scheme, stats=stats_of(correlated(100, 32)))
    with pytest.raises(CalibrationError, match="needs full second moments"):
        GPTQ().solve(weight, scheme, stats=stats_of(correlated(100, 64), full=False))


def test_statistics_make_no_difference_to_methods_that_ignore_them():
    weight, stats = dit_like(24, 64), stats_of(correlated(300, 64))
    scheme = Scheme("mxfp4", branch=Branch(4, "mxint8"))
    for method, asked in ((RTN(), replace(scheme, branch=None)), (SVDQuant(), scheme)):
        assert method.use_of_stats == "ignored"
        with_stats, without = method.solve(weight, asked, stats=stats), method.solve(weight, asked)
        assert torch.equal(with_stats.packed.main.packed, without.packed.main.packed)
