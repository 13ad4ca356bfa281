"""What of a model the layers of a manifest take the place of, and empty layers to put there."""

import torch
from torch import Tensor, nn

from loraq.checkpoint.manifest import Manifest, StoredLayer
from loraq.errors import CheckpointError, KernelError, SchemeError
from loraq.experts import QuantizedExperts
from loraq.layers import is_linear, matrix_of, quantized_class
from loraq.nn import QuantizedLayer
from loraq.packed import PackedWeight
from loraq.scheme import Scheme
from loraq.stacks import Stack, stacks_in


def find_replaced(model: nn.Module, layers: dict[str, QuantizedLayer]) -> dict[str, QuantizedLayer]:
    """Return the new layers by every name that what they replace has.

    One module may stand in two places.
    """
    new = {}
    for name, layer in layers.items():
        owner, _, leaf = name.rpartition(".")
        new[_standing(model.get_submodule(owner), leaf)] = layer
    return {
        f"{name}.{leaf}" if name else leaf: new[_standing(module, leaf)]
        for name, module in model.named_modules(remove_duplicate=False)
        for leaf in (*module._parameters, *module._modules)
        if _standing(module, leaf) in new
    }


def _standing(owner: nn.Module, leaf: str) -> nn.Module | tuple[nn.Module, str] | None:
    """Return what stands under a name in a module: a module, or a parameter's place."""
    return (owner, leaf) if leaf in owner._parameters else owner._modules.get(leaf)


def build_empty_layer(model: nn.Module, name: str, manifest: Manifest) -> QuantizedLayer:
    """Return the empty layer that a manifest describes under a name.

    Raises:
        CheckpointError: the model has none that it fits in place of.
    """
    stored, (owner_name, _, leaf) = manifest.layers[name], name.rpartition(".")
    try:
        owner = model.get_submodule(owner_name)
        old = owner._parameters.get(leaf)
        layer: QuantizedLayer | None = None
        if stored.is_stack:
            layer = _build_stack(owner, leaf, stored)
        elif old is None:
            layer = _build_linear(model.get_submodule(name), stored)
    except AttributeError as error:
        raise CheckpointError(
            f"The model has no layer '{name}'. Load into the architecture it was made from."
        ) from error
    except (SchemeError, KernelError) as error:
        raise CheckpointError(f"Layer '{name}' cannot be built: {error}") from error
    if layer is None:
        found = model.get_submodule(name) if old is None else f"of shape {tuple(old.shape)}"
        wanted = "stack of experts" if stored.is_stack else "linear layer"
        raise CheckpointError(
            f"Layer '{name}' is {found}. The checkpoint has a {wanted} of shape {stored.shape}"
            f"{', transposed' if stored.transposed else ''}."
        )
    layer.record = manifest.record(name)
    return layer


def _build_stack(owner: nn.Module, leaf: str, stored: StoredLayer) -> QuantizedExperts | None:
    """Return the empty stack for a place in a module; `None` if it is not the stack that is there.

    Raises `AttributeError` if nothing is there.
    """
    old = getattr(owner, leaf)
    found: Stack | None
    if isinstance(old, QuantizedExperts):
        found = Stack(old.packed_shape, old.transposed)
    else:
        found = stacks_in(owner).get(leaf)
    n_experts, n_out, n_in = stored.shape
    if found != Stack((n_experts, n_out, n_in), stored.transposed):
        return None
    return QuantizedExperts(
        n_experts,
        n_in,
        n_out,
        stored.scheme,
        transposed=stored.transposed,
        device="meta",
        dtype=old.dtype,
    )


def _build_linear(old: nn.Module, stored: StoredLayer) -> QuantizedLayer | None:
    """Return the empty layer in place of another one; `None` if that does not fit."""
    if isinstance(old, QuantizedLayer):
        fits = old.packed_shape == stored.shape
    else:
        fits = is_linear(old) and matrix_of(old).shape == stored.shape
    if not fits:
        return None
    weight, bias = old.weight, old.bias
    assert isinstance(weight, Tensor)
    n_out, n_in = stored.shape
    return empty_layer(old, stored.scheme, (n_out, n_in), weight.dtype, bias=bias is not None)


def empty_layer(
    old: nn.Module, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, *, bias: bool
) -> QuantizedLayer:
    """Return the layer that a linear layer becomes, on the meta device.

    Args:
        old: what it takes the place of.
        scheme: of the layer; its rank may be larger than a solver would give it.
        shape: (out, in).
        dtype: of the bias, and of `weight`.
        bias: whether there is one.
    """
    tensors = {
        name: torch.empty(stored, dtype=torch.uint8, device="meta")
        for name, stored in scheme.storage(shape).items()
    }
    packed = PackedWeight.from_tensors(tensors, scheme, shape)
    shift = torch.empty(shape[0], dtype=dtype, device="meta") if bias else None
    return quantized_class(old).from_packed(packed, shift, dtype=dtype)
