"""Find the linear layers of a module, replace them, and switch how they run."""

from collections.abc import Iterator

from torch import nn

from loraq.kernels import asked_backend, choose
from loraq.nn import QuantizedLinear


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every `nn.Linear` below a module by its dotted name, in the order of the module tree.

    A layer that stands in several places appears once, under its first name. Subclasses are left out, because they
    may compute something else, and so is the module itself, because it cannot be replaced in place.
    """
    return {name: module for name, module in model.named_modules() if name and type(module) is nn.Linear}


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return every `QuantizedLinear` below a module by its dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put another module in place of the one called `name`, at every place where that one stands."""
    old = model.get_submodule(name)
    for parent, child in list(_places(model)):
        if getattr(parent, child) is old:
            setattr(parent, child, new)
    new.train(old.training)


def set_backend(model: nn.Module, name: str) -> None:
    """Run every quantized layer of a model on the back end called `name`; "auto" chooses for each layer.

    Raises:
        KernelError: there is no such back end, or it refuses a layer; no layer is switched then.
    """
    asked, layers = asked_backend(name), quantized_layers(model)
    for layer in layers.values():
        choose(asked, layer.scheme, (layer.out_features, layer.in_features), layer.weight_packed.device)
    for layer in layers.values():
        layer.backend = name


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        for child in module._modules:  # `named_children` leaves out a module's second name
            yield module, child
