"""Folders of the transformers library: which of their matrices belong to linear layers."""

from pathlib import Path
from typing import Any

from loraq.errors import CheckpointError, LoraqError, MissingLibraryError
from loraq.integrations.construction import (
    MOST_PARAMETERS,
    bounded_construction,
    require_plausible,
)
from loraq.layers import linear_layers


def linear_names(config: dict[str, Any], config_file: Path) -> frozenset[str] | None:
    """Return the names of the linear layers of the model that a `config.json` describes.

    Returns:
        The names, or `None` if the configuration is none of transformers.

    Raises:
        CheckpointError: it names a class that is not there, or the class refuses it.
        MissingLibraryError: transformers is not installed.
    """
    names = config.get("architectures")
    if not names or "model_type" not in config:
        return None
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingLibraryError(
            f"'{config_file}' is of transformers, which cannot be imported ({error}). Run: pip "
            "install transformers"
        ) from error
    kind = getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"'{config_file}' names the class {names[0]!r}, which transformers "
            f"{transformers.__version__} does not have. Check the file, or install the version "
            "that wrote it."
        )
    try:
        require_plausible(config)
        settings = {key: value for key, value in config.items() if key != "model_type"}
        with bounded_construction(MOST_PARAMETERS), torch.device("meta"):
            built = transformers.AutoConfig.for_model(str(config["model_type"]), **settings)
            return frozenset(linear_layers(kind(built)))
    except Exception as error:  # constructors raise what they like
        reason = error if isinstance(error, LoraqError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{names[0]} refuses '{config_file}': {reason}. Check the file, or download it again."
        ) from error
