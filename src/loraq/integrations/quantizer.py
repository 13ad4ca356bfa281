"""The quantizer that diffusers calls in `from_pretrained`."""

from typing import Any

import diffusers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    DiffusersAutoQuantizer,
)
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from loraq.checkpoint.floats import dequantize_, forget_quantization
from loraq.errors import CheckpointError
from loraq.integrations.config import LoraqConfig, LoraqMethod
from loraq.integrations.loading import (
    PackedLoading,
    merge_configs,
    require_said,
    require_supported,
)

#: The minors of diffusers that this was tested with. The two dictionaries it registers in are not a
#: stable interface.
SUPPORTED = ("0.42",)


class LoraqQuantizer(PackedLoading, DiffusersQuantizer):
    """Loads a quantized folder into packed layers, or quantizes float weights as they are read."""

    # As without a quantizer: what a class keeps in fp32 stays in fp32.
    use_keep_in_fp32_modules = True
    is_serializable = True
    #: Adapters can be trained; packed weights have no gradient.
    is_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: LoraqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._begin()

    @property
    def supports_parallel_loading(self) -> bool:
        """Whether shards may be read by several threads: not while layers are solved."""
        return bool(self.pre_quantized)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise `LoraqError` for what would fail only after long work."""
        require_supported("diffusers", diffusers.__version__, SUPPORTED)
        self._require_loadable(device_map)

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """Return the dtype of what stays float."""
        return self._choose_dtype(torch_dtype)

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """Remember where the files are, which diffusers tells here only; the keys stay."""
        self._locate(checkpoint_files, loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self._prepare(model)

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """Leave out the names that share another one's tensor."""
        return [key for key in missing_keys if key not in self._tied]

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        """Return whether this float tensor is the weight of a layer that is to be quantized now."""
        return self._is_waiting(param_name)

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Solve one layer on its device, and put the packed one in its place."""
        self._pack(model, param_name, param_value.to(target_device))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._is_float:
            model.is_quantized = False  # type: ignore[assignment]
            del model.quantization_method
            forget_quantization(model)
            return
        self._finish(model)

    def dequantize(self, model: Any) -> Any:
        """Return the model, which is a float one then."""
        return dequantize_(model)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> Any:
        """Refuse to write packed weights without their manifest.

        Raises:
            CheckpointError: the model is quantized.
        """
        if self._is_float:
            return state_dict, {}
        raise CheckpointError(
            "A quantized model is saved by its own `save_pretrained`, or by `loraq.save`, which "
            "write 'loraq.json' too."
        )


#: How diffusers itself joins what a folder says and what `from_pretrained` is given.
_MERGE = DiffusersAutoQuantizer.merge_quantization_configs
#: How diffusers itself reads weights into a model.
_LOAD = ModelMixin._load_pretrained_model.__func__  # type: ignore[attr-defined]


def _merge_configs(stored: Any, passed: Any) -> Any:
    """Do as diffusers does, but for our folders."""
    return merge_configs(stored, passed, _MERGE, "diffusers")


def _load_weights(cls: Any, model: Any, state_dict: Any, files: Any, *args: Any, **kw: Any) -> Any:
    """Do as diffusers does, except that packed weights are never left out."""
    quantizer = kw.get("hf_quantizer")
    if not (isinstance(quantizer, LoraqQuantizer) and quantizer.pre_quantized):
        require_said(args[1] if len(args) > 1 else kw["loaded_keys"], files)
    return _LOAD(cls, model, state_dict, files, *args, **kw)


def register() -> None:
    """Make `quant_method: "loraq"` known to diffusers."""
    require_supported("diffusers", diffusers.__version__, SUPPORTED)
    merge = "merge_quantization_configs"
    setattr(DiffusersAutoQuantizer, merge, staticmethod(_merge_configs))
    setattr(ModelMixin, "_load_pretrained_model", classmethod(_load_weights))  # noqa: B010 (a method, says mypy)
    AUTO_QUANTIZER_MAPPING[LoraqMethod.LORAQ.value] = LoraqQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[LoraqMethod.LORAQ.value] = LoraqConfig
