"""State dicts of models with quantized layers: they hold packed bytes, and answer for weights."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import nn

from loraq.dense import DenseWeight
from loraq.errors import LayerError


class PackedStateDict(OrderedDict[str, Any]):
    """What a model stores, by name; asked for the `weight` of a quantized layer, it has that too.

    Whoever goes through it, counts it or saves it meets the stored tensors only, and a pickled or
    copied one is an ordinary dict.
    """

    _metadata: Any
    #: Whose state it is.
    _model: nn.Module

    def __missing__(self, name: str) -> DenseWeight:
        owner, _, leaf = name.rpartition(".")
        # A stack of experts stands under the name of the parameter that it was.
        for place, part in ((owner, leaf), (name, "")):
            try:
                module = self._model.get_submodule(place)
            except AttributeError:
                continue
            # What an adapter puts around a layer shows the layer's weight, too.
            if getattr(module, "weight_leaf", "weight") == part:
                weight = getattr(module, "weight", None)
                if isinstance(weight, DenseWeight):
                    return weight
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return what the name stands for, or the default."""
        try:
            return self[name]
        except KeyError:
            return default

    def copy(self) -> OrderedDict[str, Any]:  # type: ignore[override]
        """Return an ordinary dict of the stored tensors."""
        plain = OrderedDict(self)
        plain._metadata = self._metadata  # type: ignore[attr-defined]
        return plain

    def __reduce__(self) -> Any:
        return OrderedDict, (), {"_metadata": self._metadata}, None, iter(self.items())


class PackedMetadata(OrderedDict[str, Any]):
    """What a state dict says beside the tensors of a quantized layer.

    A float layer that is given such a state with `strict=False` would find no weight and keep its
    own, random one. All that it reads of the state beside names is this, so it is told here.
    """

    #: Of the layer.
    name: str
    #: Whether the module that asks next is one whose stacks of experts are quantized too.
    is_expected = False

    def get(self, key: str, default: Any = None) -> Any:
        """Refuse what the loading of a float layer asks.

        Raises:
            LayerError: a float layer asks how to load the bytes of this one.
        """
        if self.is_expected:
            self.is_expected = False
        elif key == "assign_to_params_buffers":
            raise LayerError(
                f"The state dict holds layer '{self.name}' in quantized form, and the module that "
                "loads it has no quantized layer there, so it would keep its own weights. "
                "Dequantize a copy of the quantized model first (`loraq.dequantize_`) and take "
                "the state from that."
            )
        return super().get(key, default)

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())


def mark_packed(state: Any, name: str, weight_leaf: str) -> None:
    """Note in a state dict under construction that a layer of it is quantized.

    Args:
        state: the state dict.
        name: of the layer.
        weight_leaf: what follows it in the name of the float weight; with nothing, as for a stack
            of experts, the module above reads that weight from a float state.
    """
    metadata, reader = getattr(state, "_metadata", None), name
    if not weight_leaf:
        reader = name.rpartition(".")[0]
    if metadata is not None:
        metadata[reader] = PackedMetadata(metadata.get(reader, {}))
        metadata[reader].name = name


def answer_for_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Let the state dicts of a model answer for the weights of its quantized layers.

    Args:
        model: a module; it and its submodules down to the layers are told.
        names: of the quantized layers below it.
    """
    parents = {""}
    for name in names:
        parts = name.split(".")
        parents |= {".".join(parts[:depth]) for depth in range(len(parts))}
    for parent in map(model.get_submodule, sorted(parents)):
        if _answer not in parent._state_dict_hooks.values():
            parent._register_state_dict_hook(_answer)
            parent._register_load_state_dict_pre_hook(_expect, with_module=True)


def _expect(module: nn.Module, state: Any, prefix: str, metadata: Any, *_: Any) -> None:
    """Let a module read a state of quantized stacks if its own are quantized."""
    if isinstance(metadata, PackedMetadata):
        metadata.is_expected = any(
            getattr(child, "weight_leaf", None) == "" for child in module.children()
        )


def _answer(model: nn.Module, state: Any, prefix: str, metadata: Any) -> Any:
    if prefix:  # a part of a larger state, which answers itself
        return state
    answering = PackedStateDict(state)
    answering._metadata, answering._model = getattr(state, "_metadata", None), model
    return answering
