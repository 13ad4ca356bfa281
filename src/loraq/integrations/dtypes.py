"""Which dtype what stays float of a loaded model has, as the library of the model has it."""

from collections import Counter
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import nn

from loraq.errors import LoraqError
from loraq.layer_input import INPUT_DTYPES
from loraq.layers import quantized_layers, take_dtype


def require_float_dtype(dtype: torch.dtype | None) -> None:
    """Raise `LoraqError` for a dtype that what stays float cannot have; `None` is no wish."""
    if dtype not in (None, *INPUT_DTYPES):
        raise LoraqError(
            f"dtype is {dtype}. What stays float can be of "
            f"{', '.join(str(each) for each in INPUT_DTYPES)}."
        )


def cast_saved(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what stays float, except what the class keeps in fp32, as `from_pretrained` does."""
    is_kept = kept_in_fp32(model, dtype)
    for module_name, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for leaf, tensor in table.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                if table is module._buffers and not _is_cast_with_weights(module, leaf, model):
                    continue
                name = f"{module_name}.{leaf}" if module_name else leaf
                tensor.data = tensor.data.to(torch.float32 if is_kept(name) else dtype)


def unify_dtypes(model: nn.Module) -> None:
    """Let a model whose file mixes float dtypes have the widest of them, so that it runs.

    Nothing is lost by that. What its class keeps in fp32 beside 16-bit weights stays as stored.
    """
    floats = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.is_floating_point()
    }
    is_kept = kept_in_fp32(model, _most(floats.values()))
    tensors = [tensor for name, tensor in floats.items() if not is_kept(name)]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        widest = reduce(torch.promote_types, sorted(dtypes, key=str))
        for tensor in tensors:
            tensor.data = tensor.data.to(widest)


def take_kept_dtypes(model: nn.Module) -> None:
    """Give the weights of quantized layers the dtype that the layers of a float model have.

    T5 asks one of its layers for it, and casts what goes in.
    """
    take_dtype(model)
    floats = [p for p in model.parameters() if p.is_floating_point()]
    is_kept = kept_in_fp32(model, _most(floats))
    for name, layer in quantized_layers(model).items():
        if is_kept(f"{name}.weight"):
            layer.weight_dtype = torch.float32


def cast_unsaved(model: nn.Module) -> None:
    """Give buffers that no file holds the dtype of the weights, as diffusers does.

    Such buffers are position tables, for example.

    Without this the output after a round trip would not be that of the model that was saved.
    """
    if is_of_transformers(model):  # which builds them in the dtype that they have
        return
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    if len(dtypes) != 1:
        return
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(*dtypes)


def is_of_transformers(model: nn.Module) -> bool:
    """Return whether a model is one of the transformers library, which need not be imported."""
    return any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)


def kept_in_fp32(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Return whether a model's class keeps a tensor in fp32, by name, if the rest has a dtype."""
    if is_of_transformers(model):
        from transformers.core_model_loading import build_glob_alternation

        plan = model._get_dtype_plan(dtype)
        kept = [pattern for pattern, wanted in plan.items() if wanted == torch.float32]
        search = build_glob_alternation(kept)[0].search if kept else lambda name: None
        return lambda name: search(name) is not None
    named = getattr(model, "_keep_in_fp32_modules", None) or ()
    parts = {named} if isinstance(named, str) else set(named)
    return lambda name: not parts.isdisjoint(name.split("."))


def _is_cast_with_weights(module: nn.Module, leaf: str, model: nn.Module) -> bool:
    """Return whether `from_pretrained` of the model's library casts a buffer."""
    return leaf not in module._non_persistent_buffers_set or not is_of_transformers(model)


def _most(tensors: Any) -> torch.dtype:
    """Return the dtype that holds most numbers; fp32 for none."""
    numbers = Counter[torch.dtype]()
    for tensor in tensors:
        numbers[tensor.dtype] += tensor.numel()
    return numbers.most_common(1)[0][0] if numbers else torch.float32
