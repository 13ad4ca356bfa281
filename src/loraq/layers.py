"""Find the linear layers of a module and its stacked experts, replace them, switch how they run."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from loraq.errors import LayerError
from loraq.experts import QuantizedExperts
from loraq.kernels import check_for_all, resolve_backend
from loraq.nn import QuantizedConv1x1, QuantizedLayer, QuantizedLinear
from loraq.stacks import Stack, stacks_in
from loraq.state import answer_for_weights

#: What `linear_layers` finds: a matrix times every token, or times every pixel.
LinearLayer = nn.Linear | nn.Conv2d
#: One of a module's tables (of modules, parameters or buffers), a name in it, and its new value.
Change = tuple[dict[str, Any], str, Any]
#: In place of a new value: the name leaves the table.
GONE = object()

#: Modules that run another one, their `module`, and add nothing to what it computes.
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
#: What was registered to be called around a layer's forward or backward pass.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model that a wrapper around all of it runs: `torch.compile`, DDP, an average.

    Its names are those that belong on the disk, and its class is the one whose rules apply.
    """
    while True:
        inner = model._modules.get(
            "_orig_mod"
        )  # of `torch.compile`, whose class takes long to load
        if inner is None and isinstance(model, _WRAPPERS):
            inner = model.module
        if inner is None:
            return model
        model = inner


def require_bare(model: nn.Module) -> None:
    """Require that every linear layer of a model is itself, and not a part of something else.

    Raises:
        LayerError: the model, or a part of it, is wrapped in a way that changes names or weights;
            the message says how to undo it.
    """
    for name, module in model.named_modules():
        children = module._modules
        if "base_layer" in children or "original_module" in children:
            raise LayerError(
                f"'{name}' carries an adapter ({type(module).__name__}), which must not become a "
                "part of the packed weights. Fuse the adapters or remove them (`unload_lora`, "
                "`delete_adapters`), quantize, and add them again."
            )
        if "_orig_mod" in children:
            raise LayerError(
                f"'{name}' is compiled, which changes the names of its layers. Quantize the model "
                "first; or compile with `module.compile()`, which leaves the names alone."
            )
        if "_fsdp_wrapped_module" in children:
            raise LayerError(
                f"'{name or type(model).__name__}' is sharded (FSDP), so that no layer has its "
                "whole weight. Quantize the model first, and shard it then."
            )
        if is_linear(module):
            _require_own_weight(name, module)
        for leaf in stacks_in(module):
            _require_plain(f"{name}.{leaf}", module._parameters[leaf])


def _require_own_weight(name: str, layer: LinearLayer) -> None:
    """Require that a linear layer multiplies with a plain parameter, and nobody intervenes."""
    if "forward" in vars(layer):
        raise LayerError(
            f"Layer '{name}' runs a function that was put in place of its own `forward`, which "
            "quantizing would lose. Remove it first: a hook of accelerate with "
            "`accelerate.hooks.remove_hook_from_module(model, recurse=True)`, an adapter by its "
            "own library."
        )
    is_computed = parametrize.is_parametrized(layer, "weight")
    if not is_computed and layer._parameters.get("weight") is None:
        raise LayerError(
            f"The weight of layer '{name}' is not a parameter but is set by a hook (such as the "
            "older `weight_norm`, or pruning). Make it permanent, with `remove_weight_norm` or "
            "`prune.remove`, and quantize then."
        )
    if not is_computed:
        _require_plain(name, layer.weight)


def _require_plain(name: str, weight: Tensor | None) -> None:
    if type(weight) is not nn.Parameter:
        raise LayerError(
            f"The weight of layer '{name}' is a {type(weight).__name__}, not a plain tensor: "
            "it is sharded, quantized by another library, or not there yet. Start from plain float "
            "weights."
        )


def linear_layers(model: nn.Module) -> dict[str, LinearLayer]:
    """Return every linear layer below a module by its dotted name, in the order of the module tree.

    Linear are `nn.Linear` and an `nn.Conv2d` of 1×1 pixel, which multiplies every pixel with a
    matrix; subclasses too, as long as they compute the same. A layer that stands in several places
    appears once, under its first name. The module itself is left out, because it cannot be replaced
    in place.
    """
    return {name: module for name, module in model.named_modules() if name and is_linear(module)}


def is_linear(module: nn.Module) -> TypeGuard[LinearLayer]:
    """Return whether a module multiplies with one matrix, adds a bias, and does nothing else.

    The projection in `nn.MultiheadAttention` is none: its owner reads the weight, and never calls
    it.
    """
    kind: Any = type(module)
    if isinstance(module, nn.Conv2d):
        steps = (module.kernel_size, module.stride, module.padding, module.groups)
        is_plain = kind.forward is nn.Conv2d.forward
        is_plain &= kind._conv_forward is nn.Conv2d._conv_forward
        return is_plain and steps == ((1, 1), (1, 1), (0, 0), 1)
    return (
        isinstance(module, nn.Linear)
        and kind.forward is nn.Linear.forward
        and not isinstance(module, NonDynamicallyQuantizableLinear)
    )


def matrix_of(layer: LinearLayer) -> Tensor:
    """Return the weight of a linear layer as the matrix (out, in), a view."""
    return layer.weight.flatten(1)


def find_stacks(model: nn.Module) -> dict[str, Stack]:
    """Return every stack of experts of a module by the dotted name of its parameter.

    A module that stands in several places counts once, under its first name.
    """
    return {
        f"{name}.{leaf}".lstrip("."): stack
        for name, module in model.named_modules()
        for leaf, stack in stacks_in(module).items()
    }


def matrix_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of all that can be quantized in a module, by its dotted name.

    It is (out, in) of every linear layer, and (experts, out, in) of every stack of experts. The
    order is that of the quantized model, where a stack is the last child of its module.
    """
    return dict(_walk(model, "", set()))


def _walk(
    module: nn.Module, name: str, seen: set[nn.Module]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    seen.add(module)
    if name and is_linear(module):
        yield name, tuple(matrix_of(module).shape)
    prefix = f"{name}." if name else ""
    for child_name, child in module._modules.items():
        if child is not None and child not in seen:
            yield from _walk(child, prefix + child_name, seen)
    for leaf, stack in stacks_in(module).items():
        yield prefix + leaf, stack.shape


def tied_layers(model: nn.Module) -> dict[str, str]:
    """Return every linear layer whose weight another module has too, and the name it has there.

    That is how a language model shares its table of tokens with its output layer. Packed, the two
    would not be one weight any longer.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner_name, owner in model.named_modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                name = f"{owner_name}.{leaf}" if owner_name else leaf
                places.setdefault(id(parameter), []).append((owner, name))
    found = {}
    for name, layer in linear_layers(model).items():
        holders = places.get(id(layer._parameters.get("weight")), [])
        if others := [place for owner, place in holders if owner is not layer]:
            found[name] = others[0]
    return found


def other_weights(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and kind of every float weight that no linear layer holds, by its name.

    A weight has two or more axes, and is no stack of experts.
    These cannot be quantized: embeddings, larger convolutions, subclasses of `nn.Linear`. The kind
    is the class of the module that holds the parameter.
    """
    found, stacks = {}, find_stacks(model)
    for name, parameter in model.named_parameters():
        owner_name, _, _ = name.rpartition(".")
        owner_name, _, _ = owner_name.partition(".parametrizations.")
        owner = model.get_submodule(owner_name)
        if (
            parameter.dim() >= 2
            and parameter.is_floating_point()
            and not (owner_name and is_linear(owner))
            and name not in stacks
        ):
            found[name] = (tuple(parameter.shape), type(owner).__name__)
    return found


def quantized_class(layer: nn.Module) -> type[QuantizedLinear | QuantizedConv1x1]:
    """Return the class that a linear layer becomes; a quantized layer keeps its own."""
    return QuantizedConv1x1 if isinstance(layer, nn.Conv2d | QuantizedConv1x1) else QuantizedLinear


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return every quantized layer below a module by its dotted name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)
    }


def replace_layer(model: nn.Module, name: str, new: nn.Module | nn.Parameter) -> None:
    """Replace the layer called `name` by another one, wherever it stands."""
    swap(find_places(model, {name: new}))
    if isinstance(new, QuantizedLayer):
        answer_for_weights(model, [name])


def take_dtype(model: nn.Module) -> None:
    """Give the weights of quantized layers without a bias the dtype of the model's other floats.

    Packed bytes do not say it. It is the dtype that holds most numbers.
    """
    numbers = Counter[torch.dtype]()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            numbers[parameter.dtype] += parameter.numel()
    if numbers:
        (dtype, _), *_ = numbers.most_common(1)
        for layer in quantized_layers(model).values():
            layer.weight_dtype = dtype


def find_places(model: nn.Module, layers: Mapping[str, nn.Module | nn.Parameter]) -> list[Change]:
    """Return the changes that put new layers where old ones stand, for `swap`.

    What stands for a stack of experts is a parameter in floats, and a module when quantized.

    A layer that stands in several places is replaced in all of them. The new one takes over whether
    it is in training mode, and the hooks that were registered; their handles remove them there too.
    """
    changes: list[Change] = []
    new_of: dict[nn.Module, nn.Module] = {}
    for name, new in sorted(layers.items()):
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if isinstance(new, nn.Parameter):  # a stack of experts again
            changes += [(owner._modules, leaf, GONE), (owner._parameters, leaf, new)]
        elif leaf in owner._parameters:  # which has become a module
            new.train(owner.training)
            changes += [(owner._parameters, leaf, GONE), (owner._modules, leaf, new)]
            # In whatever order they come, they stand by name: so all ways write the same bytes.
            for other, child in owner._modules.items():
                if other > leaf and isinstance(child, QuantizedExperts):
                    changes += [(owner._modules, other, GONE), (owner._modules, other, child)]
        else:
            new_of[model.get_submodule(name)] = new
    for old, new in new_of.items():
        new.train(old.training)
        for hooks in _HOOKS:
            setattr(new, hooks, getattr(old, hooks))
    return changes + [
        (parent._modules, child, new_of[old])
        for parent in model.modules()
        for child, old in parent._modules.items()  # `named_children` leaves out second names
        if old is not None and old in new_of
    ]


def swap(changes: Sequence[Change]) -> None:
    """Put values into a module's tables, all of them or none.

    Whatever interrupts it, a Ctrl-C too, the tables are as they were.
    """
    before = {id(table): (table, dict(table)) for table, _, _ in changes}
    try:
        for table, key, value in changes:
            if value is GONE:
                del table[key]
            else:
                table[key] = value
    except BaseException:
        for table, content in before.values():
            table.clear()
            table.update(content)
        raise


def set_backend(model: nn.Module, name: str) -> None:
    """Run every quantized layer of a model on a back end; "auto" chooses for each layer.

    Layers that it refuses, such as weight-only ones, run on the automatic choice; a warning of the
    logger `loraq.kernels` counts them.

    Raises:
        KernelError: there is no such back end, or it refuses every layer; no layer is switched
            then.
    """
    layers = list(quantized_layers(model).values())
    check_for_all(resolve_backend(name), [layer.spec for layer in layers])
    for layer in layers:
        layer.ask_backend(name, strict=False)
