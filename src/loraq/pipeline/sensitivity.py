"""What errors of a layer do to what the model returns, measured while it runs: `Sensitivity`.

Let y be a layer's output in one call of the model, v what the call returns, and J = ∂v/∂y. An error
e of y moves v by J e, so that what matters of it is E‖J e‖². For random r of independent numbers of
unit variance the gradient g of r·v with respect to y has E[g gᵀ] = JᵀJ (Hutchinson's estimate): one
forward and one backward pass tell it for all layers at once. From it are taken, as if errors of
tokens and of outputs were uncorrelated,

* a weight of the call, the mean of g² over tokens and outputs: second moments of inputs count the
  calls by it, so that timesteps count in which errors matter;
* a weight of each output, the sum of g² over tokens and calls: rows of the weight count by it.

Both together are the diagonal on the side of the outputs of K-FAC's factored Gauss–Newton matrix
(arXiv 1503.05671), with one number for all tokens of a call. Nothing but the samples is needed, and
nothing is trained.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraq.errors import CalibrationError
from loraq.methods.base import layer_seed

#: Weight of a call whose result does not depend on a layer: next to nothing, and all calls alike
#: where they are all such.
_NOTHING = 1e-200


@dataclass
class Sensitivity:
    """Runs a model with gradients before each of its calls, and remembers what they say."""

    model: nn.Module
    layers: Mapping[str, nn.Module]
    #: Mean squared gradients of each call, by layer.
    _calls: list[dict[str, float]] = field(default_factory=list)
    #: Sums of squared gradients of each output, by layer.
    _outputs: dict[str, Tensor] = field(default_factory=dict)
    #: The call that runs, if one does.
    _now: int | None = None
    _is_asking: bool = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Ask before each call of the model, unless an earlier run had asked before that call."""
        self._now, begun = None, 0

        def begin(_model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal begun
            if self._is_asking:
                return
            if begun == len(self._calls):
                self._calls.append(self._ask(begun, inputs, named))
            self._now, begun = begun, begun + 1

        def end(*_: object) -> None:
            if not self._is_asking:
                self._now = None

        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        with ExitStack() as undo:
            for weight in trained:  # gradients of weights are not wanted
                undo.callback(weight.requires_grad_, True)
                weight.requires_grad_(False)
            undo.enter_context(self.model.register_forward_pre_hook(begin, with_kwargs=True))
            undo.enter_context(self.model.register_forward_hook(end))
            yield

    def weigh_call(self, name: str) -> float:
        """Return what the inputs of a layer count in the call that runs; 0 while it is asked.

        Raises:
            CalibrationError: the layer runs, and the model does not.
        """
        if self._is_asking:
            return 0.0
        if self._now is None:
            raise CalibrationError(
                f"Layer '{name}' ran outside of a call of the model, so nothing says what its "
                "errors do to the model's result. Call the model itself, or collect without "
                "`sensitivity`."
            )
        return max(self._calls[self._now].get(name, 0.0), _NOTHING)

    def of_outputs(self, name: str) -> Tensor:
        """Return what errors of a layer's outputs count, 1 in the mean, (out), fp32 on the CPU."""
        found = self._outputs.get(name)
        if found is None or not (mean := found.mean()):
            return torch.ones(_outputs_of(self.layers[name]), device="cpu")
        return (found / mean).float().cpu()

    def _ask(self, call: int, inputs: tuple[Any, ...], named: dict[str, Any]) -> dict[str, float]:
        """Return the mean squared gradient of each layer's output in a call with these inputs."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}

        def add(name: str, gradient: Tensor) -> None:
            squares = _channels_last(self.layers[name], gradient).float().square()
            rows = squares.reshape(-1, squares.shape[-1]).sum(0).cpu().double()
            if not rows.isfinite().all():
                raise CalibrationError(
                    f"The gradient at layer '{name}' is not a finite number. Run the model in a "
                    "wider dtype, or collect without `sensitivity`."
                )
            self._outputs[name] = self._outputs.get(name, 0) + rows
            sums[name] = sums.get(name, 0.0) + rows.sum().item()
            counts[name] = counts.get(name, 0) + gradient.numel()

        def observe(name: str, _layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            if not output.requires_grad:  # the first layers: here what is differentiated begins
                output = output.detach().requires_grad_()
            output.register_hook(partial(add, name))
            # Whoever changes it in place must not change a leaf.
            return output.clone() if output.is_leaf else output

        self._is_asking = True
        try:
            with ExitStack() as hooks, torch.inference_mode(False), torch.enable_grad():
                for name, layer in self.layers.items():
                    hooks.enter_context(layer.register_forward_hook(partial(observe, name)))
                returned = self.model(*_map(_plain, inputs), **_map(_plain, named))
                values = [v for v in _tensors_of(returned) if v.requires_grad]
                if not values:
                    raise CalibrationError(
                        f"What {type(self.model).__name__} returns does not depend on any of the "
                        f"{len(self.layers)} layers through gradients. Collect without "
                        "`sensitivity`."
                    )
                noise = torch.Generator("cpu").manual_seed(layer_seed(0, f"call {call}"))
                random = [
                    torch.randn(v.shape, generator=noise, device="cpu").to(v.device, v.dtype)
                    for v in values
                ]
                try:
                    torch.autograd.backward(values, random)
                except RuntimeError as error:
                    raise CalibrationError(
                        f"{type(self.model).__name__} has no gradients ({error}). Collect without "
                        "`sensitivity`, or give the model gradient checkpointing if memory is "
                        "short."
                    ) from error
        finally:
            self._is_asking = False
        return {name: sums[name] / counts[name] for name in sums}


def _channels_last(layer: nn.Module, output: Tensor) -> Tensor:
    return output.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else output


def _outputs_of(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return len(weight)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return tuples, lists and plain dictionaries with their tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_map(change, item) for item in value)
    if type(value) is dict:
        return {name: _map(change, item) for name, item in value.items()}
    return value


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor that may be differentiated through, as one of inference mode may not."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _tensors_of(value: object) -> Iterator[Tensor]:
    """Yield the floating-point tensors in what a model returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors_of(item)
