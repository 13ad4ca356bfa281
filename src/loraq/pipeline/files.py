"""Files to files: checkpoints are quantized tensor by tensor, and no float model is ever built.

Everything that can be wrong is found first: names and shapes, then one pass over all weights that
looks for NaN and takes their hashes. Then every layer is read, solved, written to its place, and
noted in the journal. The layers of several models are one list, and their folder is one target.
"""

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraq.checkpoint.journal import Journal
from loraq.checkpoint.partial import (
    explain_interrupt,
    remove_leftovers,
    require_target,
    resumable_folder,
)
from loraq.errors import CalibrationError, CheckpointError
from loraq.pipeline.complete import find_complete, may_be_complete
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.layer import quantize_layer, read_matrices
from loraq.pipeline.part import LayerWriter, Part
from loraq.pipeline.progress import ProgressCallback, show_layers
from loraq.pipeline.report import LayerReport, Report
from loraq.pipeline.requirements import hash_used_stats
from loraq.pipeline.sharing import PredictAll, PredictFromFile, share_budget
from loraq.pipeline.source import Origin, Source, name_component
from loraq.pipeline.target import Target
from loraq.pipeline.workers import run_jobs
from loraq.recipe import Recipe
from loraq.safetensors.layout import DEFAULT_SHARD_BYTES
from loraq.safetensors.reader import TensorReader
from loraq.stats import ActivationStats

#: Statistics by layer, by component.
StatsOfAll = Mapping[str, Mapping[str, ActivationStats]]


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


def quantize_files(
    origin: Origin,
    folder: Path,
    recipe: Recipe,
    settings: Settings,
    *,
    stats: StatsOfAll | None = None,
    progress: ProgressCallback | bool = True,
) -> Report:
    """Quantize checkpoints into a new folder, or finish what an interrupted run has begun.

    If a run has finished it, with the same settings and from the same numbers, nothing is done.

    Args:
        origin: one model, or several of a pipeline.
        folder: the folder to make.
        recipe: of all of them.
        settings: how the files are written.
        stats: statistics by component, where there are any.
        progress: as for `quantize_checkpoint`.

    Raises:
        CalibrationError: statistics are missing, do not fit, or are not used.
        CheckpointError: the source cannot be used, the folder cannot be written, or was begun with
            other settings.
        LayerError: a layer failed; the message names it. What is finished is kept.
        RecipeError: the recipe leaves nothing to quantize.
    """
    origin.require_layers()
    with explain_interrupt(folder, len(origin.plan.quantized)):
        reports = _quantize_files(origin, folder, recipe, settings, stats or {}, progress)
    return Report.join(reports, origin.notes)


def _quantize_files(
    origin: Origin,
    folder: Path,
    recipe: Recipe,
    settings: Settings,
    stats: StatsOfAll,
    progress: ProgressCallback | bool,
) -> dict[str, Report]:
    remove_leftovers(folder)
    target = Target.of(origin, settings.shard_bytes)
    is_there = not settings.restart and may_be_complete(folder, target)
    if not is_there:
        require_target(folder, overwrite=settings.overwrite)
        target.require_space(folder, link=settings.link)
    stats_hashes = _hash_stats(origin, stats, recipe)
    # Sharing a budget takes no more space.
    origin = share_from_files(origin, recipe, workers=settings.workers, progress=progress)
    target = Target.of(origin, settings.shard_bytes)
    if is_there:
        if complete := find_complete(folder, target, recipe, stats_hashes):
            return complete
        require_target(folder, overwrite=settings.overwrite)
        target.require_space(folder, link=settings.link)
    fingerprint, n_layers = target.fingerprint(recipe, stats_hashes), target.n_layers
    with resumable_folder(
        folder, fingerprint, n_layers, overwrite=settings.overwrite, restart=settings.restart
    ) as partial:
        journal = partial.journal
        target.allocate(partial.folder)
        desks = {
            part.component: _Desk.of(part, partial.folder, stats.get(part.component))
            for part in target.parts
        }
        checked = _hash_weights(origin)
        jobs = [
            job
            for part in target.parts
            for job in _list_open_jobs(
                part,
                checked[part.component],
                desks[part.component].writer,
                journal,
                stats_hashes[part.component],
            )
        ]
        # The longest first, so that workers end together.
        jobs.sort(key=lambda checked: -math.prod(checked.job.shape))
        n_kept = n_layers - len(jobs)
        components = target.write_kept(partial.folder, checked, link=settings.link)
        with show_layers(progress, "quantize") as show:
            # On an error all workers end first.
            with closing(run_jobs(_Worker(desks), jobs, settings.workers)) as entries:
                for done, entry in enumerate(entries, start=n_kept + 1):
                    journal.note(entry)
                    show(done, n_layers, entry["name"], entry["relative_error"])
        n_done = Counter(job.component for job in jobs)
        reports, written = {}, {}
        for part in target.parts:
            entries_of_part = _entries_of(part, journal)
            written[part.component] = {
                name: str(entry["written_sha256"]) for name, entry in entries_of_part.items()
            }
            n_kept = len(entries_of_part) - n_done[part.component]
            reports[part.component] = _report(recipe, part, entries_of_part, kept=n_kept)
        target.finish(partial.folder, reports, checked, written, components)
    return reports


def share_from_files(
    origin: Origin, recipe: Recipe, *, workers: int, progress: ProgressCallback | bool
) -> Origin:
    """Return an origin with the plans that a recipe's allocation makes of its weights.

    Each model shares its own budget, as it would alone. One weight is in memory for each worker.

    Raises:
        CheckpointError: a weight cannot be read.
        LayerError, RecipeError: as `share_budget`.
    """
    plans = {}
    for component, source in origin.sources.items():
        with name_component(component, len(origin.sources)):
            predict_all = _predict_all(source, workers)
            plans[component] = share_budget(source.plan, recipe, predict_all, progress)
    return origin.with_plans(plans)


def _predict_all(source: Source, workers: int) -> PredictAll:
    predict = PredictFromFile(source.reader)
    return lambda jobs: run_jobs(predict, jobs, workers)


def _hash_weights(origin: Origin) -> dict[str, dict[str, str]]:
    hashes = {}
    for component, source in origin.sources.items():
        with name_component(component, len(origin.sources)):
            hashes[component] = source.hash_weights()
    return hashes


def _hash_stats(origin: Origin, stats: StatsOfAll, recipe: Recipe) -> dict[str, dict[str, str]]:
    hashes = {}
    for component, source in origin.sources.items():
        with name_component(component, len(origin.sources)):
            hashes[component] = hash_used_stats(stats.get(component), source.plan, recipe)
    return hashes


@dataclass(frozen=True)
class _CheckedJob:
    """A job, and what its inputs must still be when it is done."""

    job: LayerJob
    component: str
    #: Of the layer in this run, where several models may have one of its name.
    name: str
    #: Hash of the weight when it was checked.
    source_sha256: str
    #: Hash of the statistics when they were checked; empty for none.
    stats_sha256: str


@dataclass(frozen=True)
class _Desk:
    """Where the layers of a model are read and written."""

    reader: TensorReader
    writer: LayerWriter
    stats: Mapping[str, ActivationStats] | None

    @classmethod
    def of(cls, part: Part, folder: Path, stats: Mapping[str, ActivationStats] | None) -> "_Desk":
        """Return that of a part of the target that grows in a folder."""
        writer = LayerWriter(part.layout, folder / part.component)
        return cls(part.source.reader, writer, stats)


@dataclass(frozen=True)
class _Worker:
    """Does any layer by itself: reads, solves, writes."""

    desks: Mapping[str, _Desk]

    def __call__(self, checked: _CheckedJob) -> dict[str, Any]:
        """Do a layer, and return its line for the journal once its bytes are on the disk."""
        job, desk = checked.job, self.desks[checked.component]
        matrices, stats = read_matrices(desk.reader, job), _read_stats(desk, checked)
        finished = quantize_layer(
            job,
            matrices,
            stats,
            stats_sha256=checked.stats_sha256,
            prefix=checked.name.removesuffix(job.name),
        )
        if finished.report.source_sha256 != checked.source_sha256:
            raise CheckpointError(
                f"The weight of layer '{checked.name}' changed while it was read. Do not modify "
                "the source during a run."
            )
        entry = asdict(finished.report)
        del entry["shape"], entry["scheme"]  # the plan has them
        return {**entry, "written_sha256": desk.writer.write(job.name, finished.packed)}


def _read_stats(desk: _Desk, checked: _CheckedJob) -> ActivationStats | None:
    if desk.stats is None or not checked.stats_sha256:
        return None
    stats = desk.stats[checked.job.name]
    if stats.sha256 != checked.stats_sha256:
        raise CalibrationError(
            f"The statistics of layer '{checked.name}' changed meanwhile. Do not modify their "
            "file during a run."
        )
    return stats


def _list_open_jobs(
    part: Part,
    checked: Mapping[str, str],
    writer: LayerWriter,
    journal: Journal,
    stats_hashes: Mapping[str, str],
) -> list[_CheckedJob]:
    """Return the layers of a part that are not done yet.

    Raises:
        CheckpointError: a weight is not what it was when its layer was done.
    """
    jobs = []
    for job in part.source.plan.quantized:
        name, source_sha256 = part.prefix + job.name, checked[job.weight_name]
        if entry := journal.layers.get(name):
            if entry["source_sha256"] != source_sha256:
                raise CheckpointError(
                    f"The weight of layer '{name}' is not what it was when the layer was "
                    "finished. Put the old source back to go on, or use `--restart` to begin anew."
                )
            if writer.hash_written(job) == entry["written_sha256"]:
                continue
        stats_sha256 = stats_hashes.get(job.name, "")
        jobs.append(_CheckedJob(job, part.component, name, source_sha256, stats_sha256))
    return jobs


def _entries_of(part: Part, journal: Journal) -> dict[str, dict[str, Any]]:
    """Return what the journal says of the layers of a part, by their names in their model."""
    return {job.name: journal.layers[part.prefix + job.name] for job in part.source.plan.quantized}


def _report(
    recipe: Recipe, part: Part, entries: Mapping[str, dict[str, Any]], *, kept: int
) -> Report:
    layers = []
    for job in part.source.plan.quantized:
        known = {key: value for key, value in entries[job.name].items() if key != "written_sha256"}
        layers.append(LayerReport(**known | {"name": job.name}, shape=job.shape, scheme=job.scheme))
    return Report(recipe, part.source.plan, tuple(layers), kept)
