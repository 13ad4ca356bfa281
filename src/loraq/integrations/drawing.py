"""A whole pipeline that draws: found, loaded on a device, called with a seed.

Only safetensors are read, and no code of a folder is run.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraq.checkpoint.model_index import INDEX, is_pipeline
from loraq.errors import CheckpointError, LoraqError, unknown
from loraq.integrations.diffusers import _quiet_diffusers, find_class
from loraq.json_files import read_json


def pipeline_folder(path: Path) -> Path:
    """Return the folder of a pipeline.

    Raises:
        CheckpointError: it is a model alone, or neither.
    """
    if is_pipeline(path):
        return path
    if path.is_file() or (path / "config.json").is_file():
        raise CheckpointError(
            f"'{path}' is a model alone, and cannot draw images by itself. A pipeline's folder "
            "(model_index.json) is required. For statistics of a model alone: "
            "`loraq.save_stats(loraq.collect_stats(model, run, layers), path)`, where `run` calls "
            "it."
        )
    raise CheckpointError(f"'{path}' is not a pipeline's folder: it has no '{INDEX}'.")


def pipeline_class(folder: Path) -> type:
    """Return the class of diffusers that a pipeline's folder names.

    Raises:
        CheckpointError: diffusers has no such pipeline.
        LoraqError: diffusers is not installed.
    """
    name = read_json(folder / INDEX).get("_class_name")
    with _quiet_diffusers() as diffusers:
        kind = find_class(diffusers, name)
        if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
            raise CheckpointError(
                f"'{folder}' names the pipeline {name!r}, which diffusers {diffusers.__version__} "
                "does not have. Code of a folder is not run: install the diffusers version that "
                "has it."
            )
        return kind


def require_call(
    kind: type, call: Mapping[str, Any], *, prompt: bool
) -> Mapping[str, inspect.Parameter]:
    """Return what the call of a pipeline takes, if it takes these arguments and needs no others.

    Args:
        kind: its class.
        call: the arguments, besides prompt and generator.
        prompt: whether it is given a prompt.

    Raises:
        LoraqError: it does not take one of them, or needs more.
    """
    takes = inspect.signature(kind.__call__).parameters
    if "generator" in call:
        raise LoraqError(
            "The generator cannot be given: noise comes from the seed (`--seed`, `seed`)."
        )
    for name in (*call, *(["prompt"] if prompt else [])):
        if name not in takes:
            raise LoraqError(unknown(f"argument of {kind.__name__}", name, set(takes) - {"self"}))
    needed = [name for name, parameter in takes.items() if parameter.default is parameter.empty]
    missing = set(needed) - {"self", "args", "kwargs", "prompt", *call}
    if missing or "generator" not in takes:
        raise LoraqError(
            f"{kind.__name__} cannot be run on a prompt alone: it needs "
            f"{', '.join(sorted(missing)) or 'more'}. Give it (`--set`, `call`), or take another "
            "pipeline."
        )
    return takes


def load_pipeline(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    variant: str | None = None,
    components: Mapping[str, nn.Module] | None = None,
) -> Any:
    """Load a pipeline on a device.

    Args:
        folder: of the pipeline.
        dtype: of all its models.
        device: where they go.
        variant: which of several copies of the weights.
        components: models that take the place of those in the folder, which are not read then.

    Raises:
        CheckpointError: diffusers cannot load it.
        LoraqError: diffusers is not installed.
    """
    with _quiet_diffusers() as diffusers:
        try:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                folder,
                variant=variant,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                **(components or {}),
            )
            pipeline.set_progress_bar_config(disable=True)
            return pipeline.to(device)
        except Exception as error:  # components raise what they like
            raise CheckpointError(
                f"diffusers cannot load the pipeline '{folder}': {error}"
            ) from error


def draw_seeded(pipeline: Any, seed: int, call: Mapping[str, Any]) -> Any:
    """Return what a pipeline's call gives for a seed; the noise is the same on all devices.

    The random state of the process is afterwards what it was.
    """
    on_gpu = [pipeline.device] if pipeline.device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu):
        torch.manual_seed(seed)  # for what a pipeline draws beside its generator
        return pipeline(generator=torch.Generator().manual_seed(seed), **call)
