"""`quantize_checkpoint`: from a folder, pipeline, single file or the hub to a quantized folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from loraq.checkpoint.apart import require_apart
from loraq.checkpoint.links import find_files, require_own_weights
from loraq.checkpoint.model_index import (
    INDEX,
    choose_components,
    is_pipeline,
    list_apart,
    read_components,
)
from loraq.checkpoint.stats_file import file_of_stats
from loraq.devices import ALL, AUTO, find_devices
from loraq.errors import CheckpointError, list_some
from loraq.integrations.diffusers import model_folder, model_of, require_float
from loraq.integrations.hub import local_path
from loraq.integrations.single_file import read_own_layout
from loraq.integrations.survey import survey
from loraq.integrations.transformers import is_config_of_transformers, read_under_own_names
from loraq.json_files import read_json
from loraq.options import Size, Workers, checked
from loraq.pipeline.files import Settings, quantize_files, share_from_files
from loraq.pipeline.plan import Plan
from loraq.pipeline.progress import ProgressCallback
from loraq.pipeline.ranks import open_ranks
from loraq.pipeline.report import Report
from loraq.pipeline.requirements import Stats, StatsByComponent, open_stats, split_stats
from loraq.pipeline.source import Checkpoint, Origin, Source, name_component
from loraq.recipe import Recipe, file_of
from loraq.safetensors.fp8 import Fp8Reader
from loraq.safetensors.layout import DEFAULT_SHARD_BYTES
from loraq.safetensors.reader import ShardReader, TensorReader
from loraq.safetensors.selection import WEIGHT_FILES, may_hold_weights, select_weights
from loraq.scheme import Scheme


@checked
def quantize_checkpoint(  # noqa: PLR0913 - each is an option of the command too
    source: str | Path,
    target: str | Path,
    recipe: str | Path | Scheme | Recipe,
    *,
    components: str | Sequence[str] | None = None,
    config: str | Path | None = None,
    variant: str | None = None,
    stats: Stats | StatsByComponent | None = None,
    device: str | torch.device = AUTO,
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
        source: a model's folder, a pipeline's folder (its other components go along as they are;
            what it does not name stays behind), one safetensors file, or a repository of the hub
            such as "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS". Links in a folder are followed inside
            of it, or from a snapshot to the blobs of the hub's cache; any other is refused.
        target: the folder to make.
        recipe: a recipe, a scheme, a name, or a path to a .toml or .json file.
        components: what of a pipeline is quantized: names, or "all" for denoisers and text
            encoders; `None` takes its denoisers, which are all transformers and U-Nets. Each gets
            the files that it gets alone.
        config: for a source without a configuration, the diffusers `config.json` or the folder it
            is in; without one, layers are found by their tensors, and the target is for
            `loraq.load_into`.
        variant: which of several copies of the weights in a folder is read, such as "fp16"; by
            default the one whose name says none, or else the only one. A component that has no
            such copy gives its default, as in diffusers.
        stats: statistics by layer from `collect_stats`, or the file they were saved in; of several
            components a mapping of these by component. `None` needs no data.
        device: where layers are solved: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" …,
            or "all" (every GPU, a worker for each); `workers` take turns on the devices of a kind.
            Another kind of device gives other bytes, as good; the manifest names it.
        workers: processes that solve layers at a time, on one thread each. A script that asks for
            more than one needs the usual `if __name__ == "__main__":`, because they import it.
            Where torchrun runs the script, its ranks share the layers instead, each makes this
            call, and all get the same report.
        shard_bytes: largest output file, unless one tensor alone is larger.
        overwrite: whether a model folder that is there may be replaced.
        restart: whether to forget what an interrupted run has finished.
        link: whether a pipeline's other components are hard links instead of copies.
        progress: False for silence, True for a display on stderr, or a function to call after each
            layer.

    Returns:
        The plan and what became of each layer. Of several components, `components` of the report
        has one for each.

    Raises:
        CalibrationError: statistics are missing, do not fit, or are not used.
        CheckpointError: the source cannot be used, the target cannot be written, or was begun with
            other settings.
        DeviceError: there is no such device.
        LayerError: a layer failed; the message names it. What is finished is kept for the next
            call.
        RankError: torchrun's ranks cannot meet, or are given `workers`, too.
        RecipeError, SchemeError: the recipe cannot be read, or does not fit the model.
    """
    target, recipe_file, recipe = Path(target), file_of(recipe), Recipe.of(recipe)
    devices = find_devices(device)
    with open_ranks(workers, at_least=len(devices) if device == ALL else 1) as ranks:
        located = locate(source, config, variant, components)
        by_component = split_stats(stats, list(located.checkpoints))
        # Of the folder that a configuration is in, nothing else is read.
        files = [_find_config(each.weights, config) for each in located.checkpoints.values()]
        files += [file_of_stats(each) for each in by_component.values()]
        require_apart(target, located.root, *files, recipe_file)
        opened = {name: open_stats(each) for name, each in by_component.items()}
        return quantize_files(
            located.open(recipe),
            target,
            recipe,
            Settings(ranks, devices, shard_bytes, overwrite, restart, link),
            stats={name: each for name, each in opened.items() if each is not None},
            progress=progress,
        )


@checked
def plan_checkpoint(  # noqa: PLR0913 - as `quantize_checkpoint`
    source: str | Path,
    recipe: str | Path | Scheme | Recipe,
    *,
    components: str | Sequence[str] | None = None,
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
    recipe, located = Recipe.of(recipe), locate(source, config, variant, components)
    if recipe.allocation != "uniform":
        origin = located.open(recipe)
        with open_ranks(workers) as ranks:
            planned = share_from_files(origin, recipe, ranks=ranks, progress=progress).plan
    else:
        plans = {name: _plan(each, recipe) for name, each in located.checkpoints.items()}
        planned = Plan.join(plans, located.notes)
    if "" in located.checkpoints:
        return planned
    sizes, advice = survey(
        read_components(located.root),
        planned.components or {name: planned for name in located.checkpoints},
        lambda part: _plan(_locate(located.root, part.folder, None, None), recipe),
        variant,
    )
    return replace(planned, sizes=sizes, notes=(*planned.notes, *advice))


def _plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    if checkpoint.model is not None and not may_hold_weights(checkpoint.weights):
        # What stays floats is counted in 16 bits, as most models are published.
        return Plan.of_model(nn.Module.to(checkpoint.model, torch.bfloat16), recipe)
    return Source.open(checkpoint, recipe).plan


@dataclass(frozen=True)
class Located:
    """What of a source is quantized, and where; no weights are read yet."""

    #: The folder of a pipeline or model, or a file.
    root: Path
    #: By component; of a model alone the name is "".
    checkpoints: dict[str, Checkpoint]
    #: Files that go along, by their path in the pipeline.
    others: dict[str, Path] = field(default_factory=dict)
    #: What of the pipeline is left as it is, or left out: sentences for the user.
    notes: tuple[str, ...] = ()

    def open(self, recipe: Recipe) -> Origin:
        """Check and plan all of it; raises as `Source.open`."""
        return Origin.open(self.checkpoints, recipe, self.others, self.notes)


def locate(
    source: str | Path,
    config: str | Path | None = None,
    variant: str | None = None,
    components: str | Sequence[str] | None = None,
) -> Located:
    """Find weights and configurations, and build the models on the meta device.

    Raises:
        CheckpointError: there is no such source or component, it is quantized already, its
            configuration cannot be read, or a link leads out of it.
    """
    root = local_path(source, variant)
    if root.is_dir() and is_pipeline(root):
        return _locate_components(root, config, variant, components)
    if components is not None:
        raise CheckpointError(
            f"'{root}' is no pipeline (a folder with '{INDEX}'), and has no components to choose "
            "from. Leave `components` (`--components`) out."
        )
    weights = root if root.is_file() else model_folder(root)
    return Located(root, {"": _locate(root, weights, config, variant)})


def _locate_components(
    root: Path,
    config: str | Path | None,
    variant: str | None,
    asked: str | Sequence[str] | None,
) -> Located:
    chosen, done = choose_components(root, asked)
    named = read_components(root)
    if config is not None and len(chosen) > 1:
        raise CheckpointError(
            f"One configuration was given (`--config`), and '{root}' has "
            f"{len(chosen)} models to quantize: {', '.join(part.name for part in chosen)}. Choose "
            "one (`--components`), or leave the configuration out."
        )
    notes, checkpoints = [], {}
    having = [part for part in chosen if variant and _has_variant(part.folder, variant)] or chosen
    for part in chosen:
        if part not in having:
            notes.append(f"{part.name} has no weights of variant '{variant}': its default is used.")
        with name_component(part.name, len(chosen)):
            checkpoints[part.name] = _locate(
                root, part.folder, config, variant if part in having else None
            )
    if done:
        notes.append(f"Quantized already, and left as it is: {', '.join(map(str, done))}.")
    left = [
        part
        for part in named.values()
        if (part.is_denoiser or part.is_text_encoder)
        and part.is_model
        and part not in chosen
        and not part.is_quantized
    ]
    if left:
        notes.append(
            f"Left as it is: {', '.join(map(str, left))}. `--components` (`components=`) names "
            "what is quantized; `all` stands for denoisers and text encoders."
        )
    apart = list_apart(root, named, WEIGHT_FILES)
    if apart:
        notes.append(f"Not part of the pipeline, and left out: {list_some(apart, most=6)}.")
    others = find_files(root, without={*checkpoints, *apart})
    return Located(root, checkpoints, others, tuple(notes))


def _has_variant(folder: Path, variant: str) -> bool:
    try:
        select_weights(folder, variant)
    except CheckpointError:
        return False
    return True


def _locate(
    root: Path, weights: Path, config: str | Path | None, variant: str | None
) -> Checkpoint:
    """Find the configuration of one model, and build it on the meta device."""
    if root.is_file() and root.suffix != ".safetensors":
        raise CheckpointError(
            f"'{root}' is not a .safetensors file. Other weight files are not read: convert it."
        )
    if root.is_dir():
        require_own_weights(root, weights)
    config_file = _find_config(weights, config)
    content = {} if config_file is None else read_json(config_file)
    require_float(weights, content)
    names_a_class = "_class_name" in content or is_config_of_transformers(content)
    if config_file is None or not names_a_class:
        return Checkpoint(weights, content, variant=variant)
    model = model_of(content, config_file, weights)
    convert: Callable[[ShardReader | Fp8Reader], TensorReader] | None = None
    if is_config_of_transformers(content):
        convert = partial(
            read_under_own_names,
            model=model,
            config=content,
            config_file=config_file,
            weights=weights,
        )
    elif root.is_file():
        convert = partial(read_own_layout, model=model, config=content)
    return Checkpoint(weights, content, model, convert, variant)


def _find_config(weights: Path, config: str | Path | None) -> Path | None:
    """Return the configuration that was given, or the one beside the weights, if there is one."""
    if config is not None:
        given = Path(config)
        return model_folder(given) / "config.json" if given.is_dir() else given
    beside = weights / "config.json"
    return beside if beside.is_file() else None
