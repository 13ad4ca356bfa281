"""What errors of a layer do to what the model returns, measured while it runs: `Sensitivity`.

Let y be a layer's output in one call of the model, v what the call returns, and J = ∂v/∂y. An error
e of y moves v by J e, so that what matters of it is E‖J e‖². For random r of independent numbers of
unit variance the gradient g of r·v with respect to y has E[g gᵀ] = JᵀJ (Hutchinson's estimate): one
forward and one backward pass tell it for all layers at once. From it are taken, as if errors of
tokens and of outputs were uncorrelated,

* a weight of the call, the mean of g² over tokens and outputs: second moments of inputs count the
  calls by it, so that timesteps count in which errors matter;
* a weight of each output, the sum of g² over tokens and calls: rows of the weight count by it.

The extra pass draws no random number of the run's and takes copies of its inputs; a model that
counts its calls, or keeps what it has seen, is called once more for each of them all the same.

Both together are the diagonal on the side of the outputs of K-FAC's factored Gauss–Newton matrix
(arXiv 1503.05671), with one number for all tokens of a call. Nothing but the samples is needed, and
nothing is trained.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraq.errors import CalibrationError
from loraq.layers import LinearLayer, matrix_of
from loraq.methods.base import layer_seed

#: Weight of a call whose result does not depend on a layer: next to nothing, and all calls alike
#: where they are all such.
_NOTHING = 1e-200


@dataclass
class Sensitivity:
    """Runs a model with gradients before each of its calls, and remembers what they say."""

    model: nn.Module
    layers: Mapping[str, LinearLayer]
    #: Mean squared gradients of each call, by layer.
    _calls: list[dict[str, float]] = field(default_factory=list)
    #: Sums of squared gradients of each output, by layer.
    _outputs: dict[str, Tensor] = field(default_factory=dict)
    #: The call that runs, if one does, and how deep it is in calls of the model by itself.
    _now: int | None = None
    _depth: int = 0
    _is_asking: bool = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Ask before each call of the model, unless an earlier run had asked before that call."""
        self._now, self._depth, begun = None, 0, 0

        def begin(_model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal begun
            if self._is_asking:
                return
            self._depth += 1
            if self._depth > 1:
                return
            if begun == len(self._calls):
                self._calls.append(self._ask(begun, inputs, named))
            self._now, begun = begun, begun + 1

        def end(*_: object) -> None:
            if self._is_asking:
                return
            self._depth -= 1
            if not self._depth:
                self._now = None

        with ExitStack() as undo:
            undo.enter_context(self._without_gradients_of_weights())
            # Others may change the inputs: first of all, so that they do it once in each pass.
            before = self.model.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
            undo.enter_context(before)
            undo.enter_context(self.model.register_forward_hook(end, always_call=True))
            yield

    @contextmanager
    def _without_gradients_of_weights(self) -> Iterator[None]:
        """Let weights have no gradients, which nobody asks for."""
        trained = [name for name, w in self.model.named_parameters() if w.requires_grad]
        self.model.requires_grad_(False)
        try:
            yield
        finally:  # by name, because offloading puts others in their place
            weights = dict(self.model.named_parameters())
            for name in trained:
                with torch.inference_mode(weights[name].is_inference()):
                    weights[name].requires_grad_(True)

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
            width = len(matrix_of(self.layers[name]))
            return torch.ones(width, dtype=torch.float32, device="cpu")
        return (found / mean).float().cpu()

    def _ask(self, call: int, inputs: tuple[Any, ...], named: dict[str, Any]) -> dict[str, float]:
        """Return the mean squared gradient of each layer's output in a call with these inputs."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}

        def add(name: str, gradient: Tensor) -> None:
            if not gradient.numel():
                return
            rows = self._square(name, gradient)
            self._outputs[name] = self._outputs.get(name, 0) + rows
            sums[name] = sums.get(name, 0.0) + rows.sum().item()
            counts[name] = counts.get(name, 0) + gradient.numel()

        def observe(name: str, _layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            if not output.requires_grad:  # the first layers: here what is differentiated begins
                output = output.detach().requires_grad_()
            output.register_hook(partial(add, name))
            # Whoever changes it in place must not change a leaf.
            return output.clone() if output.is_leaf else output

        given = (*_tensors_of(inputs), *_tensors_of(named))
        places = {tensor.device.index for tensor in given if tensor.device.type == "cuda"}
        self._is_asking = True
        try:
            with (
                ExitStack() as hooks,
                torch.random.fork_rng(places),
                torch.inference_mode(False),
                torch.enable_grad(),
            ):
                for name, layer in self.layers.items():
                    hooks.enter_context(layer.register_forward_hook(partial(observe, name)))
                returned = self.model(*_map(_copy, inputs), **_map(_copy, named))
                self._pass_back(call, [v for v in _tensors_of(returned) if v.requires_grad])
        except RuntimeError as error:
            raise CalibrationError(
                f"{type(self.model).__name__} fails when it is run with gradients ({error}). "
                "Collect without `sensitivity` (`--sensitivity`), or give the model gradient "
                "checkpointing if memory is short."
            ) from error
        finally:
            self._is_asking = False
        return {name: sums[name] / counts[name] for name in sums}

    def _pass_back(self, call: int, returned: list[Tensor]) -> None:
        """Differentiate a random combination of what a call has returned."""
        if not returned:
            raise CalibrationError(
                f"No tensor that {type(self.model).__name__} returns depends on the "
                f"{len(self.layers)} layers through gradients. Collect without `sensitivity` "
                "(`--sensitivity`)."
            )
        noise = torch.Generator("cpu").manual_seed(layer_seed(0, f"call {call}"))
        random = [
            torch.randn(v.shape, generator=noise, dtype=torch.float32, device="cpu").to(v)
            for v in returned
        ]
        torch.autograd.backward(returned, random)

    def _square(self, name: str, gradient: Tensor) -> Tensor:
        """Return the sum of squares of each output, in double precision on the CPU."""
        size = gradient.abs().max().item()
        if not math.isfinite(size):
            raise CalibrationError(
                f"The gradient at layer '{name}' is not a finite number. Run the model in a wider "
                "dtype, or collect without `sensitivity` (`--sensitivity`)."
            )
        # Squares of the gradient itself could leave fp32, and not every device has doubles.
        squares = (channels_last(self.layers[name], gradient).float() / (size or 1.0)).square()
        return squares.reshape(-1, squares.shape[-1]).sum(0).cpu().double() * size**2


def channels_last(layer: LinearLayer, x: Tensor) -> Tensor:
    """Return a layer's input or output with its channels on the last axis."""
    return x.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else x


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return tuples, lists and dictionaries with their tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(change, item) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_map(change, item) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((name, _map(change, item)) for name, item in value.items())
    return value


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy, which the model may change in place and differentiate through."""
    return tensor.detach().clone()


def _tensors_of(value: object) -> Iterator[Tensor]:
    """Yield the floating-point tensors in what a model takes or returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors_of(item)
    elif is_dataclass(value):
        for item in fields(value):
            yield from _tensors_of(getattr(value, item.name))
