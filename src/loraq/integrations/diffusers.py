"""Folders of the diffusers library: a transformer's, or a pipeline's with a transformer in it."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraq.checkpoint import save
from loraq.checkpoint.components import copy_components
from loraq.checkpoint.fit import require_fit
from loraq.checkpoint.manifest import FILE_NAME
from loraq.checkpoint.model import load_onto, write_model
from loraq.checkpoint.model_index import INDEX, choose_model, is_pipeline
from loraq.checkpoint.partial import atomic_folder
from loraq.checkpoint.pretrained import attach_methods, note_memory
from loraq.devices import find_device_to_run
from loraq.errors import CheckpointError, LoraqError
from loraq.integrations.card import attach_card
from loraq.integrations.construction import (
    bound_parameters,
    bounded_construction,
    require_plausible,
)
from loraq.integrations.dtypes import (
    cast_saved,
    cast_unsaved,
    require_float_dtype,
    take_kept_dtypes,
    unify_dtypes,
)
from loraq.integrations.hub import local_path
from loraq.integrations.marking import mark_quantized, note_origin
from loraq.integrations.transformers import is_config_of_transformers, transformers_model
from loraq.json_files import read_json
from loraq.kernels import DEFAULT_BACKEND
from loraq.options import checked
from loraq.safetensors.reader import ShardReader


def model_folder(source: Path, component: str | None = None, *, quantized: bool = False) -> Path:
    """Return the folder of a model: `source` itself, or that of a pipeline's component.

    Args:
        source: folder of a model or of a pipeline.
        component: name of the component; `None` takes the only denoiser.
        quantized: whether a quantized one is meant: then it may be another if no denoiser is.

    Raises:
        CheckpointError: `source` is neither, or it is not clear which component is meant.
    """
    if not source.is_dir():
        raise CheckpointError(
            f"'{source}' is not a folder. Give a transformer's folder (config.json) or a "
            "pipeline's."
        )
    if is_pipeline(source):
        return choose_model(source, component, quantized=quantized).folder
    if component is not None:
        raise CheckpointError(
            f"'{source}' is no pipeline (it has no '{INDEX}'), and has no component "
            f"'{component}'. Leave that out, or give the pipeline's folder."
        )
    if not (source / "config.json").is_file() and not any(source.glob("*.safetensors")):
        raise CheckpointError(
            f"'{source}' has neither 'config.json' nor '{INDEX}' nor weights: it is no model's "
            "folder."
        )
    return source


def empty_model(folder: Path) -> nn.Module:
    """Return the model that a transformer folder's `config.json` describes.

    Its parameters are on the meta device.

    Raises:
        CheckpointError: the configuration names no known class, or the class refuses it.
        LoraqError: diffusers is not installed.
    """
    return model_of(read_json(folder / "config.json"), folder / "config.json")


def model_of(config: dict[str, Any], config_file: Path, weights: Path | None = None) -> nn.Module:
    """Return the model of a configuration, with parameters on the meta device.

    What a constructor makes is bounded by what the weights have.

    Args:
        config: what was read.
        config_file: where from, for messages.
        weights: file or folder of the weights; by default the folder of the configuration.

    Raises:
        CheckpointError: the configuration names no known class, the class refuses it, or it asks
            for more than a model is.
        LoraqError: diffusers is not installed.
    """
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    weights = config_file.parent if weights is None else weights
    if is_config_of_transformers(config):
        return transformers_model(config, config_file, weights)
    with _quiet_diffusers() as diffusers:
        from accelerate import init_empty_weights

        name = config.get("_class_name")
        kind = find_class(diffusers, name)
        if not isinstance(kind, type) or not issubclass(kind, nn.Module):
            raise CheckpointError(
                f"'{config_file}' names the class {name!r}, which diffusers "
                f"{diffusers.__version__} does not have. Check the file, or install the diffusers "
                "version that wrote it."
            )
        try:
            require_plausible(config)
            most = bound_parameters(weights)
            with (
                torch.device("cpu"),  # whatever the process has set
                bounded_construction(most),
                init_empty_weights(include_buffers=False),
            ):
                return kind.from_config(config)  # type: ignore[attr-defined]
        except Exception as error:  # constructors of diffusers raise what they like
            reason = error if isinstance(error, LoraqError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"{name} refuses '{config_file}': {reason}. Check the file, or download it again."
            ) from error


def find_class(diffusers: Any, name: object) -> Any:
    """Return what diffusers has under a name that a file gives, or `None`."""
    try:
        return getattr(diffusers, name) if isinstance(name, str) else None
    except Exception:  # names are imported when they are asked for, and that may fail in any way
        return None


def transformer_classes() -> dict[str, type[nn.Module]]:
    """Return every transformer class that the installed diffusers exports, by its name.

    Raises:
        LoraqError: diffusers is not installed.
    """
    with _quiet_diffusers() as diffusers:
        from diffusers.models import transformers

        found = {name: getattr(transformers, name) for name in sorted(dir(transformers))}
        return {
            name: kind
            for name, kind in found.items()
            if isinstance(kind, type)
            and issubclass(kind, diffusers.ModelMixin)
            and hasattr(diffusers, name)
        }


def save_beside(
    model: nn.Module, component: str, others: Mapping[str, Path], target: Path, *, overwrite: bool
) -> None:
    """Save a model as a component of a pipeline, with copies of the others.

    Args:
        model: with quantized layers.
        component: name of its folder; "" for a model that is in no pipeline.
        others: what `find_files` returned of the pipeline.
        target: the folder to make.
        overwrite: whether one that is not empty may be replaced.

    Raises:
        CheckpointError: a file cannot be read, or the target cannot be written.
    """
    if not component:
        save(model, target, overwrite=overwrite)
        return
    with atomic_folder(target, overwrite=overwrite) as partial:
        components = copy_components(others, partial)
        (partial / component).mkdir()
        write_model(model, partial / component, components=components)


@checked
def load(
    folder: str | Path,
    *,
    component: str | None = None,
    backend: str = DEFAULT_BACKEND,
    verify: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build the model of a folder that loraq wrote, and load it.

    Args:
        folder: a quantized folder of a model of diffusers or transformers, a pipeline folder with a
            quantized model in it, or a repository of the hub such as "user/name" that is one.
        component: which model of a pipeline, such as "transformer_2"; by default the only quantized
            denoiser, or the only quantized component if no denoiser is.
        backend: back end of the quantized layers.
        verify: whether the files' hashes are checked.
        device: where the model goes; "auto" is the best device there is.
        dtype: of what stays float, but for what its class keeps in fp32; by default that of the
            file, the widest one if it mixes several.

    Returns:
        The model in evaluation mode, with `QuantizedLinear` layers.

    Raises:
        CheckpointError: truncated, foreign, changed or mismatched files; or the pipeline has
            several quantized models, and none was named.
        LoraqError: the library of the model is not installed (`loraq.load_into` works without it);
            or there is no such device, or the dtype is none of floats.
    """
    device = find_device_to_run(device)
    require_float_dtype(dtype)
    home = model_folder(local_path(folder), component, quantized=True)
    if not (home / FILE_NAME).is_file():
        raise CheckpointError(
            f"'{home}' is not a loraq checkpoint: it has no '{FILE_NAME}'. `loraq quantize` makes "
            "one."
        )
    if not (home / "config.json").is_file():
        raise CheckpointError(
            f"'{home}' has no 'config.json' that says what to build. Build the model, and use "
            "`loraq.load_into`."
        )
    config = read_json(home / "config.json")
    if "quantization_config" not in config and not _holds_packed(home):
        raise CheckpointError(
            f"'{home}' holds a float model beside the '{FILE_NAME}' of a quantized one: its "
            f"'config.json' has no `quantization_config`. Delete '{FILE_NAME}', and load the model "
            "with diffusers; or copy the quantized folder again."
        )
    model = model_of(config, home / "config.json")
    load_onto(model, home, device, backend=backend, verify=verify)
    if dtype is None:
        unify_dtypes(model)
    else:
        cast_saved(model, dtype)
    take_kept_dtypes(model)
    cast_unsaved(model)
    attach_methods(model)
    attach_card(model)
    note_origin(model, home)
    mark_quantized(model)
    note_memory(model)
    return model.to(device).eval()


def _holds_packed(folder: Path) -> bool:
    return any(name.endswith("weight_packed") for name in ShardReader(folder).names)


def require_float(folder: Path, config: dict[str, Any]) -> None:
    """Raise `CheckpointError` if a folder holds a quantized model.

    Its configuration says so. A float model that was saved over a quantized one leaves a
    `loraq.json` that belongs to nothing; it counts only where no configuration says more.

    Args:
        folder: where the weights are, or a file of weights.
        config: what was read of its `config.json`; empty for none.
    """
    if "quantization_config" in config or (not config and (folder / FILE_NAME).is_file()):
        raise CheckpointError(f"'{folder}' is quantized already. Start from the float weights.")


def float_folder(source: Path, component: str | None = None) -> Path:
    """Return the folder of a model, as `model_folder`, if its weights are floats.

    Raises:
        CheckpointError: it is quantized already, or is not such a folder.
    """
    folder = model_folder(source, component)
    require_float(folder, read_json(folder / "config.json"))
    return folder


def load_float(folder: Path) -> nn.Module:
    """Return the model of a float transformer folder on the CPU, in evaluation mode.

    It has the dtype of its weights.

    Raises:
        CheckpointError: the weights are missing, truncated, not float, or do not fit the
            configuration.
        LoraqError: diffusers is not installed.
    """
    reader = ShardReader(folder)
    model = empty_model(folder)
    expected = model.state_dict()
    require_fit(reader, expected, folder)
    model.load_state_dict({name: reader.read(name) for name in expected}, assign=True)
    unify_dtypes(model)
    return model.eval()


@contextmanager
def _quiet_diffusers() -> Iterator[Any]:
    """Import diffusers without its import-time chatter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import diffusers

        yield diffusers
    except ImportError as error:
        raise LoraqError(
            f'diffusers cannot be imported ({error}). Run: pip install "loraq[diffusers]"'
        ) from error
    finally:
        logging.disable(before)
