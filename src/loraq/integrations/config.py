"""`LoraqConfig`: how a library is asked to quantize, and what a loaded model says of itself."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from loraq.devices import find_device
from loraq.errors import LoraqError, RecipeError
from loraq.integrations.dtypes import require_float_dtype
from loraq.kernels import DEFAULT_BACKEND, resolve_backend
from loraq.options import Rank, checked
from loraq.recipe import Recipe
from loraq.scheme import Scheme

# Each library asks whether a configuration is one of its own. Either may be missing.
try:
    from diffusers.quantizers.quantization_config import QuantizationConfigMixin as _OfDiffusers
except ImportError:

    class _OfDiffusers:  # type: ignore[no-redef]
        """diffusers is not installed."""


try:
    from transformers.utils.quantization_config import QuantizationConfigMixin as _OfTransformers
except ImportError:

    class _OfTransformers:  # type: ignore[no-redef]
        """transformers is not installed."""


class LoraqMethod(StrEnum):
    """What `config.json` calls us; diffusers wants an enumeration."""

    LORAQ = "loraq"


class LoraqConfig(_OfDiffusers, _OfTransformers):
    """Asks diffusers or transformers to quantize: `from_pretrained(…, quantization_config=…)`.

    A folder that is quantized already says by itself what it is, and needs none; its model has the
    stored recipe in `model.config.quantization_config`.
    """

    #: How layers are, or were, quantized; `None` for a folder that does not say.
    recipe: Recipe | None
    #: What `from_pretrained` was given for a folder that is quantized already; its recipe is not
    #: used.
    ignored_config: Any = None
    #: Whether the caller said anything of the recipe; without, a stored one is no surprise.
    says_recipe: bool
    #: How the layers run, where those are solved that are quantized while they are read, and the
    #: dtype of what stays float, in place of the library's.
    backend: str
    device: torch.device | None
    dtype: torch.dtype | None

    @checked
    def __init__(  # noqa: PLR0913 - what `quantize_` takes, too
        self,
        recipe: str | Path | Scheme | Recipe | dict[str, Any] | None = None,
        *,
        effort: str | None = None,
        budget: str | float | None = None,
        rank: Rank | None = None,
        keep: str | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        backend: str = DEFAULT_BACKEND,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        """Settle the recipe.

        Args:
            recipe: a recipe, a scheme, a name such as "mxfp4+w8a8", a path to a .toml or .json
                file, or plain data; `None` is "default", or what a quantized folder has.
            effort: as for `Recipe.adjusted`, like the other four.
            budget: storage of a layer.
            rank: of every branch.
            keep: how layers are stored that the model's class keeps: "int8" or "float".
            modules_to_not_convert: modules that stay as they are.
            backend: how the layers run, as for `loraq.load`; no part of the recipe, and not stored.
            device: where layers are solved that are quantized while they are read, as for
                `quantize_`, but no more than one; `None` solves each where it was read to.
            dtype: of what stays float, in place of the `dtype` of `from_pretrained`, as for
                `loraq.load`; not stored. `None` leaves it to the library.
            others: only `quant_method`, which the libraries hand back.

        Raises:
            DeviceError, KernelError: there is no such device or back end.
            LoraqError: an unknown argument, or a dtype of no floats.
            RecipeError: the recipe cannot be read.
        """
        resolve_backend(backend)  # an unknown one is refused here
        self.backend = backend
        self.device = None if device is None else find_device(device)
        require_float_dtype(dtype)
        self.dtype = dtype
        method = others.pop("quant_method", LoraqMethod.LORAQ)
        if others or method != LoraqMethod.LORAQ.value:
            raise LoraqError(
                f"LoraqConfig got {', '.join([*others, f'quant_method={method!r}'])}. It takes "
                "`recipe`, `effort`, `budget`, `rank`, `keep`, `modules_to_not_convert`, "
                "`backend`, `device` and `dtype`; everything else is a field of a `loraq.Recipe`."
            )
        self.quant_method: Any = LoraqMethod.LORAQ
        changes: dict[str, Any] = {
            "effort": effort,
            "budget": budget,
            "rank": rank,
            "keep": keep,
            "modules_to_not_convert": modules_to_not_convert,
        }
        self.says_recipe = any(each is not None for each in (recipe, *changes.values()))
        recipe = "default" if recipe is None else recipe
        given = Recipe.from_dict(recipe) if isinstance(recipe, dict) else Recipe.of(recipe)
        self.recipe = given.adjusted(**changes)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **others: Any
    ) -> Any:
        """Return the configuration that a `config.json` describes.

        Raises:
            LoraqError: an unknown key.
            RecipeError: the recipe cannot be read, or is a file, which only a caller may name.
        """
        recipe = config_dict.get("recipe")
        if recipe is None:  # of a folder that does not say how it was made
            return cls(**{key: value for key, value in config_dict.items() if key != "recipe"})
        is_name = isinstance(recipe, str) and not recipe.endswith((".toml", ".json"))
        if not is_name and not isinstance(recipe, dict):
            raise RecipeError(
                f"The configuration's recipe is {recipe!r}. A recipe's name or table is required."
            )
        return cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data from which `from_dict` makes an equal configuration."""
        return {
            "quant_method": self.quant_method.value,
            "recipe": self.recipe and self.recipe.to_dict(),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what `repr` shows: all of it."""
        return self.to_dict()
