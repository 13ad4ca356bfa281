"""Whether a folder already holds what a run would make: then the command that made it is done."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loraq.checkpoint.components import check_components, hash_components
from loraq.checkpoint.manifest import FILE_NAME, Manifest, list_files
from loraq.errors import CheckpointError
from loraq.json_files import read_json
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.layer import hash_tensor
from loraq.pipeline.part import Part
from loraq.pipeline.report import LayerReport, Report
from loraq.pipeline.target import Hashes, Target, list_siblings
from loraq.recipe import Recipe
from loraq.safetensors.header import TensorSpec
from loraq.safetensors.reader import ShardReader
from loraq.version import __version__


def may_be_complete(folder: Path, target: Target) -> bool:
    """Return whether a folder is worth a closer look: a run has ended there."""
    return all((folder / part.component / FILE_NAME).is_file() for part in target.parts)


def find_complete(
    folder: Path, target: Target, recipe: Recipe, stats_hashes: Hashes
) -> dict[str, Report] | None:
    """Return the reports of a folder that is whole and was made as a run would make it.

    Everything is compared that decides its bytes, the numbers of the source too; so this reads
    source and folder once, if the settings are the same.

    Args:
        folder: what the run is to make.
        target: how the run would lay it out.
        recipe: of the run.
        stats_hashes: of the statistics that the run would use, by component and layer.

    Returns:
        The reports by component, or `None` if there is no such folder or anything differs.
    """
    reports, manifests = {}, {}
    try:
        if not all(_has_settings(folder, part, recipe) for part in target.parts):
            return None
        for part in target.parts:
            manifest = Manifest.read(folder / part.component)
            jobs, hashes = part.source.plan.quantized, stats_hashes[part.component]
            layers = tuple(
                _find_report(manifest, job, hashes, target.machine["device"]) for job in jobs
            )
            if not _has_numbers(folder / part.component, part, manifest):
                return None
            report = Report(recipe, part.source.plan, layers, len(layers), already_complete=True)
            reports[part.component], manifests[part.component] = report, manifest
        if not _has_others(folder, target, manifests):
            return None
    except (CheckpointError, KeyError, TypeError):
        return None  # damaged, or of another program
    return reports


def _has_settings(folder: Path, part: Part, recipe: Recipe) -> bool:
    """Return whether a manifest and a configuration say what the run would say."""
    home, config = folder / part.component, part.source.config
    content = read_json(home / FILE_NAME)
    schemes = {job.name: job.scheme for job in part.source.plan.quantized}
    manifest = Manifest.read(home, verify=False)
    files = {path.name: path.stat().st_size for path in home.glob("*.safetensors")}
    return (
        content.get("versions") == {"loraq": __version__, "torch": torch.__version__}
        and manifest.recipes == [json.loads(json.dumps(recipe.to_dict()))]
        and {name: layer.scheme for name, layer in manifest.layers.items()} == schemes
        and manifest.tied == part.find_ties()
        and files == part.layout.sizes
        and (not config or read_json(home / "config.json") == json.loads(json.dumps(config)))
    )


def _has_numbers(home: Path, part: Part, manifest: Manifest) -> bool:
    """Return whether a folder was made from the numbers that the source has now."""
    source, stored = part.source, ShardReader(home)
    # The headers first: the same bytes are other numbers in another dtype.
    made = {name: TensorSpec(stored.dtype(name), stored.shape(name)) for name in stored.names}
    if made != part.layout.specs:
        return False
    hashes = source.hash_weights()
    weights = {job.name: job.weight_name for job in source.plan.quantized}
    return all(
        layer.record["source_sha256"] == hashes[weights[name]]
        and layer.record["source_dtype"] == source.reader.dtype(weights[name])
        for name, layer in manifest.layers.items()
    ) and all(hash_tensor(stored.read(name)) == hashes[name] for name in part.kept_names())


def _has_others(folder: Path, target: Target, manifests: Mapping[str, Manifest]) -> bool:
    """Return whether the rest of the pipeline is what the source has now."""
    others = hash_components(target.others)
    check_components(folder, others)
    files = {component: list_files(folder / component) for component in manifests}
    return all(
        manifest.components == others | list_siblings(files, component)
        for component, manifest in manifests.items()
    )


def _find_report(
    manifest: Manifest, job: LayerJob, stats_hashes: Mapping[str, str], device: str
) -> LayerReport:
    """Return the report of a layer; raises `KeyError` if it was made otherwise."""
    record: dict[str, Any] = manifest.layers[job.name].record
    if record.get("stats_sha256", "") != stats_hashes.get(job.name, ""):
        raise KeyError("stats_sha256")
    if record.get("device") != device:
        raise KeyError("device")
    if "absorbed" in record:
        raise KeyError("absorbed")
    error = record["relative_error"]
    return LayerReport(
        name=job.name,
        shape=job.shape,
        scheme=job.scheme,
        relative_error=error,
        sqnr_db=-20 * math.log10(error) if error else math.inf,
        bits_per_weight=record["bits_per_weight"],
        nbytes=record["nbytes"],
        seconds=0.0,
        source_sha256=record["source_sha256"],
        source_dtype=record["source_dtype"],
        stats_sha256=record.get("stats_sha256", ""),
        output_error=record.get("output_error"),
        kept=job.is_kept,
        unsmoothed=bool(record.get("unsmoothed")),
        device=device,
    )
