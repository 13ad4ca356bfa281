"""LoRA adapters of PEFT on quantized layers: PEFT is told what to wrap a `QuantizedLinear` in.

Imported only where PEFT is installed.
"""

from typing import Any, NoReturn

import peft
import torch
from peft.tuners.lora import Linear, LoraModel
from torch import nn

from loraq.errors import LayerError
from loraq.nn import QuantizedLinear


class AdaptedLinear(Linear):
    """A `QuantizedLinear` with adapters: `y = base(x) + Σ scaling · B A x`, the adapters in floats.

    PEFT's own layer does that already. What differs is all that wants the base layer's dense
    weight.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        if type(base_layer) is not QuantizedLinear:
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
        super().__init__(base_layer, adapter_name, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse, because a merged weight would have to be quantized again."""
        raise LayerError(
            "An adapter cannot be merged (fused) into a quantized layer in place. "
            "`loraq.absorb_lora` quantizes the sum anew, from the float weights."
        )

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(
        self, base_layer: Any
    ) -> tuple[torch.device, torch.dtype | None]:
        """Tell where the layer is, and the dtype of its only float, the bias.

        Without a bias, adapters keep the dtype of their file.
        """
        return (
            base_layer.weight_packed.device,
            None if base_layer.bias is None else base_layer.bias.dtype,
        )


def register_adapters() -> None:
    """Let PEFT put its LoRA on quantized layers.

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
        lora_config._register_custom_module({QuantizedLinear: AdaptedLinear})
        new: nn.Module = create(lora_config, adapter_name, target, **kwargs)
        return new

    create_new_module.knows_loraq = True  # type: ignore[attr-defined]
    setattr(LoraModel, "_create_new_module", staticmethod(create_new_module))  # noqa: B010 (a method, says mypy)
