"""The quantizer that diffusers calls in `from_pretrained`."""

import os
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    DiffusersAutoQuantizer,
)
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from loraq.checkpoint.floats import dequantize_, forget_quantization
from loraq.checkpoint.manifest import FILE_NAME
from loraq.checkpoint.model import insert_empty_layers
from loraq.checkpoint.pretrained import attach_methods
from loraq.errors import CalibrationError, CheckpointError, LoraqError, RecipeError
from loraq.integrations.config import LoraqConfig, LoraqMethod
from loraq.integrations.hub import fetch_manifest
from loraq.layers import is_linear, matrix_of, replace_layer, take_dtype
from loraq.pipeline.layer import quantize_layer, require_usable
from loraq.pipeline.module import plan_model
from loraq.pipeline.plan import LayerJob
from loraq.pipeline.requirements import hash_used_stats
from loraq.recipe import Recipe
from loraq.safetensors.fp8 import require_unscaled
from loraq.safetensors.reader import ShardReader

#: The minors of diffusers that this was tested with. The two dictionaries it registers in are not a
#: stable interface.
SUPPORTED = ("0.42",)

#: Set to "0" to skip the hashes of the files in `from_pretrained`; sizes, names, shapes and dtypes
#: are always checked.
VERIFY_VARIABLE = "LORAQ_VERIFY"


class LoraqQuantizer(DiffusersQuantizer):
    """Loads a quantized folder into packed layers, or quantizes float weights as they are read."""

    # As without a quantizer: what a class keeps in fp32 stays in fp32.
    use_keep_in_fp32_modules = True
    is_serializable = True
    #: Adapters can be trained; packed weights have no gradient.
    is_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: LoraqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if quantization_config.recipe is None:
            raise LoraqError(
                "This LoraqConfig has no recipe: it belongs to a folder that does not say how it "
                "was made. Use `LoraqConfig(recipe)`."
            )
        self.recipe = quantization_config.recipe
        self._jobs: dict[str, LayerJob] = {}
        self._tied: dict[str, str] = {}
        self._folder: Path | None = None
        self._is_float = False
        self._files: list[str] = []

    @property
    def supports_parallel_loading(self) -> bool:
        """Whether shards may be read by several threads: not while layers are solved."""
        return bool(self.pre_quantized)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise `LoraqError` for what would fail only after long work."""
        require_supported(diffusers.__version__)
        if (
            not self.pre_quantized
            and isinstance(device_map, dict)
            and "disk" in device_map.values()
        ):
            raise LoraqError(
                "Layers that go to the disk cannot be quantized while loading. Run `loraq "
                "quantize` once and load that."
            )
        if not self.pre_quantized and self.recipe.allocation != "uniform":
            raise LoraqError(
                f"Allocation '{self.recipe.allocation}' looks at all weights before it quantizes "
                "the first, and loading shows one at a time. Run `loraq quantize` once and load "
                "that, or use allocation 'uniform'."
            )

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """Remember where the files are, which diffusers tells here only; the keys stay.

        A float model that was built from the configuration of a quantized one (`from_config`, a
        ControlNet) saves that configuration with its own weights: it is loaded as what it is.
        """
        self._folder = Path(checkpoint_files[0]).parent
        self._files = [Path(file).name for file in checkpoint_files]
        has_packed = any(key.endswith(".weight_packed") for key in loaded_keys)
        self._is_float = bool(self.pre_quantized) and not has_packed
        passed = getattr(self.quantization_config, "ignored_config", None)
        if self._is_float and isinstance(passed, LoraqConfig) and passed.recipe is not None:
            self.recipe, self.pre_quantized, self._is_float = passed.recipe, False, False
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._folder is None:  # `from_single_file` does not say where the weights are
            raise LoraqError(
                f"{type(model).__name__} is loaded by another way than `from_pretrained`, which "
                "does not quantize. Load it in floats, save it with `save_pretrained`, and start "
                "from that folder."
            )
        if self.pre_quantized:
            fetch_manifest(self._folder)
            if self._is_float and not (self._folder / FILE_NAME).is_file():
                return
            self._is_float = False
            verify = os.environ.get(VERIFY_VARIABLE) != "0"
            manifest, reader = insert_empty_layers(model, self._folder, verify=verify)
            self._tied = {
                name: source for name, source in manifest.tied.items() if name not in reader.names
            }
            self._tell_recipe(manifest.recipe)
            return
        if all(file.endswith(".safetensors") for file in self._files):
            require_unscaled(ShardReader(self._folder, files=self._files))
        plan = plan_model(model, self.recipe)
        try:
            hash_used_stats(None, plan, self.recipe)
        except CalibrationError as error:
            raise CalibrationError(
                f"Method '{self.recipe.method}' needs activation statistics, which loading does "
                "not take. Run `loraq quantize --stats` once and load that."
            ) from error
        self._jobs = {job.weight_name: job for job in plan.quantized}
        if not self._jobs:
            raise LoraqError(
                f"Nothing to quantize: every linear layer of {type(model).__name__} is skipped. "
                "`loraq plan` shows why."
            )

    def _tell_recipe(self, stored: dict[str, Any] | None) -> None:
        """Put the stored recipe into the model's configuration; warn if another was passed."""
        config = self.quantization_config
        assert isinstance(config, LoraqConfig)
        try:
            config.recipe = Recipe.from_dict(stored) if stored else None
        except LoraqError:  # of another version; the layers say by themselves what they are
            config.recipe = None
        passed, config.ignored_config = config.ignored_config, None
        if passed is not None and passed.to_dict() != config.to_dict():
            warnings.warn(
                f"'{self._folder}' is quantized already and loads as it is stored: "
                f"{_describe_difference(config, passed)}. The `quantization_config` that was "
                f"passed is not used: {_describe_difference(passed, config)}. To quantize with it, "
                "start from the float weights.",
                stacklevel=2,
            )

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
        return param_name in self._jobs

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
        job = self._jobs.pop(param_name)
        weight = nn.Parameter(param_value.to(target_device), requires_grad=False)
        require_usable(job, weight)
        if job.is_stack:
            module = quantize_layer(job, weight).build_module(weight, self.recipe)
        else:
            layer = model.get_submodule(job.name)
            assert is_linear(layer)
            layer.weight = weight
            module = quantize_layer(job, matrix_of(layer)).build_module(layer, self.recipe)
        replace_layer(model, job.name, module)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._is_float:
            model.is_quantized = False  # type: ignore[assignment]
            del model.quantization_method
            forget_quantization(model)
            return
        if self._jobs:
            names = ", ".join(job.name for job in self._jobs.values())
            raise CheckpointError(f"'{self._folder}' has no weights for these layers: {names}.")
        for name, source in self._tied.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(source))
        take_dtype(model)
        attach_methods(model)

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


def require_supported(version: str) -> None:
    """Raise `LoraqError` unless this was tested with diffusers of that version."""
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise LoraqError(
            f"diffusers {version} is installed; loraq.diffusers knows {', '.join(SUPPORTED)}. "
            "Install one of these, or use `loraq quantize` and `loraq.load`, which do not depend "
            "on its loader."
        )


#: How diffusers itself joins what a folder says and what `from_pretrained` is given.
_MERGE = DiffusersAutoQuantizer.merge_quantization_configs
#: How diffusers itself reads weights into a model.
_LOAD = ModelMixin._load_pretrained_model.__func__  # type: ignore[attr-defined]


def _merge_configs(stored: Any, passed: Any) -> Any:
    """Do as diffusers does; for our folders, keep what was passed for a warning that names both."""
    if isinstance(stored, dict) and stored.get("quant_method") == LoraqMethod.LORAQ.value:
        config = LoraqConfig.from_dict(stored)
        config.ignored_config = passed
        return config
    if isinstance(stored, LoraqConfig):
        return stored
    try:
        if not isinstance(stored, dict | QuantizationConfigMixin):
            raise TypeError(f"it is a {type(stored).__name__}")
        return _MERGE(stored, passed)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RecipeError(
            f"The configuration's `quantization_config` is {stored!r}, which diffusers cannot use: "
            f"{error}. Download the folder again; a folder that loraq wrote has "
            "{'quant_method': 'loraq'} there."
        ) from error


def _load_weights(cls: Any, model: Any, state_dict: Any, files: Any, *args: Any, **kw: Any) -> Any:
    """Do as diffusers does, except that packed weights are never left out.

    A folder whose configuration does not say that it is quantized is for diffusers a float one, of
    which it reports missing and unexpected names in its log, and fills the layers with anything.
    """
    names = args[1] if len(args) > 1 else kw["loaded_keys"]
    quantizer = kw.get("hf_quantizer")
    ours = isinstance(quantizer, LoraqQuantizer) and quantizer.pre_quantized
    if not ours and any(str(name).endswith(".weight_packed") for name in names):
        where = Path(files[0]).parent if files else "The state dict"
        raise CheckpointError(
            f"'{where}' holds weights that loraq packed, and its 'config.json' does not say so: "
            "`quantization_config` must be {'quant_method': 'loraq'}. Copy the folder again."
        )
    return _LOAD(cls, model, state_dict, files, *args, **kw)


def _describe_difference(config: Any, other: Any) -> str:
    """Say how a configuration differs from another; either may be another quantizer's."""
    recipe, theirs = getattr(config, "recipe", None), getattr(other, "recipe", None)
    if not isinstance(recipe, Recipe):
        return type(config).__name__
    names = [field.name for field in fields(recipe)]
    differing = [name for name in names if getattr(recipe, name) != getattr(theirs, name, None)]
    settings = ", ".join(f"{name}={getattr(recipe, name)!r}" for name in differing)
    return f"{type(config).__name__} with {settings}"


def register() -> None:
    """Make `quant_method: "loraq"` known to diffusers."""
    require_supported(diffusers.__version__)
    merge = "merge_quantization_configs"
    setattr(DiffusersAutoQuantizer, merge, staticmethod(_merge_configs))
    setattr(ModelMixin, "_load_pretrained_model", classmethod(_load_weights))  # noqa: B010 (a method, says mypy)
    AUTO_QUANTIZER_MAPPING[LoraqMethod.LORAQ.value] = LoraqQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[LoraqMethod.LORAQ.value] = LoraqConfig
