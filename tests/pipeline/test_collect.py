"""Counting what goes into layers equals computing it from the inputs at once."""

import pytest
import torch
from torch import nn

from benchmarks.worlds.matrices import gaussian, heavy_tailed
from loraq.checkpoint.stats_file import save_stats
from loraq.errors import CalibrationError, CheckpointError
from loraq.pipeline.collect import collect_stats, counting_bytes
from loraq.stats import N_CALL_GROUPS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4))
        self.mix = nn.Conv2d(3, 5, 1)
        self.wide = nn.Conv2d(3, 5, 3)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.inner(x).sum() + self.mix(image).sum() + self.wide(image).sum()


LAYERS = ["inner.0", "inner.2", "mix"]
TOKENS = [heavy_tailed(7 * 5, 6, seed).view(7, 5, 6) for seed in range(3)]
#: What the widest layer and a small one may take together.
ROOM = counting_bytes(10, second_moment=True) + 4 * 10 * 10 + 40
IMAGES = [gaussian(2, 3 * 8 * 8, seed).view(2, 3, 8, 8) for seed in range(3)]


def run(net: Net) -> None:
    for x, image in zip(TOKENS, IMAGES, strict=True):
        net(x, image)


@pytest.mark.parametrize("full", [True, False])
def test_counts_equal_a_direct_computation(full):
    net = Net()
    stats = collect_stats(net, lambda: run(net), LAYERS, second_moment=full)
    first = torch.cat(TOKENS).reshape(-1, 6)
    with torch.no_grad():
        hidden = nn.functional.gelu(net.inner[0](first))
    pixels = torch.cat(IMAGES).movedim(1, -1).reshape(-1, 3)
    for name, x in zip(LAYERS, (first, hidden, pixels), strict=True):
        found = stats[name]
        assert found.tokens == len(x)
        exact = x.double().mT @ x.double() / len(x)
        assert torch.allclose(
            found.second_moment.double(), exact if full else exact.diagonal(), rtol=1e-5, atol=1e-7
        )
        assert found.is_full is full
        assert torch.equal(
            found.second_moment, found.second_moment.mT if full else found.second_moment
        )


def test_no_more_than_the_first_tokens_are_counted():
    net = Net()
    stats = collect_stats(net, lambda: run(net), ["inner.0", "mix"], max_tokens=50)
    x = torch.cat(TOKENS).reshape(-1, 6)[:50]
    assert stats["inner.0"].tokens == stats["mix"].tokens == 50
    assert torch.allclose(stats["inner.0"].second_moment, x.mT @ x / 50, rtol=1e-5)


def test_long_inputs_are_counted_in_pieces():
    net, x = nn.Sequential(nn.Linear(4, 4)), gaussian(9000, 4)
    stats = collect_stats(net, lambda: net(x), ["0"])["0"]
    assert stats.tokens == 9000
    assert torch.allclose(
        stats.second_moment.double(), x.double().mT @ x.double() / 9000, rtol=1e-6, atol=1e-7
    )


def test_inputs_of_one_call_are_spread_evenly():
    net = Net()
    stats = collect_stats(net, lambda: run(net), ["inner.0", "mix"], tokens_per_call=10)
    chosen = [0, 3, 7, 10, 14, 17, 21, 24, 28, 31]  # of 35
    x = torch.cat([tokens.reshape(-1, 6)[chosen] for tokens in TOKENS])
    assert stats["inner.0"].tokens == stats["mix"].tokens == 30
    assert torch.allclose(stats["inner.0"].second_moment, x.mT @ x / 30, rtol=1e-5)


def test_a_limit_above_the_inputs_of_a_call_counts_all():
    net = Net()
    some, every = (
        collect_stats(net, lambda: run(net), ["mix"], tokens_per_call=n)["mix"]
        for n in (10**6, None)
    )
    assert some.sha256 == every.sha256


@pytest.mark.parametrize("full", [True, False])
def test_calls_are_told_apart(full):
    net = Net()
    stats = collect_stats(net, lambda: run(net), LAYERS, second_moment=full)
    found = stats["inner.0"].call_mean_squares
    exact = torch.stack([x.reshape(-1, 6).square().mean(0) for x in TOKENS])
    assert found.shape == (N_CALL_GROUPS, 6)
    torch.testing.assert_close(found[:3], exact)
    assert torch.equal(found[3:], found[:1].expand(N_CALL_GROUPS - 3, 6))
    assert stats["mix"].call_mean_squares.shape == (N_CALL_GROUPS, 3)


@pytest.mark.parametrize("full", [True, False])
def test_groups_give_the_same_statistics_as_one_run(full, tmp_path):
    net, runs = Net(), []
    once = collect_stats(net, lambda: run(net), LAYERS, second_moment=full)
    limit = ROOM if full else counting_bytes(10, second_moment=False) + 40
    target = tmp_path / "stats.safetensors"
    for place in (None, target):
        runs.clear()
        grouped = collect_stats(
            net,
            lambda: runs.append(run(net)),
            LAYERS,
            second_moment=full,
            memory_bytes=limit,
            target=place,
        )
        assert len(runs) == 2
        assert {name: grouped[name].sha256 for name in grouped} == {
            name: s.sha256 for name, s in once.items()
        }
    save_stats(once, tmp_path / "once.safetensors")
    assert (tmp_path / "once.safetensors").read_bytes() == target.read_bytes()


def test_a_layer_that_is_never_called_is_found_in_the_first_of_many_runs(tmp_path):
    net, runs = Net(), []
    with pytest.raises(CalibrationError, match="1 of 4 layers were never called: idle"):
        collect_stats(
            net,
            lambda: runs.append(run(net)),
            [*LAYERS, "idle"],
            memory_bytes=ROOM,
            target=tmp_path / "stats.safetensors",
        )
    assert len(runs) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_that_does_less_the_second_time_is_found():
    net, runs = Net(), []

    def once() -> None:
        runs.append(0)
        if len(runs) == 1:
            run(net)

    with pytest.raises(CalibrationError, match="were never called"):
        collect_stats(net, once, LAYERS, memory_bytes=ROOM)


def test_a_call_without_inputs_is_no_call():
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CalibrationError, match="never called"):
        collect_stats(net, lambda: net(torch.ones(0, 4)), ["0"])


def test_an_error_of_the_run_is_its_own(tmp_path):
    def broken() -> None:
        raise FileNotFoundError("of the run")

    with pytest.raises(FileNotFoundError, match="of the run"):
        collect_stats(Net(), broken, LAYERS, target=tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_bfloat16_model_is_counted_in_wide_numbers():
    net, x = nn.Sequential(nn.Linear(4, 4)).bfloat16(), gaussian(5000, 4).bfloat16()
    stats = collect_stats(net, lambda: net(x), ["0"])["0"]
    exact = x.double().mT @ x.double() / 5000
    assert stats.second_moment.dtype == torch.float32
    assert torch.allclose(stats.second_moment.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_run_under_autocast_is_counted_in_wide_numbers():
    net, x = nn.Sequential(nn.Linear(4, 4)), gaussian(500, 4)

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            net(x)

    under, plain = (collect_stats(net, each, ["0"])["0"] for each in (run, lambda: net(x)))
    assert under.sha256 == plain.sha256


def test_a_run_may_be_in_inference_mode_and_leave_it():
    net, x = nn.Sequential(nn.Linear(4, 4)), gaussian(500, 4)

    def run() -> None:
        with torch.inference_mode():
            net(x)
        net(x)

    stats = collect_stats(net, run, ["0"])["0"]
    assert stats.tokens == 1000
    assert not stats.second_moment.is_inference()


def test_an_input_that_is_trained_leaves_no_graph():
    net, x = nn.Sequential(nn.Linear(4, 4)), nn.Parameter(gaussian(500, 4))
    stats = collect_stats(net, lambda: net(x), ["0"])["0"]
    assert not stats.second_moment.requires_grad


def test_an_input_may_be_given_by_name():
    net, x = nn.Sequential(nn.Linear(4, 4)), gaussian(500, 4)
    by_name, by_place = (
        collect_stats(net, run, ["0"])["0"] for run in (lambda: net[0](input=x), lambda: net(x))
    )
    assert by_name.sha256 == by_place.sha256


def test_squares_that_overflow_are_an_error_with_the_name_of_the_layer():
    net, x = nn.Sequential(nn.Linear(4, 4)), gaussian(10, 4) * 1e30
    with pytest.raises(CalibrationError, match=r"Layer '0': .*not finite numbers"):
        collect_stats(net, lambda: net(x), ["0"])


@pytest.mark.parametrize("name", ["folder.safetensors", "stats.bin"])
def test_a_target_that_cannot_be_is_known_before_the_run(tmp_path, name):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=name):
        collect_stats(
            Net(), lambda: pytest.fail("the run must not begin"), LAYERS, target=tmp_path / name
        )


def test_the_model_is_left_as_it_was():
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    collect_stats(net, lambda: run(net), LAYERS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not [module for module in net.modules() if module._forward_pre_hooks]


def test_hooks_are_gone_after_an_error():
    net = Net()
    with pytest.raises(ZeroDivisionError):
        collect_stats(net, lambda: 1 / 0, LAYERS)
    assert not [module for module in net.modules() if module._forward_pre_hooks]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "No layer was named"),
        (["inner.7"], "has no layer 'inner.7'"),
        (["wide"], "'wide' is a Conv2d"),
        (["inner.1"], "'inner.1' is a GELU"),
        ([*LAYERS, "idle"], "1 of 4 layers were never called: idle"),
    ],
)
def test_a_layer_that_cannot_be_counted_is_named(layers, message):
    net = Net()
    with pytest.raises(CalibrationError, match=message):
        collect_stats(net, lambda: run(net), layers)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_input_that_is_not_finite_is_an_error_with_the_name_of_the_layer(bad):
    net, x = nn.Sequential(nn.Linear(4, 4)), gaussian(10, 4)
    x[3, 2] = bad
    with pytest.raises(
        CalibrationError, match="Layer '0' got an input that is not a finite number"
    ):
        collect_stats(net, lambda: net(x), ["0"])


@pytest.mark.parametrize("limit", ["max_tokens", "tokens_per_call"])
def test_no_tokens_at_all_cannot_be_asked_for(limit):
    net = Net()
    with pytest.raises(CalibrationError, match=f"{limit} is 0"):
        collect_stats(net, lambda: run(net), LAYERS, **{limit: 0})
