"""What a worker does with a layer of a file: read, solve, write, note."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loraq.checkpoint.journal import Journal
from loraq.checkpoint.journals import open_own
from loraq.errors import CalibrationError, CheckpointError
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.layer import quantize_layer, read_matrices
from loraq.pipeline.part import LayerWriter, Part
from loraq.pipeline.report import LayerReport
from loraq.pipeline.tickets import Data, Place
from loraq.safetensors.reader import TensorReader
from loraq.stats import ActivationStats


@dataclass(frozen=True)
class Desk:
    """Where the layers of a model are read and written."""

    reader: TensorReader
    writer: LayerWriter
    jobs: Mapping[str, LayerJob]
    #: What the names of its layers begin with in messages and in the journal.
    prefix: str
    stats: Mapping[str, ActivationStats] | None

    @classmethod
    def of(cls, part: Part, folder: Path, stats: Mapping[str, ActivationStats] | None) -> "Desk":
        """Return that of a part of the target that grows in a folder."""
        writer = LayerWriter(part.layout, folder / part.component)
        jobs = {job.name: job for job in part.source.plan.quantized}
        return cls(part.source.reader, writer, jobs, part.prefix, stats)


@dataclass(frozen=True)
class LayerWork:
    """Does any layer of a run."""

    #: By component.
    desks: Mapping[str, Desk]
    #: Where each worker has a journal of its own; `None` if the leader does all and has one.
    journals: Path | None
    fingerprint: Mapping[str, Any]
    #: Where layers are solved: the workers of a machine take turns.
    devices: tuple[torch.device, ...]

    def open(self, place: Place) -> Callable[[Data], Data]:
        """Set a worker up."""
        do = partial(self._do, self.devices[place.local % len(self.devices)])
        if self.journals is None:
            return do
        own = open_own(self.journals, place.index, json.loads(json.dumps(self.fingerprint)))
        return lambda job: _note(own, do(job))

    def job_of(self, data: Data) -> LayerJob:
        """Return the layer that a job is about."""
        return self.desks[data["component"]].jobs[data["layer"]]

    def _do(self, device: torch.device, data: Data) -> Data:
        """Do a layer, and return its line for the journal once its bytes are on the disk.

        Args:
            device: where it is solved.
            data: what `describe_job` returned.
        """
        desk, job = self.desks[data["component"]], self.job_of(data)
        finished = quantize_layer(
            job,
            read_matrices(desk.reader, job),
            _read_stats(desk, data),
            stats_sha256=data["stats_sha256"],
            prefix=desk.prefix,
            device=device,
        )
        if finished.report.source_sha256 != data["source_sha256"]:
            raise CheckpointError(
                f"The weight of layer '{data['name']}' changed while it was read. Do not modify "
                "the source during a run."
            )
        written = desk.writer.write(job.name, finished.packed)
        return {**entry_of(finished.report), "written_sha256": written}


def describe_job(part: Part, job: LayerJob, source_sha256: str, stats_sha256: str) -> Data:
    """Return a job as plain data: which layer, and what its inputs must still be when it is done.

    Args:
        part: the model that it is of.
        job: the layer.
        source_sha256: hash of the weight when it was checked.
        stats_sha256: hash of the statistics when they were checked; "" for none.
    """
    return {
        "name": part.prefix + job.name,
        "component": part.component,
        "layer": job.name,
        "source_sha256": source_sha256,
        "stats_sha256": stats_sha256,
    }


def entry_of(report: LayerReport) -> dict[str, Any]:
    """Return a report as plain data, without what the plan has."""
    entry = asdict(report)
    del entry["shape"], entry["scheme"]
    return entry


def _note(journal: Journal, entry: Data) -> Data:
    journal.note(entry)
    return entry


def _read_stats(desk: Desk, data: Data) -> ActivationStats | None:
    if desk.stats is None or not data["stats_sha256"]:
        return None
    stats = desk.stats[data["layer"]]
    if stats.sha256 != data["stats_sha256"]:
        raise CalibrationError(
            f"The statistics of layer '{data['name']}' changed meanwhile. Do not modify their "
            "file during a run."
        )
    return stats
