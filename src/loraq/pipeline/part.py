"""What is written of one model: where every byte of its folder goes, and how it gets there."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraq.checkpoint.components import StoredFile
from loraq.checkpoint.configuration import GENERATION_FILE, weights_stem
from loraq.checkpoint.manifest import Manifest, StoredLayer
from loraq.errors import CheckpointError
from loraq.json_files import write_json
from loraq.packed import PackedStack, PackedWeight
from loraq.pipeline.jobs import LayerJob
from loraq.pipeline.report import Report
from loraq.pipeline.source import Source
from loraq.safetensors.header import TensorSpec
from loraq.safetensors.layout import ShardLayout, tensor_bytes


@dataclass(frozen=True)
class LayerWriter:
    """Writes layers to their places; a worker process gets one of its own."""

    layout: ShardLayout
    folder: Path
    #: Whether other hosts may write to the same files.
    shared: bool = False

    def write(self, name: str, packed: PackedWeight | PackedStack) -> str:
        """Write a layer, and return the hash of its parts once they are on the disk."""
        tensors = {f"{name}.{part}": tensor for part, tensor in packed.tensors.items()}
        self.layout.write(self.folder, tensors, sync=True, direct=self.shared)
        return _join(hashlib.sha256(tensor_bytes(t)).hexdigest() for t in tensors.values())

    def hash_written(self, job: LayerJob) -> str:
        """Return the hash of what stands in a layer's places; "" if a file does not have them."""
        hashes = []
        for name in _parts_of(job):
            file, offset = self.layout.locations[name]
            if not (self.folder / file).is_file():
                return ""
            with (self.folder / file).open("rb") as shard:
                shard.seek(offset)
                content = shard.read(self.layout.specs[name].nbytes)
            hashes.append(hashlib.sha256(content).hexdigest())
        return _join(hashes)


@dataclass(frozen=True)
class Part:
    """The folder of one quantized model in the target, or the target itself."""

    #: Name of its folder in a pipeline; "" for a model that stands alone.
    component: str
    source: Source
    layout: ShardLayout
    #: What its layers' names begin with, to tell them from those of another model.
    prefix: str = ""

    @classmethod
    def of(cls, component: str, source: Source, shard_bytes: int, prefix: str = "") -> "Part":
        """Lay out every tensor, in the order in which `save` would write the model."""
        layers = {job.weight_name: job for job in source.plan.quantized}
        specs = {}
        for name in _in_order(source.names, [job.name for job in layers.values() if job.is_stack]):
            if job := layers.get(name):
                for part, shape in job.scheme.storage(job.shape).items():
                    specs[f"{job.name}.{part}"] = TensorSpec("U8", shape)
            else:
                specs[name] = TensorSpec(source.reader.dtype(name), source.reader.shape(name))
        layout = ShardLayout.of(specs, weights_stem(source.config), shard_bytes)
        return cls(component, source, layout, prefix)

    def fingerprint(self, stats_hashes: Mapping[str, str]) -> dict[str, Any]:
        """Return all that decides the folder's bytes but recipe and weights, which have hashes."""
        source = self.source
        return {
            "source": {
                name: f"{header.file_bytes} bytes, header {header.sha256[:16]}"
                for name, header in source.files.files.items()
            },
            "layout": f"{len(self.layout.files)} files, headers {self.layout.sha256[:16]}",
            "schemes": {job.name: job.scheme.to_dict() for job in source.plan.quantized},
            "configuration": source.config,
            "statistics": {name: digest[:16] for name, digest in stats_hashes.items()},
        }

    def write_kept(self, folder: Path, checked: Mapping[str, str]) -> None:
        """Write the tensors that are not quantized.

        Args:
            folder: where the target grows; the shards are allocated.
            checked: what `Source.hash_weights` returned.

        Raises:
            CheckpointError: a tensor is not what was checked.
        """
        for name in self.kept_names():
            tensor = self.source.read_checked(name, checked[name])
            self.layout.write(folder / self.component, {name: tensor})

    def finish_files(
        self, folder: Path, checked: Mapping[str, str], layers: Mapping[str, str]
    ) -> dict[str, StoredFile]:
        """Read what was written once more, and write the configuration beside it.

        Args:
            folder: where the target has grown.
            checked: what `Source.hash_weights` returned.
            layers: by the name of each layer what `LayerWriter.write` returned.

        Returns:
            What every file of the model holds, but for its manifest.

        Raises:
            CheckpointError: a tensor is not what was checked, or a layer not what was solved.
        """
        home = folder / self.component
        hashes, tensors = self.layout.hash_files(home)
        wrong = [name for name in self.kept_names() if tensors[name] != checked[name]]
        for job in self.source.plan.quantized:
            if _join(tensors[part] for part in _parts_of(job)) != layers[job.name]:
                wrong.append(job.name)
        if wrong:
            raise CheckpointError(
                f"'{folder}' does not hold what was written to it: something else has changed "
                f"{', '.join(self.prefix + name for name in wrong[:6])}. Run the same command "
                "again."
            )
        if self.source.config:
            raw = write_json(home / "config.json", self.source.config)
            hashes["config.json"] = hashlib.sha256(raw).hexdigest()
        if self.source.generation:
            write_json(home / GENERATION_FILE, self.source.generation)
        return {
            name: StoredFile((home / name).stat().st_size, sha256)
            for name, sha256 in hashes.items()
        }

    def write_manifest(
        self,
        folder: Path,
        report: Report,
        files: Mapping[str, StoredFile],
        components: Mapping[str, StoredFile],
    ) -> None:
        """Write `loraq.json`, as `save` does.

        Args:
            folder: where the target has grown.
            report: what became of the layers.
            files: what `finish_files` returned.
            components: the other files of the pipeline.
        """
        transposed = {job.name for job in self.source.plan.quantized if job.transposed}
        stored = {
            layer.name: StoredLayer(
                layer.shape,
                layer.scheme,
                {**layer.record(), "recipe": 0},
                layer.name in transposed,
            )
            for layer in report.layers
        }
        manifest = Manifest(stored, [report.recipe.to_dict()], self.find_ties(), dict(components))
        manifest.write(folder / self.component, {name: f.sha256 for name, f in files.items()})

    def list_files(self) -> list[str]:
        """Return the paths of its shards in the target."""
        return [str(Path(self.component, name)) for name in self.layout.files]

    def kept_names(self) -> list[str]:
        """Return the names of the tensors that stay as they are."""
        return [name for name in self.source.names if name in self.layout.specs]

    def find_ties(self) -> dict[str, str]:
        """Return the ties: a layer that stands in two places shares all that is stored of it."""
        layers = {job.weight_name: job for job in self.source.plan.quantized}
        tied: dict[str, str] = {}
        for name, first in self.source.tied.items():
            if job := layers.get(first):
                other = name if job.is_stack else name.removesuffix(".weight")
                parts = job.scheme.storage(job.shape)
                tied |= {f"{other}.{part}": f"{job.name}.{part}" for part in parts}
            else:
                tied[name] = first
        return tied


def _in_order(names: Sequence[str], stacks: Sequence[str]) -> list[str]:
    """Return the names of a float model's tensors in the order of the quantized one.

    A stack of experts is one of its module's own tensors, and becomes the last module in it.

    Args:
        names: in the order of the float model.
        stacks: those of stacks, in the order of the quantized model.
    """
    moved = set(stacks)
    ordered = [name for name in names if name not in moved]
    for stack in stacks:
        owner, dot, _ = stack.rpartition(".")
        before = [name for name in ordered if name.startswith(owner + dot)]
        if not before:  # the module has no other tensor: it keeps its place
            before = [name for name in names[: names.index(stack)] if name in ordered]
        ordered.insert(ordered.index(before[-1]) + 1 if before else 0, stack)
    return ordered


def _parts_of(job: LayerJob) -> list[str]:
    """Return the names of a layer's tensors, in the order in which they are stored."""
    return [f"{job.name}.{part}" for part in job.scheme.storage(job.shape)]


def _join(hashes: Iterable[str]) -> str:
    """Return one hash for the hashes of a layer's tensors."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
