"""`quantize_checkpoint`: from whatever a model comes as (folder, pipeline, single file, hub) to a quantized folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loraq.checkpoint.manifest import FILE_NAME
from loraq.checkpoint.model import add_quantization_config, model_config
from loraq.errors import CheckpointError
from loraq.integrations.diffusers import model_of, require_fit, transformer_folder
from loraq.integrations.hub import local_path
from loraq.integrations.single_file import ConvertedReader
from loraq.json_files import read_json
from loraq.pipeline.files import Settings, quantize_files, share_from_files
from loraq.pipeline.plan import Plan
from loraq.pipeline.progress import ProgressCallback
from loraq.pipeline.report import Report
from loraq.pipeline.requirements import Stats, open_stats
from loraq.pipeline.source import Source
from loraq.recipe import Recipe
from loraq.safetensors.header import FLOATS
from loraq.safetensors.layout import DEFAULT_SHARD_BYTES
from loraq.safetensors.reader import ShardReader, TensorReader
from loraq.scheme import Scheme


def quantize_checkpoint(  # noqa: PLR0913 - each is an option of the command too
    source: str | Path,
    target: str | Path,
    recipe: str | Path | Scheme | Recipe,
    *,
    config: str | Path | None = None,
    stats: Stats | None = None,
    workers: int = 1,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
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
            "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS".
        target: the folder to make.
        recipe: a recipe, a scheme, a name, or a path to a .toml or .json file.
        config: for a source without a configuration, the diffusers `config.json` or the folder it
            is in; without one, layers are found by their tensors, and the target is for
            `loraq.load_into`.
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
    target, recipe = Path(target), Recipe.of(recipe)
    given = _locate(source, config)
    _require_apart(given.root, target)
    settings = Settings(workers, shard_bytes, overwrite, restart, link)
    opened = _open(given, recipe)
    return quantize_files(
        opened, target, recipe, settings, stats=open_stats(stats), progress=progress
    )


def plan_checkpoint(
    source: str | Path,
    recipe: str | Path | Scheme | Recipe,
    *,
    config: str | Path | None = None,
    workers: int = 1,
    progress: ProgressCallback | bool = True,
) -> Plan:
    """Return what `quantize_checkpoint` would do.

    A model that has a configuration is planned without its weights, unless the recipe allocates:
    then each is read.

    Raises:
        CheckpointError, RecipeError, SchemeError: the source or the recipe cannot be used.
        LayerError: the recipe allocates, and a layer's weights cannot be used; the message names
        it.
    """
    recipe = Recipe.of(recipe)
    given = _locate(source, config)
    if recipe.allocation != "uniform":
        opened = _open(given, recipe)
        return share_from_files(opened, recipe, workers=workers, progress=progress)
    if model := given.model():
        return Plan.of_model(model, recipe)
    return _plan_tensors(ShardReader(given.weights), recipe)


@dataclass(frozen=True)
class _Given:
    """Where the parts of a source are."""

    #: What goes along as a whole: a pipeline's folder, or the transformer itself.
    root: Path
    #: A folder of shards, or one file.
    weights: Path
    #: Content of the configuration, and where it stands; `None` if there is none.
    config: dict[str, Any] | None
    place: Path

    @property
    def component(self) -> str:
        """Name of the transformer's folder in a pipeline, or ""."""
        return self.weights.name if (self.root / "model_index.json").is_file() else ""

    def model(self) -> nn.Module | None:
        """Return the diffusers model on the meta device, or `None` if no configuration names one."""
        return (
            model_of(self.config, self.place)
            if self.config and "_class_name" in self.config
            else None
        )


def _locate(source: str | Path, config: str | Path | None) -> _Given:
    """Find weights and configuration.

    Raises:
        CheckpointError: there is no such source, it is quantized already, or its configuration
        cannot be read.
    """
    path = local_path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"'{path}' is not a .safetensors file. Other weight files are not read: convert it."
            )
        root, weights, place = path, path, path
    else:
        root, weights = path, transformer_folder(path)
        place = weights / "config.json"
    if config is not None:
        place = Path(config)
        place = transformer_folder(place) / "config.json" if place.is_dir() else place
    content = (
        read_json(place)
        if config is not None or (place.name == "config.json" and place.is_file())
        else None
    )
    if (weights / FILE_NAME).is_file() or "quantization_config" in (content or {}):
        raise CheckpointError(f"'{weights}' is quantized already. Start from the float weights.")
    return _Given(root, weights, content, place)


def _open(given: _Given, recipe: Recipe) -> Source:
    """Check names, shapes and dtypes of all tensors against the configuration, and plan."""
    model = given.model()
    plan = Plan.of_model(model, recipe) if model else None
    files = ShardReader(given.weights)
    if model is None:
        _require_floats(files, given.weights)
        config = add_quantization_config(given.config) if given.config else {}
        return Source(files, files, tuple(files.names), {}, config, _plan_tensors(files, recipe))
    assert plan is not None
    reader: TensorReader = files
    expected, tied = _expect_tensors(model, files.names)
    if given.weights.is_file() and not set(expected) <= set(files.names):
        reader = ConvertedReader(files, type(model).__name__, given.config or {})
        expected, tied = _expect_tensors(model, reader.names)
    require_fit(reader, expected, given.weights)
    names = tuple(name for name in expected if name not in tied)
    return Source(
        files, reader, names, tied, model_config(model), plan, _others(given), given.component
    )


def _expect_tensors(
    model: nn.Module, stored: list[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors a model wants stored, and the names that share one: a module may stand in two places."""
    owners = dict(model.named_modules(remove_duplicate=False))
    first: dict[tuple[int, str], str] = {}
    expected, tied = {}, {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        source = first.setdefault((id(owners[owner]), leaf), name)
        if source != name:
            tied[name] = source
        if source == name or name in stored:
            expected[name] = tensor
    return expected, tied


def _plan_tensors(files: ShardReader, recipe: Recipe) -> Plan:
    """Plan a model whose class is not known: every matrix called `….weight` is taken for a linear layer."""
    shapes = {}
    for name in files.names:
        layer, _, leaf = name.rpartition(".")
        shape = files.shape(name)
        if (
            layer
            and leaf == "weight"
            and len(shape) in (2, 4)
            and shape[2:] in ((), (1, 1))
            and min(shape) > 0
        ):
            shapes[layer] = (shape[0], shape[1])
    return Plan.of(shapes, recipe)


def _require_floats(files: ShardReader, place: Path) -> None:
    for name in files.names:
        dtype = files.dtype(name)
        if dtype not in FLOATS and (dtype.startswith("F8") or name.endswith("weight")):
            raise CheckpointError(
                f"'{place}': tensor '{name}' is {dtype}. Float weights of 16 bits or more are "
                f"required."
            )


def _others(given: _Given) -> dict[str, Path]:
    """Return the files of a pipeline's other components by their place; linked folders are followed."""
    if not given.component:
        return {}
    others = {}
    for folder, inner, files in os.walk(given.root, followlinks=True):
        if Path(folder) == given.root:
            inner.remove(given.component)
        for file in files:
            path = Path(folder) / file
            others[str(path.relative_to(given.root))] = path
    return others


def _require_apart(source: Path, target: Path) -> None:
    """Raise `CheckpointError` if writing the target could touch the source."""
    a, b = source.resolve(), target.resolve()
    if a == b:
        raise CheckpointError(f"Source and target are both '{source}'. Choose another target.")
    if a in b.parents or b in a.parents:
        inner, outer = (target, source) if a in b.parents else (source, target)
        raise CheckpointError(
            f"'{inner}' lies inside '{outer}'. Source and target must be apart: choose another "
            f"target."
        )
