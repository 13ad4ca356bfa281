"""What is written: where every byte of the quantized folder goes, and how it gets there."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loraq.checkpoint.components import StoredFile, copy_components
from loraq.checkpoint.folder import require_space
from loraq.checkpoint.manifest import Manifest, StoredLayer
from loraq.checkpoint.model import weights_stem
from loraq.checkpoint.partial import partial_path
from loraq.errors import CheckpointError
from loraq.json_files import write_json
from loraq.packed import PackedWeight
from loraq.pipeline.machine import describe_machine
from loraq.pipeline.plan import LayerJob
from loraq.pipeline.report import Report
from loraq.pipeline.source import Source
from loraq.recipe import Recipe
from loraq.safetensors.header import TensorSpec
from loraq.safetensors.layout import ShardLayout, tensor_bytes
from loraq.version import __version__


@dataclass(frozen=True)
class LayerWriter:
    """Writes layers to their places; a worker process gets one of its own."""

    layout: ShardLayout
    folder: Path

    def write(self, name: str, packed: PackedWeight) -> str:
        """Write a layer, and return the hash of its parts once they are on the disk."""
        tensors = {f"{name}.{part}": tensor for part, tensor in packed.tensors.items()}
        self.layout.write(self.folder, tensors, sync=True)
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
class Target:
    """The quantized folder that a source becomes."""

    source: Source
    layout: ShardLayout

    @classmethod
    def of(cls, source: Source, shard_bytes: int) -> "Target":
        """Lay out every tensor, in the order in which `save` would write the model."""
        layers = {f"{job.name}.weight": job for job in source.plan.quantized}
        specs = {}
        for name in source.names:
            if job := layers.get(name):
                for part, shape in job.scheme.storage(job.shape).items():
                    specs[f"{job.name}.{part}"] = TensorSpec("U8", shape)
            else:
                specs[name] = TensorSpec(source.reader.dtype(name), source.reader.shape(name))
        return cls(source, ShardLayout.of(specs, weights_stem(source.config), shard_bytes))

    def fingerprint(self, recipe: Recipe, stats_hashes: Mapping[str, str]) -> dict[str, Any]:
        """Return all that decides the target's bytes but the weights, which have hashes."""
        source = self.source
        return {
            "recipe": recipe.to_dict(),
            "source": {
                name: f"{header.file_bytes} bytes, header {header.sha256[:16]}"
                for name, header in source.files.files.items()
            },
            "layout": f"{len(self.layout.files)} files, headers {self.layout.sha256[:16]}",
            "schemes": {job.name: asdict(job.scheme) for job in source.plan.quantized},
            "configuration": source.config,
            "versions": {"loraq": __version__, "torch": torch.__version__},
            "machine": describe_machine(),
            "statistics": {name: digest[:16] for name, digest in stats_hashes.items()},
        }

    def require_space(self, target: Path, *, link: bool) -> None:
        """Raise `CheckpointError` if the disk of the target cannot hold what will be written.

        Args:
            target: the folder to make.
            link: whether the other components are hard links instead of copies.
        """
        others = self.source.others.values()
        needed = self.layout.nbytes + sum(0 if link else path.stat().st_size for path in others)
        for path in partial_path(target).rglob("*"):
            needed -= path.stat().st_size if path.is_file() else 0
        require_space(target, needed, linked=others if link else ())

    def write_kept(
        self, folder: Path, checked: Mapping[str, str], *, link: bool
    ) -> dict[str, StoredFile]:
        """Write all that is not quantized: other components, and the tensors of the model.

        Args:
            folder: where the target grows; its shards are allocated.
            checked: what `Source.hash_weights` returned.
            link: whether the other components are hard links instead of copies.

        Returns:
            What the files of the other components hold.

        Raises:
            CheckpointError: a tensor is not what was checked, or a file cannot be read.
        """
        self.remove_strays(folder)
        components = copy_components(self.source.others, folder, link=link)
        for name in self.kept_names():
            tensor = self.source.read_checked(name, checked[name])
            self.layout.write(folder / self.source.component, {name: tensor})
        return components

    def hash_shards(
        self, folder: Path, checked: Mapping[str, str], layers: Mapping[str, str]
    ) -> dict[str, str]:
        """Read what was written once more, and return the SHA-256 of every file.

        Args:
            folder: where the target has grown.
            checked: what `Source.hash_weights` returned.
            layers: by the name of each layer what `LayerWriter.write` returned.

        Raises:
            CheckpointError: a tensor is not what was checked, or a layer not what was solved.
        """
        files, tensors = self.layout.hash_files(folder / self.source.component)
        wrong = [name for name in self.kept_names() if tensors[name] != checked[name]]
        for job in self.source.plan.quantized:
            if _join(tensors[part] for part in _parts_of(job)) != layers[job.name]:
                wrong.append(job.name)
        if wrong:
            raise CheckpointError(
                f"'{folder}' does not hold what was written to it: something else has changed "
                f"{', '.join(wrong[:6])}. Run the same command again."
            )
        return files

    def write_manifest(
        self,
        folder: Path,
        report: Report,
        files: Mapping[str, str],
        components: Mapping[str, StoredFile],
    ) -> None:
        """Write what stands beside the shards: `config.json` and `loraq.json`, as `save` does.

        Args:
            folder: where the target has grown.
            report: what became of the layers.
            files: what `hash_shards` returned.
            components: what `write_kept` returned.
        """
        folder, files = folder / self.source.component, dict(files)
        if self.source.config:
            raw = write_json(folder / "config.json", self.source.config)
            files["config.json"] = hashlib.sha256(raw).hexdigest()
        stored = {
            layer.name: StoredLayer(layer.shape, layer.scheme, {**layer.record(), "recipe": 0})
            for layer in report.layers
        }
        recipes = [report.recipe.to_dict()]
        Manifest(stored, recipes, self.find_ties(), dict(components)).write(folder, files)

    def remove_strays(self, folder: Path) -> None:
        """Remove all that is not the target's: what an earlier run has copied, or anybody else."""
        home = folder / self.source.component
        ours = {home / name for name in self.layout.files}
        ours |= {folder / name for name in self.source.others}
        ours |= {parent for path in (home / "any", *ours) for parent in path.parents}
        for parent, inner, files in os.walk(folder, topdown=False):
            for path in (Path(parent, name) for name in (*inner, *files)):
                if path in ours and not path.is_symlink():
                    continue
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink()

    def kept_names(self) -> list[str]:
        """Return the names of the tensors that stay as they are."""
        return [name for name in self.source.names if name in self.layout.specs]

    def find_ties(self) -> dict[str, str]:
        """Return the ties: a layer that stands in two places shares all that is stored of it."""
        layers = {f"{job.name}.weight": job for job in self.source.plan.quantized}
        tied: dict[str, str] = {}
        for name, first in self.source.tied.items():
            if job := layers.get(first):
                other = name.removesuffix(".weight")
                parts = job.scheme.storage(job.shape)
                tied |= {f"{other}.{part}": f"{job.name}.{part}" for part in parts}
            else:
                tied[name] = first
        return tied


def _parts_of(job: LayerJob) -> list[str]:
    """Return the names of a layer's tensors, in the order in which they are stored."""
    return [f"{job.name}.{part}" for part in job.scheme.storage(job.shape)]


def _join(hashes: Iterable[str]) -> str:
    """Return one hash for the hashes of a layer's tensors."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
