"""Files to files: a checkpoint is quantized tensor by tensor, and the float model is never built.

Everything that can be wrong is found first: names and shapes, then one pass over all weights that
looks for NaN and takes their hashes. Then every layer is read, solved, written to its place, and
noted in the journal.
"""

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loraq.checkpoint.components import check_components
from loraq.checkpoint.journal import Journal
from loraq.checkpoint.partial import (
    explain_interrupt,
    remove_leftovers,
    require_target,
    resumable_folder,
)
from loraq.errors import CalibrationError, CheckpointError
from loraq.pipeline.complete import find_complete, may_be_complete
from loraq.pipeline.layer import quantize_layer, read_matrices
from loraq.pipeline.plan import LayerJob, Plan
from loraq.pipeline.progress import ProgressCallback, show_layers
from loraq.pipeline.report import LayerReport, Report
from loraq.pipeline.requirements import hash_used_stats
from loraq.pipeline.sharing import PredictFromFile, share_budget
from loraq.pipeline.source import Source
from loraq.pipeline.target import LayerWriter, Target
from loraq.pipeline.workers import run_jobs
from loraq.recipe import Recipe
from loraq.safetensors.layout import DEFAULT_SHARD_BYTES
from loraq.safetensors.reader import TensorReader
from loraq.stats import ActivationStats


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
    source: Source,
    folder: Path,
    recipe: Recipe,
    settings: Settings,
    *,
    stats: Mapping[str, ActivationStats] | None = None,
    progress: ProgressCallback | bool = True,
) -> Report:
    """Quantize a checkpoint into a new folder, or finish what an interrupted run has begun.

    If a run has finished it, with the same settings and from the same numbers, nothing is done.

    Raises:
        CalibrationError: statistics are missing, do not fit, or are not used.
        CheckpointError: the source cannot be used, the folder cannot be written, or was begun with
            other settings.
        LayerError: a layer failed; the message names it. What is finished is kept.
        RecipeError: the recipe leaves nothing to quantize.
    """
    source.require_layers()
    with explain_interrupt(folder, len(source.plan.quantized)):
        return _quantize_files(source, folder, recipe, settings, stats, progress)


def _quantize_files(
    source: Source,
    folder: Path,
    recipe: Recipe,
    settings: Settings,
    stats: Mapping[str, ActivationStats] | None,
    progress: ProgressCallback | bool,
) -> Report:
    remove_leftovers(folder)
    target = Target.of(source, settings.shard_bytes)
    is_there = not settings.restart and may_be_complete(folder, target)
    if not is_there:
        require_target(folder, overwrite=settings.overwrite)
        target.require_space(folder, link=settings.link)
    stats_hashes = hash_used_stats(stats, source.plan, recipe)
    # Sharing a budget takes no more space.
    plan = share_from_files(source, recipe, workers=settings.workers, progress=progress)
    source = replace(source, plan=plan)
    target = Target.of(source, settings.shard_bytes)
    if is_there:
        if complete := find_complete(folder, target, recipe, stats_hashes):
            return complete
        require_target(folder, overwrite=settings.overwrite)
        target.require_space(folder, link=settings.link)
    fingerprint, n_layers = target.fingerprint(recipe, stats_hashes), len(plan.quantized)
    with resumable_folder(
        folder, fingerprint, n_layers, overwrite=settings.overwrite, restart=settings.restart
    ) as partial:
        journal, shards = partial.journal, partial.folder / source.component
        shards.mkdir(exist_ok=True)
        target.layout.allocate(shards)
        worker = _Worker(source.reader, LayerWriter(target.layout, shards), stats)
        checked = source.hash_weights()
        jobs = _list_open_jobs(source, checked, worker.writer, journal, stats_hashes)
        n_kept = n_layers - len(jobs)
        components = target.write_kept(partial.folder, checked, link=settings.link)
        with show_layers(progress, "quantize") as show:
            # On an error all workers end first.
            with closing(run_jobs(worker, jobs, settings.workers)) as entries:
                for done, entry in enumerate(entries, start=n_kept + 1):
                    journal.note(entry)
                    show(done, n_layers, entry["name"], entry["relative_error"])
        report = _report(recipe, plan, journal.layers, kept=n_kept)
        written = {name: str(e["written_sha256"]) for name, e in journal.layers.items()}
        target.remove_strays(partial.folder)
        files = target.hash_shards(partial.folder, checked, written)
        check_components(partial.folder, components)
        target.write_manifest(partial.folder, report, files, components)
    return report


def share_from_files(
    source: Source, recipe: Recipe, *, workers: int, progress: ProgressCallback | bool
) -> Plan:
    """Return the plan that a recipe's allocation makes of a checkpoint's weights.

    One weight is in memory for each worker.

    Raises:
        CheckpointError: a weight cannot be read.
        LayerError, RecipeError: as `share_budget`.
    """
    predict = PredictFromFile(source.reader)
    return share_budget(
        source.plan, recipe, lambda jobs: run_jobs(predict, jobs, workers), progress
    )


@dataclass(frozen=True)
class _CheckedJob:
    """A job, and what its inputs must still be when it is done."""

    job: LayerJob
    #: Hash of the weight when it was checked.
    source_sha256: str
    #: Hash of the statistics when they were checked; empty for none.
    stats_sha256: str

    @property
    def name(self) -> str:
        return self.job.name


@dataclass(frozen=True)
class _Worker:
    """Does any layer by itself: reads, solves, writes."""

    reader: TensorReader
    writer: LayerWriter
    stats: Mapping[str, ActivationStats] | None

    def __call__(self, checked: _CheckedJob) -> dict[str, Any]:
        """Do a layer, and return its line for the journal once its bytes are on the disk."""
        job = checked.job
        matrices, stats = read_matrices(self.reader, job), self._read_stats(checked)
        finished = quantize_layer(job, matrices, stats, stats_sha256=checked.stats_sha256)
        if finished.report.source_sha256 != checked.source_sha256:
            raise CheckpointError(
                f"The weight of layer '{job.name}' changed while it was read. Do not modify the "
                "source during a run."
            )
        entry = asdict(finished.report)
        del entry["shape"], entry["scheme"]  # the plan has them
        return {**entry, "written_sha256": self.writer.write(job.name, finished.packed)}

    def _read_stats(self, checked: _CheckedJob) -> ActivationStats | None:
        if self.stats is None or not checked.stats_sha256:
            return None
        stats = self.stats[checked.name]
        if stats.sha256 != checked.stats_sha256:
            raise CalibrationError(
                f"The statistics of layer '{checked.name}' changed meanwhile. Do not modify their "
                "file during a run."
            )
        return stats


def _list_open_jobs(
    source: Source,
    checked: Mapping[str, str],
    writer: LayerWriter,
    journal: Journal,
    stats_hashes: Mapping[str, str],
) -> list[_CheckedJob]:
    """Return the layers that are not done yet, the longest first, so that workers end together.

    Raises:
        CheckpointError: a weight is not what it was when its layer was done.
    """
    jobs = []
    for job in source.plan.quantized:
        source_sha256 = checked[job.weight_name]
        if entry := journal.layers.get(job.name):
            if entry["source_sha256"] != source_sha256:
                raise CheckpointError(
                    f"The weight of layer '{job.name}' is not what it was when the layer was "
                    "finished. Put the old source back to go on, or use `--restart` to begin anew."
                )
            if writer.hash_written(job) == entry["written_sha256"]:
                continue
        jobs.append(_CheckedJob(job, source_sha256, stats_hashes.get(job.name, "")))
    return sorted(jobs, key=lambda checked: -math.prod(checked.job.shape))


def _report(
    recipe: Recipe, plan: Plan, entries: Mapping[str, dict[str, Any]], *, kept: int
) -> Report:
    layers = []
    for job in plan.quantized:
        entry = {key: value for key, value in entries[job.name].items() if key != "written_sha256"}
        layers.append(LayerReport(shape=job.shape, scheme=job.scheme, **entry))
    return Report(recipe, plan, tuple(layers), kept)
