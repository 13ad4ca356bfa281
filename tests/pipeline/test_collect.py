"""Counting what goes into layers equals computing it from the inputs at once."""

import pytest
import torch
from torch import nn

from loraq.errors import CalibrationError
from loraq.pipeline.collect import collect_stats
from matrices import gaussian, heavy_tailed


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
        assert torch.equal(found.max_abs, x.abs().amax(0))
        exact = x.double().mT @ x.double() / len(x)
        assert torch.allclose(found.second_moment.double(), exact if full else exact.diagonal(), rtol=1e-5, atol=1e-7)
        assert found.is_full is full
        assert torch.equal(found.second_moment, found.second_moment.mT if full else found.second_moment)


def test_no_more_than_the_first_tokens_are_counted():
    net = Net()
    stats = collect_stats(net, lambda: run(net), ["inner.0", "mix"], max_tokens=50)
    x = torch.cat(TOKENS).reshape(-1, 6)[:50]
    assert stats["inner.0"].tokens == stats["mix"].tokens == 50
    assert torch.allclose(stats["inner.0"].second_moment, x.mT @ x / 50, rtol=1e-5)
    assert torch.equal(stats["inner.0"].max_abs, x.abs().amax(0))


def test_long_inputs_are_counted_in_pieces():
    net, x = nn.Sequential(nn.Linear(4, 4)), gaussian(9000, 4)
    stats = collect_stats(net, lambda: net(x), ["0"])["0"]
    assert stats.tokens == 9000
    assert torch.allclose(stats.second_moment.double(), x.double().mT @ x.double() / 9000, rtol=1e-6, atol=1e-7)


def test_a_bfloat16_model_is_counted_in_wide_numbers():
    net, x = nn.Sequential(nn.Linear(4, 4)).bfloat16(), gaussian(5000, 4).bfloat16()
    stats = collect_stats(net, lambda: net(x), ["0"])["0"]
    exact = x.double().mT @ x.double() / 5000
    assert stats.second_moment.dtype == torch.float32
    assert torch.allclose(stats.second_moment.double(), exact, rtol=1e-5, atol=1e-6)


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
    with pytest.raises(CalibrationError, match="Layer '0' got an input that is no finite number"):
        collect_stats(net, lambda: net(x), ["0"])


def test_no_tokens_at_all_cannot_be_asked_for():
    net = Net()
    with pytest.raises(CalibrationError, match="max_tokens is 0"):
        collect_stats(net, lambda: run(net), LAYERS, max_tokens=0)
