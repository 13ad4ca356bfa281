"""Files to files: checkpoints are quantized tensor by tensor, and no float model is ever built.

Everything that can be wrong is found first: names and shapes, then one pass over all weights that
looks for NaN and takes their hashes. Then every layer is read, solved, written to its place, and
noted in the journal. The layers of several models are one list, and their folder is one target.
"""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loraq import disk
from loraq.checkpoint.journal import Journal, describe_change
from loraq.checkpoint.partial import (
    explain_interrupt,
    remove_leftovers,
    require_target,
    resumable_folder,
    work_folders,
)
from loraq.errors import CheckpointError
from loraq.pipeline.complete import find_complete, may_be_complete
from loraq.pipeline.estimate import describe_run
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.part import Part
from loraq.pipeline.progress import ProgressCallback, show_layers, show_line
from loraq.pipeline.ranks import Ranks
from loraq.pipeline.report import LayerReport, Report
from loraq.pipeline.requirements import hash_used_stats
from loraq.pipeline.sharing import predict_from_file, share_budget
from loraq.pipeline.source import Origin, name_component
from loraq.pipeline.target import Target
from loraq.pipeline.tickets import Data
from loraq.pipeline.worker import Desk, LayerWork, describe_job, entry_of
from loraq.recipe import Recipe
from loraq.safetensors.layout import DEFAULT_SHARD_BYTES
from loraq.stats import ActivationStats

#: Statistics by layer, by component.
StatsOfAll = Mapping[str, Mapping[str, ActivationStats]]


@dataclass(frozen=True)
class Settings:
    """Who writes the files, where and how; of this only the kind of device changes a number."""

    #: Who shares the work; each of them calls this, and gets the same.
    ranks: Ranks = field(default_factory=Ranks)
    #: Where layers are solved; the kind of these decides bytes.
    devices: tuple[torch.device, ...] = (torch.device("cpu"),)
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
        settings: who writes the files, and how.
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
    stats, ranks = stats or {}, settings.ranks
    if ranks.leads:
        with explain_interrupt(folder, len(origin.plan.quantized)):
            reports = _quantize_files(origin, folder, recipe, settings, stats, progress)
        for component, report in reports.items():
            entries = [entry_of(layer) for layer in report.layers]
            told = (report.kept, report.already_complete, entries)
            ranks.broadcast(f"report of {component}", told)
    else:
        reports = _help(origin, folder, recipe, settings, stats)
    return Report.join(reports, origin.notes)


def _quantize_files(
    origin: Origin,
    folder: Path,
    recipe: Recipe,
    settings: Settings,
    stats: StatsOfAll,
    progress: ProgressCallback | bool,
) -> dict[str, Report]:
    """Lead a run."""
    ranks = settings.ranks
    remove_leftovers(folder)
    target = Target.of(origin, settings.shard_bytes, settings.devices)
    is_there = not settings.restart and may_be_complete(folder, target)
    if not is_there:
        require_target(folder, overwrite=settings.overwrite)
        target.require_space(folder, link=settings.link)
    stats_hashes = _hash_stats(origin, stats, recipe)
    # Sharing a budget takes no more space.
    origin = share_from_files(origin, recipe, ranks=ranks, progress=progress)
    target = Target.of(origin, settings.shard_bytes, settings.devices)
    if is_there:
        if complete := find_complete(folder, target, recipe, stats_hashes):
            ranks.broadcast("layout", None)
            return complete
        require_target(folder, overwrite=settings.overwrite)
        target.require_space(folder, link=settings.link)
    fingerprint, n_layers = target.fingerprint(recipe, stats_hashes), target.n_layers
    with resumable_folder(
        folder, fingerprint, n_layers, overwrite=settings.overwrite, restart=settings.restart
    ) as place:
        journal = place.journal
        target.allocate(place.folder)
        work = _work_of(target, folder, fingerprint, stats, settings)
        checked = _hash_weights(origin)
        jobs = [
            job
            for part in target.parts
            for job in _list_open_jobs(
                part,
                checked[part.component],
                work.desks[part.component],
                journal,
                stats_hashes[part.component],
            )
        ]
        # The longest first, so that workers end together.
        jobs.sort(key=lambda job: -work.job_of(job).cost)
        costs = [work.job_of(job).cost for job in jobs]
        n_kept = n_layers - len(jobs)
        components = target.write_kept(place.folder, checked, link=settings.link)
        if ranks.size > 1:
            disk.sync_tree(place.folder)  # other hosts write beside what is there
        ranks.broadcast("layout", fingerprint)
        if progress is True and jobs:
            show_line("quantize", _describe_run([work.job_of(job) for job in jobs], settings))
        with show_layers(progress, "quantize", costs) as show:
            # On an error all workers end first.
            with closing(ranks.run(work, jobs)) as entries:
                for done, entry in enumerate(entries, start=n_kept + 1):
                    journal.note(entry)
                    show(done, n_layers, entry["name"], entry["relative_error"])
        n_done = Counter(job["component"] for job in jobs)
        reports, written = {}, {}
        for part in target.parts:
            entries_of_part = _entries_of(part, journal)
            written[part.component] = {
                name: str(entry["written_sha256"]) for name, entry in entries_of_part.items()
            }
            n_kept = len(entries_of_part) - n_done[part.component]
            reports[part.component] = _report(recipe, part, entries_of_part, kept=n_kept)
        target.finish(place.folder, reports, checked, written, components)
    return reports


def _describe_run(jobs: list[LayerJob], settings: Settings) -> str:
    ranks = settings.ranks
    described = describe_run(
        jobs, settings.devices, max(ranks.size, ranks.workers, 1), leads=ranks.workers > 0
    )
    return f"{len(jobs)} layers, {described}"


def _help(
    origin: Origin,
    folder: Path,
    recipe: Recipe,
    settings: Settings,
    stats: StatsOfAll,
) -> dict[str, Report]:
    """Do layers of a run that another rank leads, and return what it returns.

    Raises:
        CheckpointError: this rank would make other bytes than the leader.
    """
    ranks, stats_hashes = settings.ranks, _hash_stats(origin, stats, recipe)
    origin = share_from_files(origin, recipe, ranks=ranks, progress=False)
    target = Target.of(origin, settings.shard_bytes, settings.devices)
    theirs = ranks.broadcast("layout")
    if theirs is not None:
        ours = json.loads(json.dumps(target.fingerprint(recipe, stats_hashes)))
        if ours != theirs:
            raise CheckpointError(
                f"Rank {ranks.rank} would not make the bytes that rank 0 makes. There and here: "
                f"{describe_change(theirs, ours)}. All ranks need the same source, settings, "
                "versions and kind of processor."
            )
        for _ in ranks.run(_work_of(target, folder, ours, stats, settings)):
            pass
    reports = {}
    for part in target.parts:
        kept, complete, entries = ranks.broadcast(f"report of {part.component}")
        by_name = {entry["name"].removeprefix(part.prefix): entry for entry in entries}
        report = _report(recipe, part, by_name, kept=kept)
        reports[part.component] = replace(report, already_complete=complete)
    return reports


def _work_of(
    target: Target,
    folder: Path,
    fingerprint: Mapping[str, Any],
    stats: StatsOfAll,
    settings: Settings,
) -> LayerWork:
    """Return what a worker of a run does."""
    files, journals = work_folders(folder)
    desks = {
        part.component: Desk.of(
            part, files, stats.get(part.component), shared=settings.ranks.size > 1
        )
        for part in target.parts
    }
    is_alone = settings.ranks.board is None
    return LayerWork(desks, None if is_alone else journals, fingerprint, settings.devices)


def share_from_files(
    origin: Origin, recipe: Recipe, *, ranks: Ranks, progress: ProgressCallback | bool
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
            predict_all = partial(predict_from_file, source.reader, ranks=ranks)
            plans[component] = share_budget(source.plan, recipe, predict_all, progress)
    return origin.with_plans(plans)


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


def _list_open_jobs(
    part: Part,
    checked: Mapping[str, str],
    desk: Desk,
    journal: Journal,
    stats_hashes: Mapping[str, str],
) -> list[Data]:
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
            if desk.writer.hash_written(job) == entry["written_sha256"]:
                continue
        stats_sha256 = stats_hashes.get(job.name, "")
        jobs.append(describe_job(part, job, source_sha256, stats_sha256))
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
