"""What the quantizers of both libraries do while a model is loaded.

A quantized folder goes into packed layers, which are put in before the library fills them; float
weights are packed one by one as the library reads them.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loraq.checkpoint.manifest import FILE_NAME
from loraq.checkpoint.model import insert_empty_layers
from loraq.checkpoint.pretrained import attach_methods, note_memory
from loraq.errors import CalibrationError, CheckpointError, LoraqError, RecipeError
from loraq.integrations.card import attach_card
from loraq.integrations.config import LoraqConfig, LoraqMethod
from loraq.integrations.dtypes import take_kept_dtypes
from loraq.integrations.hub import fetch_manifest
from loraq.kernels import DEFAULT_BACKEND
from loraq.layers import is_linear, matrix_of, replace_layer, set_backend
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.kept_numbers import warn_of_kept
from loraq.pipeline.layer import quantize_layer, require_usable
from loraq.pipeline.module import plan_model
from loraq.pipeline.requirements import hash_used_stats
from loraq.recipe import Recipe
from loraq.safetensors.fp8 import require_unscaled
from loraq.safetensors.reader import ShardReader

#: Set to "0" to skip the hashes of the files in `from_pretrained`; sizes, names, shapes and dtypes
#: are always checked.
VERIFY_VARIABLE = "LORAQ_VERIFY"


class PackedLoading:
    """A quantizer's own part, beside the base class of its library."""

    #: Of the library.
    quantization_config: Any
    #: Whether the folder is quantized; a library says what the configuration says.
    pre_quantized: bool

    def _begin(self) -> None:
        """Take the recipe from the configuration.

        Raises:
            LoraqError: it has none.
        """
        if self.quantization_config.recipe is None:
            raise LoraqError(
                "This LoraqConfig has no recipe: it belongs to a folder that does not say how it "
                "was made. Use `LoraqConfig(recipe)`."
            )
        self.recipe: Recipe = self.quantization_config.recipe
        passed = getattr(self.quantization_config, "ignored_config", None)
        #: Says all but the recipe, which is that of the folder if it is quantized.
        self._config: LoraqConfig = (
            passed if isinstance(passed, LoraqConfig) else self.quantization_config
        )
        self._jobs: dict[str, LayerJob] = {}
        #: Names of a quantized folder that share the tensor of another name, which is stored.
        self._tied: dict[str, str] = {}
        self._folder: Path | None = None
        self._is_float = False
        self._files: list[str] = []

    def _choose_dtype(self, dtype: Any) -> Any:
        """Return the dtype of what stays float: the configuration's, or the library's."""
        return dtype if self._config.dtype is None else self._config.dtype

    def _require_loadable(self, device_map: Any) -> None:
        """Raise `LoraqError` for what would fail only after long work."""
        if self.pre_quantized:
            return
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise LoraqError(
                "Layers that go to the disk cannot be quantized while loading. Run `loraq "
                "quantize` once and load that."
            )
        if self.recipe.allocation != "uniform":
            raise LoraqError(
                f"Allocation '{self.recipe.allocation}' looks at all weights before it quantizes "
                "the first, and loading shows one at a time. Run `loraq quantize` once and load "
                "that, or use allocation 'uniform'."
            )

    def _locate(self, files: Sequence[str], names: Sequence[str]) -> None:
        """Remember where the files are.

        A float model that was built from the configuration of a quantized one (`from_config`, a
        ControlNet) saves that configuration with its own weights: it is loaded as what it is.
        """
        self._folder = Path(files[0]).parent
        self._files = [Path(file).name for file in files]
        has_packed = any(name.endswith(".weight_packed") for name in names)
        self._is_float = bool(self.pre_quantized) and not has_packed
        passed = self._config is not self.quantization_config
        if self._is_float and passed and self._config.recipe is not None:
            self.recipe, self.pre_quantized, self._is_float = self._config.recipe, False, False

    def _prepare(self, model: nn.Module, rename: Callable[[str], str | None] | None = None) -> None:
        """Put empty packed layers into a model, or plan which of its layers are to be packed.

        Args:
            model: what is loaded.
            rename: as for `insert_empty_layers`.

        Raises:
            LoraqError: the folder is damaged or does not fit, or the recipe does not.
        """
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
            manifest, reader = insert_empty_layers(
                model, self._folder, verify=verify, rename=rename
            )
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
        if passed is None or passed.to_dict() == config.to_dict():
            return
        is_ours = isinstance(passed, LoraqConfig)
        if is_ours and not passed.says_recipe:  # but how the layers run, which is used
            return
        warnings.warn(
            f"'{self._folder}' is quantized already and loads as it is stored: "
            f"{_describe_difference(config, passed)}. The {'recipe of the ' * is_ours}"
            "`quantization_config` that was passed is not used: "
            f"{_describe_difference(passed, config)}. To quantize with it, start from the float "
            "weights.",
            stacklevel=2,
        )

    def _is_waiting(self, name: str) -> bool:
        """Return whether a tensor is the weight of a layer that is to be packed now."""
        return name in self._jobs

    def _pack(self, model: nn.Module, name: str, weight: Tensor) -> None:
        """Solve the layer of a weight on its device, and put the packed one in its place.

        Raises:
            LayerError: the weight cannot be used, or the layer failed.
            CheckpointError: the weight has another shape than the model's.
        """
        job, wanted = self._jobs.pop(name), model.get_parameter(name).shape
        if weight.shape != wanted:
            raise CheckpointError(
                f"'{self._folder}': tensor '{name}' has shape {tuple(weight.shape)}, the model "
                f"wants {tuple(wanted)}."
            )
        weight = nn.Parameter(weight, requires_grad=False)
        require_usable(job, weight)
        if job.is_stack:
            finished = quantize_layer(job, weight, device=self._config.device)
            module = finished.build_module(weight, self.recipe)
        else:
            layer = model.get_submodule(job.name)
            assert is_linear(layer)
            layer.weight = weight
            finished = quantize_layer(job, matrix_of(layer), device=self._config.device)
            module = finished.build_module(layer, self.recipe)
        replace_layer(model, job.name, module)

    def _finish(self, model: nn.Module) -> None:
        """Settle what the library leaves open, once all weights are read.

        Raises:
            CheckpointError: a layer that was to be packed had no weight.
        """
        for name in list(self._jobs):  # those that a library made of others
            weight = model.get_parameter(name)
            if not weight.is_meta and _is_loaded(weight):
                self._pack(model, name, weight.detach())
        if self._jobs:
            names = ", ".join(job.name for job in self._jobs.values())
            raise CheckpointError(f"'{self._folder}' has no weights for these layers: {names}.")
        for name, source in self._tied.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(source))
        if not self.pre_quantized:
            warn_of_kept(model)
        take_kept_dtypes(model)
        attach_methods(model)
        attach_card(model)
        if self._config.backend != DEFAULT_BACKEND:
            set_backend(model, self._config.backend)
        note_memory(model)


def _is_loaded(weight: Tensor) -> bool:
    """Return whether transformers has read a weight, and not drawn it at random."""
    return bool(getattr(weight, "_is_hf_initialized", False))


def merge_configs(stored: Any, passed: Any, merge: Any, library: str) -> Any:
    """Join what a folder says and what `from_pretrained` is given.

    Of our folders, what was passed is kept for a warning that names both.

    Args:
        stored: what the folder says.
        passed: what was passed.
        merge: how the library does it.
        library: its name, for messages.

    Raises:
        RecipeError: the folder says something that the library cannot use.
    """
    if isinstance(stored, dict) and stored.get("quant_method") == LoraqMethod.LORAQ.value:
        config = LoraqConfig.from_dict(stored)
        is_ours = isinstance(passed, dict) and passed.get("quant_method") == stored["quant_method"]
        config.ignored_config = LoraqConfig.from_dict(passed) if is_ours else passed
        return config
    if isinstance(stored, LoraqConfig):
        return stored
    try:
        if not isinstance(stored, dict) and not hasattr(stored, "quant_method"):
            raise TypeError(f"it is a {type(stored).__name__}")
        return merge(stored, passed)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RecipeError(
            f"The configuration's `quantization_config` is {stored!r}, which {library} cannot use: "
            f"{error}. Download the folder again; a folder that loraq wrote has "
            "{'quant_method': 'loraq'} there."
        ) from error


def require_said(names: Any, files: Sequence[str] | None) -> None:
    """Require that weights which a library takes for floats are floats.

    A folder whose configuration does not say that it is quantized is a float one for the library,
    which reports missing and unexpected names in its log, and fills the layers with anything.

    Raises:
        CheckpointError: a weight is packed.
    """
    if any(str(name).endswith(".weight_packed") for name in names):
        where = Path(files[0]).parent if files else "The state dict"
        raise CheckpointError(
            f"'{where}' holds weights that loraq packed, and its 'config.json' does not say so: "
            "`quantization_config` must be {'quant_method': 'loraq'}. Copy the folder again."
        )


def _describe_difference(config: Any, other: Any) -> str:
    """Say how a configuration differs from another; either may be another quantizer's."""
    recipe, theirs = getattr(config, "recipe", None), getattr(other, "recipe", None)
    if not isinstance(recipe, Recipe):
        return type(config).__name__
    names = [field.name for field in fields(recipe)]
    differing = [name for name in names if getattr(recipe, name) != getattr(theirs, name, None)]
    settings = ", ".join(f"{name}={getattr(recipe, name)!r}" for name in differing)
    return f"{type(config).__name__} with {settings}"


def require_supported(library: str, version: str, supported: Sequence[str]) -> None:
    """Raise `LoraqError` unless this was tested with a library of that version."""
    if ".".join(version.split(".")[:2]) not in supported:
        raise LoraqError(
            f"{library} {version} is installed; loraq.{library} knows {', '.join(supported)}. "
            "Install one of these, or use `loraq quantize` and `loraq.load`, which do not depend "
            "on its loader."
        )
