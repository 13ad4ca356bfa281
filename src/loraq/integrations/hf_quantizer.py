"""The quantizer that transformers calls in `from_pretrained`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from loraq.checkpoint.floats import dequantize_, forget_quantization
from loraq.errors import CheckpointError
from loraq.integrations.config import LoraqConfig, LoraqMethod
from loraq.integrations.loading import (
    PackedLoading,
    merge_configs,
    require_said,
    require_supported,
)
from loraq.integrations.transformers import SUPPORTED, name_in, renamings_of
from loraq.safetensors.reader import ShardReader


class LoraqHfQuantizer(PackedLoading, HfQuantizer):
    """Loads a quantized folder into packed layers, or quantizes float weights as they are read."""

    #: Adapters can be trained; packed weights have no gradient.
    is_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: LoraqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._begin()
        #: Why a layer could not be packed: transformers would log the error and go on.
        self._failure: Exception | None = None
        #: Whether the folder is of the class that is loaded.
        self._is_whole = True

    def is_serializable(self) -> bool:
        """Return that a quantized model can be saved."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise `LoraqError` for what would fail only after long work."""
        require_supported("transformers", transformers.__version__, SUPPORTED)
        self._require_loadable(device_map)

    def update_dtype(self, dtype: Any) -> Any:
        """Return the dtype of what stays float."""
        return self._choose_dtype(dtype)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if checkpoint_files:
            self._locate(checkpoint_files, _list_names(checkpoint_files))
        with _untouched_defaults():
            # transformers builds the model without its ties, and ties it once it is loaded.
            for second, first in model.all_tied_weights_keys.items():
                owner, _, leaf = second.rpartition(".")
                setattr(model.get_submodule(owner), leaf, model.get_parameter(first))
            self._is_whole = type(model).__name__ in (model.config.architectures or [])
            self._prepare(model, None if self._is_whole else name_in(model))
        # So that names without a tensor of their own do not count as missing.
        model.all_tied_weights_keys.update(self._tied)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Leave the names of our folders as they are: they are those of the model in it."""
        if self.pre_quantized and not self._is_float:
            return [] if self._is_whole else renamings_of(model)
        return super().update_weight_conversions(weight_conversions, model)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a tensor is the weight of a layer that is to be packed now."""
        return self._is_waiting(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        """Return what packs the weight of a layer once it is read."""
        return _PackLayer(self)

    def pack_read(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        """Pack the weight of a layer, or keep the reason why not; after that, nothing is packed."""
        if self._failure is not None:
            return
        try:
            self._pack(model, name, weight)
        except Exception as error:
            self._failure = error

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._failure is not None:
            raise self._failure
        if self._is_float:
            self.remove_quantization_config(model)
            for part in model.modules():
                forget_quantization(part)
            return model
        self._finish(model)
        return model

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Return the model, which is a float one then, of a dtype if one is given."""
        dequantize_(model)
        return model if dtype is None else nn.Module.to(model, dtype)

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Refuse to write packed weights without their manifest.

        Raises:
            CheckpointError: always; a float model has no quantizer.
        """
        raise CheckpointError(
            "A quantized model is saved by its own `save_pretrained`, or by `loraq.save`, which "
            "write 'loraq.json' too."
        )


class _PackLayer(ConversionOps):
    """Packs the weight of a layer that transformers has read."""

    def __init__(self, quantizer: LoraqHfQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the tensors that are no weights of such layers."""
        left = {}
        for name, value in input_dict.items():
            if not self._quantizer._is_waiting(name):
                left[name] = value
                continue
            self._quantizer.pack_read(model, name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return left


@contextmanager
def _untouched_defaults() -> Iterator[None]:
    """Undo what transformers sets while it builds: the meta device for all that is made."""
    with torch.device("cpu"):
        yield


def _list_names(files: list[str]) -> list[str]:
    """Return the names of the tensors in files of safetensors; other files are not ours."""
    names: list[str] = []
    for file in files:
        try:
            names += ShardReader(Path(file)).names if file.endswith(".safetensors") else []
        except CheckpointError:  # transformers reads what it can; ours are checked anyway
            continue
    return names


#: How transformers itself joins what a folder says and what `from_pretrained` is given.
_MERGE = AutoHfQuantizer.merge_quantization_configs
#: How transformers itself reads weights into a model.
_LOAD = PreTrainedModel._load_pretrained_model


def _merge_configs(quantization_config: Any, quantization_config_from_args: Any = None) -> Any:
    """Do as transformers does, but for our folders."""
    passed = quantization_config_from_args
    return merge_configs(quantization_config, passed, _MERGE, "transformers")


def _load_weights(
    model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kw: Any
) -> Any:
    """Do as transformers does, except that packed weights are never left out."""
    quantizer = load_config.hf_quantizer
    if not (isinstance(quantizer, LoraqHfQuantizer) and quantizer.pre_quantized):
        names = state_dict if state_dict is not None else _list_names(checkpoint_files or [])
        require_said(names, checkpoint_files)
    return _LOAD(model, state_dict, checkpoint_files, load_config, *args, **kw)


def register() -> None:
    """Make `quant_method: "loraq"` known to transformers."""
    require_supported("transformers", transformers.__version__, SUPPORTED)
    method = LoraqMethod.LORAQ.value
    if method not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(method)(LoraqHfQuantizer)
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(method)(LoraqConfig)
    setattr(AutoHfQuantizer, "merge_quantization_configs", staticmethod(_merge_configs))  # noqa: B010
    setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(_load_weights))  # noqa: B010
