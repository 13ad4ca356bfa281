"""Where a model in memory came from, which saving it must not destroy."""

from pathlib import Path

from torch import nn

from loraq.checkpoint.apart import require_apart
from loraq.checkpoint.manifest import FILE_NAME
from loraq.errors import CheckpointError


def origin_of(model: nn.Module) -> Path | None:
    """Return where diffusers or loraq loaded a model from, if its configuration says so."""
    origin = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(origin) if isinstance(origin, str) and origin else None


def require_origin_kept(model: nn.Module, folder: Path) -> None:
    """Require that saving a model to a folder does not destroy what it was made from.

    A quantized folder may be saved over: all of it is in memory. The float weights are not.

    Raises:
        CheckpointError: the folder holds the float weights, or holds the folder that the model came
            from.
    """
    require_apart(folder, in_memory=_part_of_origin(model))
    origin = origin_of(model)
    is_origin = origin and origin.is_dir() and folder.is_dir() and origin.samefile(folder)
    if is_origin and not (folder / FILE_NAME).is_file():
        raise CheckpointError(
            f"'{folder}' holds the float weights that this model was quantized from. Choose "
            "another folder."
        )


def _part_of_origin(model: nn.Module) -> Path | None:
    """Return where a model came from; of a pipeline, what must outlive its transformer.

    The configuration does not say which of a pipeline's folders it was.
    """
    origin = origin_of(model)
    index = origin / "model_index.json" if origin else None
    return index if index and index.is_file() else origin
