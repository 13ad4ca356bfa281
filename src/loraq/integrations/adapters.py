"""Adapters of PEFT on quantized layers: PEFT is told what to wrap them in, and what to train.

Imported only where PEFT is installed.
"""

import copy
from typing import Any, NoReturn

import peft
import torch
from peft.tuners.lora import Conv2d, Linear, LoraLayer, LoraModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from loraq.checkpoint.floats import dequantize_
from loraq.errors import LayerError
from loraq.layers import quantized_layers
from loraq.nn import QuantizedConv1x1, QuantizedLayer, QuantizedLinear


class _Adapted(LoraLayer):
    """A quantized layer with adapters: `y = base(x) + Σ scaling · B A x`, the adapters in floats.

    PEFT's own layers do that already. What differs is all that would change the dense weight.
    """

    #: The layer that it is made for; a subclass may compute something else with the same weights.
    _kind: type[QuantizedLayer]

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        if type(base_layer) is not self._kind:
            raise LayerError(
                f"Adapters work on quantized linear layers, not on {type(base_layer).__name__}. "
                "Use `loraq.absorb_lora`, which makes the LoRA a part of the weights."
            )
        if "config" not in kwargs:
            raise LayerError(
                f"PEFT {peft.__version__} is too old for adapters on quantized layers. Install "
                "0.21 or newer."
            )
        if kwargs["config"].use_dora:
            raise LayerError(
                "DoRA adapters scale the dense weight, which a quantized layer does not keep. Use "
                "LoRA."
            )
        super().__init__(base_layer, adapter_name, **kwargs)  # type: ignore[arg-type]

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse, because a merged weight would have to be quantized again."""
        raise LayerError(
            "An adapter cannot be merged (fused) into a quantized layer in place. "
            "`loraq.absorb_lora` quantizes the sum anew, from the float weights."
        )

    def _get_base_layer_device_and_dtype(
        self, base_layer: Any
    ) -> tuple[torch.device, torch.dtype | None]:
        layer: Any = super().get_base_layer()
        return layer.weight.device, layer.weight.dtype


class AdaptedLinear(_Adapted, Linear):
    """A `QuantizedLinear` with adapters."""

    _kind = QuantizedLinear


class AdaptedConv1x1(_Adapted, Conv2d):
    """A `QuantizedConv1x1` with adapters, which are convolutions in floats."""

    _kind = QuantizedConv1x1
    _makes_adapters = False

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter."""
        self._makes_adapters = True
        try:
            super().update_layer(*args, **kwargs)
        finally:
            self._makes_adapters = False

    def get_base_layer(self) -> nn.Module:
        """Return the quantized layer; while adapters are made, a float one of the same sizes.

        PEFT makes them of the class that it finds here.
        """
        layer = super().get_base_layer()
        if not self._makes_adapters:
            return layer
        assert isinstance(layer, QuantizedConv1x1)
        has_bias = layer.bias is not None
        return nn.Conv2d(layer.in_channels, layer.out_channels, 1, bias=has_bias, device="meta")


def register_adapters() -> None:
    """Let PEFT put its LoRA on quantized layers, and train others as floats.

    PEFT has a mapping from layer types to LoRA layers, but on each `LoraConfig`, and diffusers
    makes those out of reach. So the one function that reads the mapping is wrapped; calling this
    again changes nothing.
    """
    create = LoraModel._create_new_module
    if getattr(create, "knows_loraq", False):
        return

    def create_new_module(
        lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        lora_config._register_custom_module(
            {QuantizedLinear: AdaptedLinear, QuantizedConv1x1: AdaptedConv1x1}
        )
        new: nn.Module = create(lora_config, adapter_name, target, **kwargs)
        return new

    create_new_module.knows_loraq = True  # type: ignore[attr-defined]
    setattr(LoraModel, "_create_new_module", staticmethod(create_new_module))  # noqa: B010 (a method, says mypy)

    update = ModulesToSaveWrapper.update

    def update_floats(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Train a float copy of a quantized module; PEFT copies the module as it is."""
        original = self.original_module
        if adapter_name not in self.modules_to_save and quantized_layers(original):
            self.modules_to_save[adapter_name] = _float_copy(original)
        return update(self, adapter_name, *args, **kwargs)

    ModulesToSaveWrapper.update = update_floats  # type: ignore[method-assign]


def _float_copy(module: nn.Module) -> nn.Module:
    holder = nn.ModuleList([copy.deepcopy(module)])
    dequantize_(holder)
    return holder[0]
