"""`collect_stats`: run a model, and count what goes into its linear layers."""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from loraq.errors import CalibrationError
from loraq.layers import LinearLayer, is_linear, matrix_of
from loraq.stats import ActivationStats

#: Tokens whose products are summed in fp32 before they are added in fp64.
_CHUNK = 4096


def collect_stats(
    model: nn.Module,
    run: Callable[[], object],
    layers: Iterable[str],
    *,
    second_moment: bool = True,
    max_tokens: int | None = None,
) -> dict[str, ActivationStats]:
    """Run a model and return the statistics of the inputs of some of its linear layers.

    A layer takes `in`² numbers in fp64 while it is counted, or `in` without the second moment. The model is not
    changed. Let `run` see what the model will see: all timesteps, all resolutions, with and without a caption.

    Args:
        model: with float weights.
        run: calls the model as often as needed; gradients are switched off.
        layers: dotted names of `nn.Linear` and 1×1 `nn.Conv2d`, such as those of `plan_model(model, recipe).quantized`.
        second_moment: whether all of E[x xᵀ] is collected, which "gptq" needs; else only E[x²].
        max_tokens: a layer counts no more than its first so many inputs; `None` counts all.

    Raises:
        CalibrationError: a name is no linear layer, a layer was never called, or its input was not finite.
    """
    if max_tokens is not None and max_tokens < 1:
        raise CalibrationError(f"max_tokens is {max_tokens}. It must be at least 1, or `None`.")
    counts = {name: _Count(name, _linear(model, name), second_moment, max_tokens or math.inf) for name in layers}
    if not counts:
        raise CalibrationError("No layer was named. `loraq.plan_model` says which a recipe quantizes.")
    with ExitStack() as hooks, torch.no_grad():
        for count in counts.values():
            hooks.enter_context(count.layer.register_forward_pre_hook(count))
        run()
    if idle := [name for name, count in counts.items() if not count.tokens]:
        raise CalibrationError(
            f"{len(idle)} of {len(counts)} layers were never called: {', '.join(idle[:4])}. Let `run` use all of the "
            "model, or leave them out."
        )
    return {name: count.stats() for name, count in counts.items()}


class _Count:
    """A hook that adds up the inputs of one layer."""

    def __init__(self, name: str, layer: LinearLayer, full: bool, most: float) -> None:
        self.name, self.layer, self.full, self.left, self.tokens = name, layer, full, most, 0
        weight = matrix_of(layer)
        width = weight.shape[1]
        self._sum = torch.zeros((width, width) if full else width, dtype=torch.float64, device=weight.device)
        self._max = torch.zeros(width, device=weight.device)

    def __call__(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not self.left:
            return
        x = inputs[0].movedim(-3, -1) if isinstance(self.layer, nn.Conv2d) else inputs[0]
        x = x.reshape(-1, x.shape[-1])[: int(min(self.left, x.numel()))].float()
        if not x.isfinite().all():
            raise CalibrationError(
                f"Layer '{self.name}' got an input that is no finite number. Run the model in a wider dtype, or look "
                "for the layer before it that overflows."
            )
        for part in x.split(_CHUNK):
            self._sum += part.mT @ part if self.full else part.square().sum(0)
            self._max = torch.maximum(self._max, part.abs().amax(0))
        self.tokens += len(x)
        self.left -= len(x)

    def stats(self) -> ActivationStats:
        """Return what was counted, on the CPU."""
        moment = (self._sum / self.tokens).float().cpu()
        return ActivationStats(self.tokens, (moment + moment.mT) / 2 if self.full else moment, self._max.cpu())


def _linear(model: nn.Module, name: str) -> LinearLayer:
    modules = dict(model.named_modules())
    if name not in modules:
        raise CalibrationError(f"The model has no layer '{name}'. `loraq.plan_model` lists its linear layers.")
    if not is_linear(layer := modules[name]):
        raise CalibrationError(
            f"'{name}' is a {type(layer).__name__}. Statistics are for `nn.Linear` and 1×1 `nn.Conv2d`."
        )
    return layer
