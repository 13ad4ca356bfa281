"""Files to files: a checkpoint is quantized tensor by tensor, and the float model is never built.

Everything that can be wrong is found first: names and shapes, then one pass over all weights that
looks for NaN and takes their hashes. Then every layer is read, solved, written to its place, and
noted in the journal.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraq.checkpoint.header import TensorSpec
from loraq.checkpoint.journal import Journal, require_target, resumable_folder
from loraq.checkpoint.layout import DEFAULT_SHARD_BYTES, ShardLayout, tensor_bytes
from loraq.checkpoint.manifest import Manifest, StoredLayer
from loraq.checkpoint.model import weights_stem
from loraq.checkpoint.reader import ShardReader, TensorReader
from loraq.checkpoint.writer import write_json
from loraq.errors import CalibrationError, CheckpointError, RecipeError
from loraq.pipeline.plan import LayerPlan, Plan
from loraq.pipeline.progress import ProgressCallback
from loraq.pipeline.quantize import (
    LayerReport,
    Report,
    report_layer,
    shown_progress,
    solve_layer,
    tensor_sha256,
)
from loraq.pipeline.sharing import allocated_from_files
from loraq.pipeline.stats import hashes_of_used
from loraq.pipeline.workers import run_jobs
from loraq.recipe import Recipe
from loraq.stats import ActivationStats
from loraq.version import __version__


@dataclass(frozen=True)
class Source:
    """A float checkpoint: its tensors, checked against its configuration, and what goes along."""

    #: The files as they are.
    files: ShardReader
    #: The tensors under the names of the model.
    reader: TensorReader
    #: Names of all tensors to write, in the order of the model.
    names: tuple[str, ...]
    #: Names that share the tensor of another name.
    tied: dict[str, str]
    #: What `config.json` of the target says; empty for none.
    config: dict[str, Any]
    #: (out, in) of the linear layers get this by recipe.
    plan: Plan
    #: Files to copy, by their place in the target: the other components of a pipeline.
    others: dict[str, Path] = field(default_factory=dict)
    #: Place of the transformer in the target: a folder's name, or "" for the target itself.
    component: str = ""


@dataclass(frozen=True)
class Settings:
    """How the files are written; none of this changes a number."""

    #: Layers in flight, each in its own process.
    workers: int = 1
    #: Largest shard, unless one tensor alone is larger.
    shard_bytes: int = DEFAULT_SHARD_BYTES
    #: Whether a model folder that is there may be replaced.
    overwrite: bool = False
    #: Whether to forget what an interrupted run has finished.
    restart: bool = False
    #: Whether the other components are hard links instead of copies.
    link: bool = False


@dataclass(frozen=True)
class _Job:
    """One layer to do."""

    layer: LayerPlan
    #: Hash of the weight when it was scanned.
    sha256: str
    #: Hash of the statistics when they were checked; empty for none.
    stats_sha256: str

    @property
    def name(self) -> str:
        return self.layer.name


@dataclass(frozen=True)
class _Work:
    """What a worker needs to do any layer: it reads, solves and writes by itself."""

    reader: TensorReader
    layout: ShardLayout
    folder: Path
    recipe: Recipe
    stats: Mapping[str, ActivationStats] | None

    def __call__(self, job: _Job) -> dict[str, Any]:
        """Do a layer, and return its line for the journal once its bytes are on the disk."""
        layer = job.layer
        assert layer.scheme is not None
        weight = self.reader.read(f"{layer.name}.weight").view(
            layer.shape
        )  # a 1x1 convolution is a matrix too
        stats = self._stats(job)
        solution = solve_layer(weight, self.recipe, layer.scheme, layer.name, stats)
        report = report_layer(layer.name, weight, solution, job.stats_sha256)
        if report.source_sha256 != job.sha256:
            raise CheckpointError(
                f"The weight of layer '{layer.name}' changed while it was read. Leave the source "
                f"be."
            )
        tensors = {
            f"{layer.name}.{name}": tensor for name, tensor in solution.packed.tensors.items()
        }
        self.layout.write(self.folder, tensors, sync=True)
        entry = {
            key: value for key, value in asdict(report).items() if key not in ("shape", "scheme")
        }
        return {**entry, "written_sha256": _sha256_of_all(tensors)}

    def _stats(self, job: _Job) -> ActivationStats | None:
        if self.stats is None or not job.stats_sha256:
            return None
        stats = self.stats[job.name]
        if stats.sha256 != job.stats_sha256:
            raise CalibrationError(
                f"The statistics of layer '{job.name}' changed meanwhile. Leave their file be."
            )
        return stats


def stream(
    source: Source,
    target: Path,
    recipe: Recipe,
    settings: Settings,
    *,
    stats: Mapping[str, ActivationStats] | None = None,
    progress: ProgressCallback | bool = True,
) -> Report:
    """Quantize a checkpoint into a new folder, or finish what an interrupted run has begun.

    Raises:
        CalibrationError: statistics are missing, do not fit, or are not used.
        CheckpointError: the source cannot be used, the target cannot be written, or was begun with
        other settings.
        LayerError: a layer failed; the message names it. What is finished is kept.
        RecipeError: the recipe leaves nothing to quantize.
    """
    if not source.plan.quantized:
        raise RecipeError(
            f"Nothing to quantize: {len(source.plan.layers)} linear layers were found, and all are "
            f"skipped. "
            "`loraq plan` shows why; a rule with `skip = false` overrides."
        )
    require_target(target, overwrite=settings.overwrite)
    _require_space(
        target, source, _layout(source, settings), settings
    )  # an allocation takes no more
    stats_hashes = hashes_of_used(stats, source.plan, recipe)
    plan = allocated_from_files(
        source.plan, recipe, source.reader, workers=settings.workers, progress=progress
    )
    source = replace(source, plan=plan)
    tied = _output_ties(source)
    layout = _layout(source, settings)
    fingerprint = _fingerprint(source, layout, recipe)
    fingerprint["statistics"] = {name: digest[:16] for name, digest in stats_hashes.items()}
    n = len(plan.quantized)
    with resumable_folder(
        target, fingerprint, n, overwrite=settings.overwrite, restart=settings.restart
    ) as journal:
        if journal.whole and not journal.folder.exists():
            return _report(recipe, plan, journal.layers, kept=n)
        hashes = _scan(source)
        folder = journal.folder / source.component
        kept = _kept(journal, source, layout, folder, hashes)
        folder.mkdir(exist_ok=True)
        layout.allocate(folder)
        _copy_others(source.others, journal.folder, link=settings.link)
        for name in source.names:
            if name in layout.specs:
                layout.write(folder, {name: source.reader.read(name)})
        jobs = [
            _Job(layer, hashes[layer.name], stats_hashes.get(layer.name, ""))
            for layer in plan.quantized
            if layer.name not in kept
        ]
        jobs.sort(
            key=lambda job: -math.prod(job.layer.shape)
        )  # the longest first, so that workers end together
        n_kept = len(kept)
        work = _Work(source.reader, layout, folder, recipe, stats)
        with shown_progress(progress) as show:
            with closing(
                run_jobs(work, jobs, settings.workers)
            ) as entries:  # on an error all workers end first
                for entry in entries:
                    journal.append(entry)
                    kept[entry["name"]] = entry
                    show(len(kept), n, entry["name"], entry["relative_error"])
        report = _report(recipe, plan, kept, kept=n_kept)
        _write_manifest(folder, layout, source, report, tied)
        return report


def _layout(source: Source, settings: Settings) -> ShardLayout:
    return ShardLayout.of(_output_specs(source), weights_stem(source.config), settings.shard_bytes)


def _output_specs(source: Source) -> dict[str, TensorSpec]:
    """Return every tensor of the target, in the order in which `save` would write the model."""
    layers = {f"{layer.name}.weight": layer for layer in source.plan.quantized}
    specs = {}
    for name in source.names:
        if (layer := layers.get(name)) and layer.scheme:
            for part, shape in layer.scheme.storage(layer.shape).items():
                specs[f"{layer.name}.{part}"] = TensorSpec("U8", shape)
        else:
            specs[name] = TensorSpec(source.reader.dtype(name), source.reader.shape(name))
    return specs


def _output_ties(source: Source) -> dict[str, str]:
    """Return the ties of the target: a layer that stands in two places shares all that is stored of it."""
    layers = {f"{layer.name}.weight": layer for layer in source.plan.quantized}
    tied: dict[str, str] = {}
    for name, first in source.tied.items():
        if (layer := layers.get(first)) and layer.scheme:
            other = name.removesuffix(".weight")
            tied |= {
                f"{other}.{part}": f"{layer.name}.{part}"
                for part in layer.scheme.storage(layer.shape)
            }
        else:
            tied[name] = first
    return tied


def _fingerprint(source: Source, layout: ShardLayout, recipe: Recipe) -> dict[str, Any]:
    """Return all that decides the target's bytes but the numbers of the weights, which have their own hashes."""
    return {
        "recipe": recipe.to_dict(),
        "source": {
            name: f"{header.file_bytes} bytes, header {header.sha256[:16]}"
            for name, header in source.files.files.items()
        },
        "layout": f"{len(layout.files)} files, headers {layout.sha256[:16]}",
        "schemes": {
            layer.name: asdict(layer.scheme) for layer in source.plan.quantized if layer.scheme
        },
        "configuration": source.config,
        "versions": {"loraq": __version__, "torch": torch.__version__},
    }


def _scan(source: Source) -> dict[str, str]:
    """Read every tensor once: raise `CheckpointError` if a number is not finite; return the hashes of the weights.

    The smallest and the largest value tell both, since a NaN makes both NaN; this runs at the speed
    of the memory.
    """
    layers = {f"{layer.name}.weight": layer.name for layer in source.plan.quantized}
    hashes = {}
    for name in source.names:
        tensor = source.reader.read(name)
        if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
            place = tuple(int(i) for i in (~tensor.isfinite()).nonzero()[0])
            raise CheckpointError(
                f"Tensor '{name}' has a value that is no finite number: {tensor[place].item()} at "
                f"{place}. "
                "Repair the source, or download it again."
            )
        if name in layers:
            hashes[layers[name]] = tensor_sha256(tensor)
    return hashes


def _is_finite(tensor: Tensor) -> bool:
    least, most = torch.aminmax(tensor)
    return bool(least.isfinite() and most.isfinite())


def _kept(
    journal: Journal, source: Source, layout: ShardLayout, folder: Path, hashes: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Return the lines of the layers that need not be done again.

    Raises:
        CheckpointError: a weight in the source is not what it was when its layer was done.
    """
    kept = {}
    for layer in source.plan.quantized:
        if (entry := journal.layers.get(layer.name)) is None or layer.scheme is None:
            continue
        if entry["source_sha256"] != hashes[layer.name]:
            raise CheckpointError(
                f"The weight of layer '{layer.name}' is not what it was when the layer was "
                f"finished. Put the old "
                "source back to go on, or use `--restart` to begin anew."
            )
        parts = [f"{layer.name}.{part}" for part in layer.scheme.storage(layer.shape)]
        if _sha256_of_places(folder, layout, parts) == entry["written_sha256"]:
            kept[layer.name] = entry
    return kept


def _sha256_of_all(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _sha256_of_places(folder: Path, layout: ShardLayout, names: list[str]) -> str:
    """Return the hash of what stands at the places of some tensors; nothing, if a file does not have them."""
    digest = hashlib.sha256()
    for name in names:
        file, place = layout.places[name]
        if not (folder / file).is_file():
            return ""
        with (folder / file).open("rb") as shard:
            shard.seek(place)
            digest.update(shard.read(layout.specs[name].nbytes))
    return digest.hexdigest()


def _copy_others(others: Mapping[str, Path], target: Path, *, link: bool) -> None:
    """Copy or link files; a copy that an earlier run has finished has the time of its original and is left."""
    for name, path in others.items():
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_file() and _size_and_time(place) == _size_and_time(path):
            continue
        place.unlink(missing_ok=True)
        if link:
            os.link(path.resolve(), place)
        else:
            shutil.copy2(path, place)


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _require_space(target: Path, source: Source, layout: ShardLayout, settings: Settings) -> None:
    """Raise `CheckpointError` if the disk of the target cannot hold what will be written."""
    place = next(parent for parent in target.absolute().parents if parent.exists())
    copied = 0 if settings.link else sum(path.stat().st_size for path in source.others.values())
    free, needed = shutil.disk_usage(place).free, layout.nbytes + copied
    for path in target.resolve().with_name(f".{target.resolve().name}.partial").rglob("*"):
        needed -= path.stat().st_size if path.is_file() else 0
    if needed > free:
        raise CheckpointError(
            f"'{place}' has {free / 1e9:.2f} GB free and about {needed / 1e9:.2f} GB are needed. "
            f"Free space, or choose "
            "another target."
        )
    if settings.link and any(
        path.resolve().stat().st_dev != place.stat().st_dev for path in source.others.values()
    ):
        raise CheckpointError(
            f"'{place}' is on another disk than the source, and hard links cannot cross. Leave "
            f"`--link` out to copy."
        )


def _report(
    recipe: Recipe, plan: Plan, entries: Mapping[str, dict[str, Any]], *, kept: int
) -> Report:
    layers = []
    for layer in plan.quantized:
        assert layer.scheme is not None
        entry = {
            key: value for key, value in entries[layer.name].items() if key != "written_sha256"
        }
        layers.append(LayerReport(shape=layer.shape, scheme=layer.scheme, **entry))
    return Report(recipe, plan, tuple(layers), kept)


def _write_manifest(
    folder: Path, layout: ShardLayout, source: Source, report: Report, tied: dict[str, str]
) -> None:
    """Write what stands beside the shards: `config.json` and `loraq.json`, as `save` does."""
    files = layout.files
    if source.config:
        write_json(folder / "config.json", source.config)
        files.append("config.json")
    stored = {
        layer.name: StoredLayer(layer.shape, layer.scheme, {**layer.record(), "recipe": 0})
        for layer in report.layers
    }
    Manifest(stored, [report.recipe.to_dict()], tied).write(folder, files)
