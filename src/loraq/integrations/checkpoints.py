"""`quantize_checkpoint`: from a folder, pipeline, single file or the hub to a quantized folder."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from loraq.checkpoint.apart import require_apart
from loraq.checkpoint.links import require_own_weights
from loraq.checkpoint.stats_file import file_of_stats
from loraq.errors import CheckpointError
from loraq.integrations.diffusers import model_of, require_float, transformer_folder
from loraq.integrations.hub import local_path
from loraq.integrations.single_file import ConvertedReader
from loraq.integrations.transformers import linear_names
from loraq.json_files import read_json
from loraq.options import Size, Workers, checked
from loraq.pipeline.files import Settings, quantize_files, share_from_files
from loraq.pipeline.plan import Plan
from loraq.pipeline.progress import ProgressCallback
from loraq.pipeline.report import Report
from loraq.pipeline.requirements import Stats, open_stats
from loraq.pipeline.source import Checkpoint, Source
from loraq.recipe import Recipe, file_of
from loraq.safetensors.layout import DEFAULT_SHARD_BYTES
from loraq.safetensors.selection import may_hold_weights
from loraq.scheme import Scheme


@checked
def quantize_checkpoint(  # noqa: PLR0913 - each is an option of the command too
    source: str | Path,
    target: str | Path,
    recipe: str | Path | Scheme | Recipe,
    *,
    config: str | Path | None = None,
    variant: str | None = None,
    stats: Stats | None = None,
    workers: Workers = 1,
    shard_bytes: Size = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    restart: bool = False,
    link: bool = False,
    progress: ProgressCallback | bool = True,
) -> Report:
    """Quantize a checkpoint of any size into a new folder, without ever building the float model.

    One tensor is in memory at a time, or one for each worker. The target appears under its name
    only when it is whole. A run that was interrupted or killed goes on where it was when it is
    called again; the files do not depend on that, nor on `workers`.

    Args:
        source: a transformer's folder, a pipeline's folder (its other components go along as they
            are), one safetensors file, or a repository of the hub such as
            "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS". Links in a folder are followed inside of it,
            or from a snapshot to the blobs of the hub's cache; any other is refused.
        target: the folder to make.
        recipe: a recipe, a scheme, a name, or a path to a .toml or .json file.
        config: for a source without a configuration, the diffusers `config.json` or the folder it
            is in; without one, layers are found by their tensors, and the target is for
            `loraq.load_into`.
        variant: which of several copies of the weights in a folder is read, such as "fp16"; by
            default the one whose name says none, or else the only one.
        stats: statistics by layer from `collect_stats`, or the file they were saved in; `None`
            needs no data.
        workers: processes that solve layers at a time, on one thread each. A script that asks for
            more than one needs the usual `if __name__ == "__main__":`, because they import it.
        shard_bytes: largest output file, unless one tensor alone is larger.
        overwrite: whether a model folder that is there may be replaced.
        restart: whether to forget what an interrupted run has finished.
        link: whether a pipeline's other components are hard links instead of copies.
        progress: False for silence, True for a display on stderr, or a function to call after each
            layer.

    Returns:
        The plan and what became of each layer.

    Raises:
        CalibrationError: statistics are missing, do not fit, or are not used.
        CheckpointError: the source cannot be used, the target cannot be written, or was begun with
            other settings.
        LayerError: a layer failed; the message names it. What is finished is kept for the next
            call.
        RecipeError, SchemeError: the recipe cannot be read, or does not fit the model.
    """
    target, recipe_file, recipe = Path(target), file_of(recipe), Recipe.of(recipe)
    checkpoint = _locate(source, config, variant)
    # Of the folder that a configuration is in, nothing else is read.
    files = _find_config(checkpoint.weights, config), file_of_stats(stats), recipe_file
    require_apart(target, checkpoint.root, *files)
    settings = Settings(workers, shard_bytes, overwrite, restart, link)
    opened = Source.open(checkpoint, recipe)
    return quantize_files(
        opened, target, recipe, settings, stats=open_stats(stats), progress=progress
    )


@checked
def plan_checkpoint(
    source: str | Path,
    recipe: str | Path | Scheme | Recipe,
    *,
    config: str | Path | None = None,
    variant: str | None = None,
    workers: Workers = 1,
    progress: ProgressCallback | bool = True,
) -> Plan:
    """Return what `quantize_checkpoint` would do, or refuse what it would refuse.

    Of the weights only names, shapes and dtypes are read, unless the recipe allocates: then each
    is. A folder with a configuration and no weights at all can be planned, too.

    Raises:
        CheckpointError, RecipeError, SchemeError: the source or the recipe cannot be used.
        LayerError: the recipe allocates, and a layer's weights cannot be used; the message names
            it.
    """
    recipe = Recipe.of(recipe)
    checkpoint = _locate(source, config, variant)
    if recipe.allocation != "uniform":
        opened = Source.open(checkpoint, recipe)
        return share_from_files(opened, recipe, workers=workers, progress=progress)
    if checkpoint.model is not None and not may_hold_weights(checkpoint.weights):
        # What stays floats is counted in 16 bits, as most models are published.
        return Plan.of_model(nn.Module.to(checkpoint.model, torch.bfloat16), recipe)
    return Source.open(checkpoint, recipe).plan


def _locate(
    source: str | Path, config: str | Path | None, variant: str | None = None
) -> Checkpoint:
    """Find weights and configuration, and build the model on the meta device.

    Raises:
        CheckpointError: there is no such source, it is quantized already, or its configuration
            cannot be read, or a link leads out of it.
    """
    root = local_path(source, variant)
    weights = root if root.is_file() else transformer_folder(root)
    if root.is_file() and root.suffix != ".safetensors":
        raise CheckpointError(
            f"'{root}' is not a .safetensors file. Other weight files are not read: convert it."
        )
    if root.is_dir():
        require_own_weights(root, weights)
    config_file = _find_config(weights, config)
    content = {} if config_file is None else read_json(config_file)
    require_float(weights, content)
    if config_file is None or "_class_name" not in content:
        linear = linear_names(content, config_file) if config_file else None
        return Checkpoint(root, weights, content, variant=variant, linear=linear)
    convert = partial(ConvertedReader, class_name=content["_class_name"], config=content)
    model = model_of(content, config_file, weights)
    return Checkpoint(root, weights, content, model, convert, variant)


def _find_config(weights: Path, config: str | Path | None) -> Path | None:
    """Return the configuration that was given, or the one beside the weights, if there is one."""
    if config is not None:
        given = Path(config)
        return transformer_folder(given) / "config.json" if given.is_dir() else given
    beside = weights / "config.json"
    return beside if beside.is_file() else None
