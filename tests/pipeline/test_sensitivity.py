"""Weights of calls and outputs equal gradients worked out by hand; what cannot be is refused."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from benchmarks.worlds.matrices import gaussian, heavy_tailed
from loraq.errors import CalibrationError
from loraq.methods.base import layer_seed
from loraq.pipeline.collect import collect_stats, counting_bytes

LAYERS = ["first", "last"]
TOKENS = [heavy_tailed(7 + 3 * seed, 6, seed) * (1 + 4 * seed) for seed in range(3)]


class Net(nn.Module):
    """What it returns depends more on later calls: it is scaled by the time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, time: float = 1.0) -> Tensor:
        return time * self.last(self.first(x))


def run(net: nn.Module) -> None:
    for call, x in enumerate(TOKENS):
        net(x, time=1.0 + call)


def random(call: int, *shape: int) -> Tensor:
    """What a call's result is multiplied by."""
    seed = layer_seed(0, f"call {call}")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(net: Net) -> dict[str, tuple[Tensor, Tensor]]:
    """Second moments and sensitivities of outputs of both layers, gradients written out."""
    moments = {"first": torch.zeros(6, 6), "last": torch.zeros(5, 5)}
    outputs, weights = {"first": torch.zeros(5), "last": torch.zeros(3)}, dict.fromkeys(LAYERS, 0.0)
    with torch.no_grad():
        for call, x in enumerate(TOKENS):
            last = (1.0 + call) * random(call, len(x), 3)
            for name, inputs, gradient in (
                ("first", x, last @ net.last.weight),
                ("last", net.first(x), last),
            ):
                weight = gradient.square().mean().item()
                moments[name] += weight * inputs.mT @ inputs
                weights[name] += weight * len(x)
                outputs[name] += gradient.square().sum(0)
    return {
        name: (moments[name] / weights[name], outputs[name] / outputs[name].mean())
        for name in LAYERS
    }


@pytest.mark.parametrize("full", [True, False])
def test_calls_and_outputs_count_by_gradients(full):
    net = Net()
    stats = collect_stats(net, lambda: run(net), LAYERS, sensitivity=True, second_moment=full)
    for name, (moment, outputs) in by_hand(net).items():
        found = stats[name]
        assert found.tokens == 30
        moment = moment if full else moment.diagonal()
        assert torch.allclose(found.second_moment, moment, rtol=1e-4, atol=1e-6)
        assert torch.allclose(found.output_sensitivity, outputs, rtol=1e-4)
    plain = collect_stats(net, lambda: run(net), LAYERS, second_moment=full)
    assert plain["first"].output_sensitivity is None
    assert not torch.allclose(stats["first"].second_moment, plain["first"].second_moment, rtol=0.05)


def test_groups_give_the_same_as_one_run_and_ask_once(tmp_path):
    net, asked = Net(), []
    net.register_forward_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    once = collect_stats(net, lambda: run(net), LAYERS, sensitivity=True)
    assert asked == [True, False] * 3
    asked.clear()
    target = tmp_path / "stats.safetensors"
    grouped = collect_stats(
        net,
        lambda: run(net),
        LAYERS,
        sensitivity=True,
        memory_bytes=counting_bytes(6, second_moment=True) + 4 * 6 * 6,
        target=target,
    )
    assert asked == [True, False] * 3 + [False] * 3
    assert {name: s.sha256 for name, s in grouped.items()} == {
        name: s.sha256 for name, s in once.items()
    }


def test_the_model_is_left_as_it_was():
    net = Net()
    net.first.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    collect_stats(net, lambda: run(net), LAYERS, sensitivity=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    with pytest.raises(ZeroDivisionError):
        collect_stats(net, lambda: 1 / 0, LAYERS, sensitivity=True)
    trained = {name for name, weight in net.named_parameters() if weight.requires_grad}
    assert trained == {"first.weight", "last.weight", "last.bias"}
    assert all(weight.grad is None for weight in net.parameters())
    assert not [m for m in net.modules() if m._forward_pre_hooks or m._forward_hooks]


class Careless(nn.Module):
    """Changes outputs in place, returns a dictionary, and never reads one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.unread = nn.Linear(6, 5), nn.Linear(5, 3), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, image: Tensor) -> dict[str, object]:
        self.unread(image)
        hidden = self.first(x)
        hidden += 1
        hidden.mul_(2)
        return {"sample": (self.last(hidden), None), "step": torch.tensor(3)}


def test_models_that_change_outputs_in_place_and_return_dictionaries():
    net, image = Careless(), gaussian(2, 3 * 4, 1).view(2, 3, 2, 2)
    stats = collect_stats(net, lambda: net(TOKENS[0], image), [*LAYERS, "unread"], sensitivity=True)
    gradient = 2 * random(0, 7, 3) @ net.last.weight.detach()
    expected = gradient.square().sum(0)
    assert torch.allclose(stats["first"].output_sensitivity, expected / expected.mean(), rtol=1e-4)
    # Nothing depends on it, so its calls and outputs count alike.
    plain = collect_stats(net, lambda: net(TOKENS[0], image), ["unread"])["unread"]
    assert torch.allclose(stats["unread"].second_moment, plain.second_moment)
    assert torch.equal(stats["unread"].output_sensitivity, torch.ones(4))


def test_a_convolution_counts_its_channels():
    net, image = nn.Sequential(nn.Conv2d(3, 4, 1)), gaussian(2, 3 * 4, 1).view(2, 3, 2, 2)
    stats = collect_stats(net, lambda: net(image), ["0"], sensitivity=True)["0"]
    expected = random(0, 2, 4, 2, 2).square().sum((0, 2, 3))
    assert torch.allclose(stats.output_sensitivity, expected / expected.mean(), rtol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_run_without_gradients_is_asked_all_the_same(mode):
    net = Net()

    def quiet() -> None:
        with mode():
            for call, x in enumerate(TOKENS):
                net(x.clone(), time=1.0 + call)

    found = collect_stats(net, quiet, LAYERS, sensitivity=True)
    plain = collect_stats(net, lambda: run(net), LAYERS, sensitivity=True)
    assert {name: s.sha256 for name, s in found.items()} == {
        name: s.sha256 for name, s in plain.items()
    }


class Rounded(Net):
    def forward(self, x: Tensor, time: float = 1.0) -> Tensor:
        return super().forward(x, time).argmax(-1)


class Undifferentiable(Net):
    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(_context: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_context: object, _gradient: Tensor) -> Tensor:
            raise RuntimeError("no backward pass")

    def forward(self, x: Tensor, time: float = 1.0) -> Tensor:
        return self.Identity.apply(super().forward(x, time))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Rounded, "No tensor that Rounded returns depends on the 2 layers"),
        (Undifferentiable, r"fails when it is run with gradients \(no backward pass\)"),
    ],
)
def test_a_model_without_gradients_is_refused(kind, message, tmp_path):
    net = kind()
    with pytest.raises(CalibrationError, match=message):
        collect_stats(
            net, lambda: run(net), LAYERS, sensitivity=True, target=tmp_path / "s.safetensors"
        )
    assert not list(tmp_path.iterdir())
    assert all(weight.requires_grad for weight in net.parameters())


def test_a_layer_outside_of_a_call_is_refused():
    net = Net()

    def apart() -> None:
        run(net)
        net.first(TOKENS[0])

    with pytest.raises(CalibrationError, match="'first' ran outside of a call of the model"):
        collect_stats(net, apart, LAYERS, sensitivity=True)


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_gradients_count_whatever_their_size(size):
    net = Net()
    found = collect_stats(net, lambda: run_times(net, size), LAYERS, sensitivity=True)
    for name, (moment, outputs) in by_hand(net).items():
        assert torch.allclose(found[name].second_moment, moment, rtol=1e-4, atol=1e-6)
        assert torch.allclose(found[name].output_sensitivity, outputs, rtol=1e-4)


def run_times(net: nn.Module, size: float) -> None:
    for call, x in enumerate(TOKENS):
        net(x, time=size * (1.0 + call))


def test_gradients_that_overflow_are_an_error_with_the_name_of_the_layer():
    net = Net()
    with pytest.raises(CalibrationError, match="gradient at layer 'last' is not a finite number"):
        collect_stats(net, lambda: net(TOKENS[0], time=1e39), LAYERS, sensitivity=True)


def test_a_limit_on_tokens_leaves_the_weights_of_calls():
    net = Net()
    found = collect_stats(net, lambda: run(net), LAYERS, sensitivity=True, tokens_per_call=1)
    last = [(1.0 + call) * random(call, len(x), 3) for call, x in enumerate(TOKENS)]
    weights = torch.stack([gradient.square().mean() for gradient in last])
    with torch.no_grad():
        x = torch.cat([net.first(tokens[:1]) for tokens in TOKENS])
    moment = (x * weights[:, None]).mT @ x / weights.sum()
    assert found["last"].tokens == 3
    assert torch.allclose(found["last"].second_moment, moment, rtol=1e-4)


class Odd(nn.Module):
    """Whatever a call may do: `way` says what."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.first, self.last = way, nn.Linear(6, 6), nn.Linear(6, 3)
        self.dropout = nn.Dropout(0.5 if way == "dropout" else 0.0)

    def forward(self, x: Tensor, *, times: int = 1) -> Tensor:
        if self.way == "in place":
            x.mul_(2)
        if self.way == "itself" and times:
            x = self.first(x) + self(x, times=times - 1).mean()
        hidden = self.dropout(self.first(x))
        hidden = self.first(hidden) if self.way == "twice" else hidden
        if self.way == "empty":
            self.last(hidden[:0])
        return self.last(hidden)


@pytest.mark.parametrize("way", ["in place", "itself", "dropout", "twice", "empty"])
def test_asking_does_not_change_what_the_run_does(way):
    net, seen = Odd(way), []

    def once() -> None:
        torch.manual_seed(3)
        x = TOKENS[0].clone()
        seen.append((net(x), torch.rand(2), x))

    for sensitivity in (False, True):
        collect_stats(net, once, LAYERS, sensitivity=sensitivity)
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))


def test_a_layer_that_is_called_twice_counts_both():
    net = Odd("twice")
    found = collect_stats(net, lambda: net(TOKENS[0]), LAYERS, sensitivity=True)["first"]
    second = random(0, 7, 3) @ net.last.weight.detach()
    first = second @ net.first.weight.detach()
    outputs = (first.square() + second.square()).sum(0)
    assert torch.allclose(found.output_sensitivity, outputs / outputs.mean(), rtol=1e-4)
    # One weight for both calls of the layer, so its inputs count as they would without.
    plain = collect_stats(net, lambda: net(TOKENS[0]), LAYERS)["first"]
    assert torch.allclose(found.second_moment, plain.second_moment, rtol=1e-4)


def test_inputs_that_others_change_are_changed_once():
    net = Net()
    net.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    plain, found = (
        collect_stats(net, lambda: net(TOKENS[0]), LAYERS, sensitivity=sensitivity)["last"]
        for sensitivity in (False, True)
    )
    assert torch.allclose(found.second_moment, plain.second_moment, rtol=1e-5)
    assert torch.isfinite(found.output_sensitivity).all()


def test_a_call_that_failed_is_over():
    net = Net()

    def careless() -> None:
        run(net)
        with pytest.raises(TypeError):
            net(TOKENS[0], time=None)
        net.first(TOKENS[0])

    with pytest.raises(CalibrationError, match="'first' ran outside of a call of the model"):
        collect_stats(net, careless, LAYERS, sensitivity=True)


@dataclass
class Result:
    sample: Tensor


class Wrapped(Net):
    def forward(self, x: Tensor, time: float = 1.0) -> Result:
        return Result(super().forward(x, time))


def test_what_is_returned_may_be_a_dataclass():
    found, plain = (
        collect_stats(net, lambda net=net: run(net), LAYERS, sensitivity=True)["first"]
        for net in (Wrapped(), Net())
    )
    assert found.sha256 == plain.sha256


def test_weights_that_were_put_in_the_place_of_others_get_their_gradients_back():
    net = Net()

    def offloaded() -> None:
        run(net)
        net.first.weight = nn.Parameter(net.first.weight.detach().clone(), requires_grad=False)

    collect_stats(net, offloaded, LAYERS, sensitivity=True)
    assert all(weight.requires_grad for weight in net.parameters())


def test_weights_of_inference_mode_are_refused_and_left_as_they_were():
    with torch.inference_mode():
        net = Net()
    collect_stats(net, lambda: run(net), LAYERS)
    with pytest.raises(CalibrationError, match="Net fails when it is run with gradients"):
        collect_stats(net, lambda: run(net), LAYERS, sensitivity=True)
    assert all(weight.requires_grad for weight in net.parameters())
