"""Find the linear layers of a module, replace them, and switch how they run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from loraq.kernels import check_for_all, resolve_backend
from loraq.nn import QuantizedConv1x1, QuantizedLayer, QuantizedLinear
from loraq.state import answer_for_weights

#: What `linear_layers` finds: a matrix times every token, or times every pixel.
LinearLayer = nn.Linear | nn.Conv2d
#: One of a module's tables (of modules, parameters or buffers), a name in it, and its new value.
Change = tuple[dict[str, Any], str, Any]


def linear_layers(model: nn.Module) -> dict[str, LinearLayer]:
    """Return every linear layer below a module by its dotted name, in the order of the module tree.

    Linear are `nn.Linear` and an `nn.Conv2d` of 1×1 pixel, which multiplies every pixel with a
    matrix. A layer that stands in several places appears once, under its first name. Subclasses are
    left out, because they may compute something else, and so is the module itself, because it
    cannot be replaced in place.
    """
    return {name: module for name, module in model.named_modules() if name and is_linear(module)}


def is_linear(module: nn.Module) -> TypeGuard[LinearLayer]:
    """Return whether a module multiplies with one matrix, adds a bias, and does nothing else."""
    if type(module) is nn.Conv2d:
        steps = (module.kernel_size, module.stride, module.padding, module.groups)
        return steps == ((1, 1), (1, 1), (0, 0), 1)
    return type(module) is nn.Linear


def matrix_of(layer: LinearLayer) -> Tensor:
    """Return the weight of a linear layer as the matrix (out, in), a view."""
    return layer.weight.flatten(1)


def matrix_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every linear layer below a module by its dotted name."""
    matrices = {name: matrix_of(layer) for name, layer in linear_layers(model).items()}
    return {name: (matrix.shape[0], matrix.shape[1]) for name, matrix in matrices.items()}


def other_weights(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and kind of every float weight that no linear layer holds, by its name.

    A weight has two or more axes.
    These cannot be quantized: embeddings, larger convolutions, experts stacked in one tensor,
    subclasses of `nn.Linear`. The kind is the class of the module that holds the parameter.
    """
    found = {}
    for name, parameter in model.named_parameters():
        owner_name, _, _ = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if (
            parameter.dim() >= 2
            and parameter.is_floating_point()
            and not (owner_name and is_linear(owner))
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


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module called `name` by another one, wherever it stands."""
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


def find_places(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[Change]:
    """Return the changes that put new layers where old ones stand, for `swap`.

    A layer that stands in several places is replaced in all of them. The new one takes over whether
    it is in training mode.
    """
    new_of = {model.get_submodule(name): new for name, new in layers.items()}
    for old, new in new_of.items():
        new.train(old.training)
    return [
        (parent._modules, child, new_of[old])
        for parent in model.modules()
        for child, old in parent._modules.items()  # `named_children` leaves out second names
        if old is not None and old in new_of
    ]


def swap(changes: Sequence[Change]) -> None:
    """Put values into a module's tables, all of them or none.

    Whatever interrupts it, a Ctrl-C too, the tables are as they were.
    """
    before = [(table, key, table[key]) for table, key, _ in changes]
    try:
        for table, key, value in changes:
            table[key] = value
    except BaseException:
        for table, key, value in before:
            table[key] = value
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
