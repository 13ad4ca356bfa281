"""`collect_stats`: run a model, and count what goes into its linear layers."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from loraq.checkpoint.apart import require_apart
from loraq.checkpoint.origin import origin_of
from loraq.checkpoint.stats_file import Shapes, load_stats, require_room, stats_file
from loraq.errors import CalibrationError
from loraq.layers import LinearLayer, bare_model, is_linear, matrix_of
from loraq.options import checked
from loraq.pipeline.call_groups import CallGroups
from loraq.pipeline.sensitivity import Sensitivity, channels_last
from loraq.stats import N_CALL_GROUPS, ActivationStats, StatsShapes

#: Tokens whose products are summed in fp32 before they are added in fp64.
_CHUNK = 4096
#: Rows of a second moment that are worked on at a time: temporary copies of all of it would take
#: more than itself.
_ROWS = 256


@checked
def collect_stats(  # noqa: PLR0913 - what is counted, and where it may go
    model: nn.Module,
    run: Callable[[], object],
    layers: Iterable[str],
    *,
    second_moment: bool = True,
    sensitivity: bool = False,
    max_tokens: int | None = None,
    tokens_per_call: int | None = None,
    memory_bytes: int | None = None,
    target: str | Path | None = None,
) -> Mapping[str, ActivationStats]:
    """Run a model and return the statistics of the inputs of some of its linear layers.

    A layer takes `in`² numbers in fp64 while it is counted, on the device of its inputs, or `in`
    without the second moment. Where that is too much, `memory_bytes` counts the layers in groups
    and runs the model once for each, and `target` keeps what is finished on the disk. The model is
    not changed. Let `run` see what the model will see: all timesteps, all resolutions, with and
    without a caption.

    Args:
        model: with float weights.
        run: calls the model as often as needed; gradients are switched off. With `memory_bytes` it
            is called more than once: seed its noise, so that all layers are counted on the same
            inputs.
        layers: dotted names of `nn.Linear` and 1×1 `nn.Conv2d`, such as those of `plan_model(model,
            recipe).quantized`.
        second_moment: whether all of E[x xᵀ] is collected, which "gptq" needs; else only E[x²].
        sensitivity: whether calls and outputs are weighed by what their errors do to what the model
            returns (`loraq.pipeline.sensitivity`). Each call of the model then is one more forward
            and one backward pass, and takes memory for gradients that `memory_bytes` does not
            count; a model with gradient checkpointing takes less. Outputs count by all tokens,
            whatever the limits below.
        max_tokens: a layer counts no more than its first so many inputs; `None` counts all.
        tokens_per_call: a layer counts no more than so many inputs of one call, evenly spread;
            `None` counts all.
        memory_bytes: what the counts of layers may take together; `None` counts all layers in one
            run.
        target: the .safetensors file to make or to replace, as `save_stats` does, group by group;
            `None` keeps all in memory.

    Returns:
        Statistics by layer; with a `target` they are read from it each time they are asked for.

    Raises:
        CalibrationError: a name is not that of a linear layer, a layer was never called, its input
            was not finite, or it alone takes more than `memory_bytes`; with `sensitivity`, the
            model has no gradients, or a layer ran outside of a call of it.
        CheckpointError: the target cannot be written, or lies in the folder of the model.
    """
    model = bare_model(model)
    if target is not None:
        require_apart(target, origin_of(model))
    for name, limit in {"max_tokens": max_tokens, "tokens_per_call": tokens_per_call}.items():
        if limit is not None and limit < 1:
            raise CalibrationError(f"{name} is {limit}. It must be at least 1, or `None`.")
    modules = dict(model.named_modules())
    found = {name: _linear(modules, name) for name in layers}
    if not found:
        raise CalibrationError(
            "No layer was named. `loraq.plan_model` says which a recipe quantizes."
        )
    widths = {name: matrix_of(layer).shape[1] for name, layer in found.items()}
    groups = group_layers(widths, memory_bytes, second_moment=second_moment)
    amount = _Amount(second_moment, max_tokens or math.inf, tokens_per_call)
    asked = Sensitivity(model, found) if sensitivity else None
    counted = _count_layers(found, run, groups, amount, asked)
    if target is None:
        stats = dict(counted)
        return {name: stats[name] for name in found}
    shapes = shapes_of(
        {name: matrix_of(layer).shape for name, layer in found.items()},
        second_moment=second_moment,
        sensitivity=sensitivity,
    )
    require_room(Path(target), shapes, overwrite=True)
    with stats_file(Path(target), shapes) as write:
        for layer in counted:
            write(*layer)
            del layer  # not kept beside the next one
    return load_stats(target)


def shapes_of(
    matrices: Mapping[str, tuple[int, ...]], *, second_moment: bool, sensitivity: bool
) -> Shapes:
    """Return the shapes of what is collected for each layer.

    Args:
        matrices: (out, in) of each.
        second_moment: as `collect_stats` takes it.
        sensitivity: as `collect_stats` takes it.
    """
    return {
        name: StatsShapes(
            (n_in, n_in) if second_moment else (n_in,),
            (n_out,) if sensitivity else None,
            None if sensitivity else (N_CALL_GROUPS, n_in),
        )
        for name, (n_out, n_in) in matrices.items()
    }


def counting_bytes(width: int, *, second_moment: bool) -> int:
    """Return the bytes that a layer of `width` inputs takes while it is counted: sums in fp64.

    Groups of calls are counted as well, and the call that is joined to one of them.
    """
    return 8 * width * ((width if second_moment else 1) + N_CALL_GROUPS + 1)


def group_layers(
    widths: Mapping[str, int], memory_bytes: int | None, *, second_moment: bool = True
) -> list[list[str]]:
    """Return the names of layers in as few groups as first-fit finds, the widest first.

    A group takes the sums of its layers, and beside them the finished moment of one layer in fp32.

    Args:
        widths: size of each layer's input axis.
        memory_bytes: what a group may take; `None` puts all in one.
        second_moment: whether all of E[x xᵀ] is counted, or only E[x²].

    Raises:
        CalibrationError: a layer alone takes more.
    """
    if memory_bytes is None:
        return [list(widths)]
    groups: list[list[str]] = []
    left: list[int] = []
    for name, width in sorted(widths.items(), key=lambda item: -item[1]):
        needed = counting_bytes(width, second_moment=second_moment)
        scratch = 4 * width * width if second_moment else 0
        if needed + scratch > memory_bytes:
            raise CalibrationError(
                f"Counting layer '{name}' with its {width} inputs takes "
                f"{(needed + scratch) / 1e9:.3g} GB, and {memory_bytes / 1e9:.3g} GB are allowed. "
                "Allow as much (`--memory`, `memory_bytes`), or collect mean squares only "
                "(`--mean-squares`, `second_moment=False`)."
            )
        group = next((i for i, room in enumerate(left) if needed <= room), len(groups))
        if group == len(groups):
            groups.append([])
            left.append(memory_bytes - scratch)
        groups[group].append(name)
        left[group] -= needed
    return groups


@dataclass(frozen=True)
class _Amount:
    """How much is counted of every layer's inputs."""

    full: bool
    most: float
    per_call: int | None


def _count_layers(
    layers: Mapping[str, LinearLayer],
    run: Callable[[], object],
    groups: list[list[str]],
    amount: _Amount,
    sensitivity: Sensitivity | None,
) -> Iterator[tuple[str, ActivationStats]]:
    """Yield the statistics of one layer after the other, each freed before the next is made."""
    for i, group in enumerate(groups):
        # The first run looks for layers that are never called among all, not hours later in their
        # own group.
        watched = group if i else layers
        called: set[str] = set()
        counts = {name: _Count(name, layers[name], amount, sensitivity) for name in group}
        with ExitStack() as hooks, torch.no_grad():
            if sensitivity is not None:
                hooks.enter_context(sensitivity.watch())
            for name in watched:
                hooks.enter_context(
                    layers[name].register_forward_pre_hook(_note(called, name), with_kwargs=True)
                )
            for count in counts.values():
                hooks.enter_context(count.layer.register_forward_pre_hook(count, with_kwargs=True))
            run()
        if idle := [name for name in watched if name not in called]:
            raise CalibrationError(
                f"{len(idle)} of {len(watched)} layers were never called: {', '.join(idle[:4])}. "
                "Let the run use all of the model, or leave them out (`skip = true` in a rule of "
                "the recipe)."
            )
        for name in group:
            yield name, counts.pop(name).stats()


def _note(
    called: set[str], name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
    def note(_layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        if _input_of(inputs, named).numel():
            called.add(name)

    return note


def _input_of(inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> Tensor:
    return inputs[0] if inputs else named["input"]  # what torch calls it in both kinds of layers


class _Count:
    """A hook that adds up the inputs of one layer."""

    def __init__(
        self, name: str, layer: LinearLayer, amount: _Amount, sensitivity: Sensitivity | None
    ) -> None:
        self.name, self.layer, self.amount = name, layer, amount
        self.sensitivity = sensitivity
        self.left, self.tokens, self.weights = amount.most, 0, 0.0
        self._sum: Tensor | None = None
        self._calls = CallGroups()

    def __call__(
        self, _layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        x = _input_of(inputs, named)
        if not self.left or not x.numel():
            return
        weight = 1.0 if self.sensitivity is None else self.sensitivity.weigh_call(self.name)
        if not weight:
            return
        # A run under autocast would have products of 16 bits, and one in inference mode sums that
        # no other can add to.
        with (
            torch.autocast(x.device.type, enabled=False),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            self._add(x, weight)

    def _add(self, x: Tensor, weight: float) -> None:
        x = channels_last(self.layer, x)
        x = self._choose(x.reshape(-1, x.shape[-1]))
        if not x.isfinite().all():
            raise CalibrationError(
                f"Layer '{self.name}' got an input that is not a finite number. Run the model in a "
                "wider dtype, or look for the layer before it that overflows."
            )
        width, full = x.shape[1], self.amount.full
        if self._sum is None:  # a model may be offloaded: only its inputs tell where it runs
            self._sum = torch.zeros(
                (width, width) if full else width, dtype=torch.float64, device=x.device
            )
        squares = torch.zeros(width, dtype=torch.float64, device=x.device)
        for part in map(Tensor.float, x.split(_CHUNK)):
            for rows in _slices(width) if full else ():
                self._sum[rows].add_(part[:, rows].mT @ part, alpha=weight)
            squares += part.square().sum(0)
        if not full:
            self._sum.add_(squares, alpha=weight)
        if self.sensitivity is None:
            self._calls.add(squares, len(x))
        self.tokens += len(x)
        self.weights += weight * len(x)
        self.left -= len(x)

    def _choose(self, x: Tensor) -> Tensor:
        """The inputs of one call that are counted."""
        most = self.amount.per_call
        if most is not None and most < len(x):
            x = x[torch.arange(most, device=x.device) * len(x) // most]
        return x[: int(min(self.left, len(x)))]

    def stats(self) -> ActivationStats:
        """Return what was counted, on the CPU; the sums are given up for it."""
        assert self._sum is not None, "a layer that was never called"
        moment = torch.empty(self._sum.shape, dtype=torch.float32, device="cpu")
        if self.amount.full:
            for rows in _slices(len(moment)):
                moment[rows] = (self._sum[rows] + self._sum[:, rows].mT).div_(2 * self.weights)
        else:
            moment.copy_(self._sum / self.weights)
        self._sum = None
        if self.sensitivity is None:  # else the moment knows already which calls count
            others = {"call_mean_squares": self._calls.mean_squares().float().cpu()}
        else:
            others = {"output_sensitivity": self.sensitivity.of_outputs(self.name)}
        try:
            return ActivationStats(self.tokens, moment, **others)
        except CalibrationError as error:  # squares of numbers that are finite need not be
            raise CalibrationError(f"Layer '{self.name}': {error}") from error


def _slices(size: int) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, size, _ROWS)]


def _linear(modules: Mapping[str, nn.Module], name: str) -> LinearLayer:
    if name not in modules:
        raise CalibrationError(
            f"The model has no layer '{name}'. `loraq.plan_model` lists its linear layers."
        )
    if not is_linear(layer := modules[name]):
        raise CalibrationError(
            f"'{name}' is a {type(layer).__name__}. Statistics are for `nn.Linear` and 1×1 "
            "`nn.Conv2d`."
        )
    return layer
