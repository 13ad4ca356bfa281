"""What is written: the quantized folder as a whole, be it one model or a pipeline with several."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraq.checkpoint.components import StoredFile, check_components, copy_components
from loraq.checkpoint.folder import require_space
from loraq.checkpoint.partial import partial_path
from loraq.pipeline.machine import describe_machine
from loraq.pipeline.part import Part
from loraq.pipeline.report import Report
from loraq.pipeline.source import Origin
from loraq.recipe import Recipe
from loraq.version import __version__

#: Something of every component, by its name; "" is that of a model that stands alone.
Hashes = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Target:
    """The quantized folder that an origin becomes."""

    #: The models that are quantized.
    parts: tuple[Part, ...]
    #: Files to copy, by their path in the target: the rest of a pipeline.
    others: Mapping[str, Path]
    #: What decides its bytes besides the source and the recipe; see `describe_machine`.
    machine: Mapping[str, str]

    @classmethod
    def of(cls, origin: Origin, shard_bytes: int, devices: tuple[torch.device, ...]) -> "Target":
        """Lay out every tensor of every model, whose layers are solved on these devices."""
        several = len(origin.sources) > 1
        parts = (
            Part.of(component, source, shard_bytes, f"{component}/" if several else "")
            for component, source in origin.sources.items()
        )
        return cls(tuple(parts), origin.others, describe_machine(devices))

    @property
    def n_layers(self) -> int:
        """How many layers are quantized."""
        return sum(len(part.source.plan.quantized) for part in self.parts)

    def fingerprint(self, recipe: Recipe, stats_hashes: Hashes) -> dict[str, Any]:
        """Return all that decides the target's bytes but the weights, which have hashes."""
        prints = {
            part.component: part.fingerprint(stats_hashes[part.component]) for part in self.parts
        }
        joined, *more = prints.values()
        if more:
            joined = {
                topic: {name: each[topic] for name, each in prints.items()} for topic in joined
            }
        return {
            "recipe": recipe.to_dict(),
            **joined,
            "versions": {"loraq": __version__, "torch": torch.__version__},
            "machine": dict(self.machine),
        }

    def require_space(self, target: Path, *, link: bool) -> None:
        """Raise `CheckpointError` if the disk of the target cannot hold what will be written.

        Args:
            target: the folder to make.
            link: whether the other components are hard links instead of copies.
        """
        others = self.others.values()
        needed = sum(part.layout.nbytes for part in self.parts)
        needed += sum(0 if link else path.stat().st_size for path in others)
        for path in partial_path(target).rglob("*"):
            needed -= path.stat().st_size if path.is_file() else 0
        require_space(target, needed, linked=others if link else ())

    def allocate(self, folder: Path) -> None:
        """Take the space of all shards below the folder where the target grows."""
        for part in self.parts:
            home = folder / part.component
            home.mkdir(exist_ok=True)
            part.layout.allocate(home)

    def write_kept(self, folder: Path, checked: Hashes, *, link: bool) -> dict[str, StoredFile]:
        """Write all that is not quantized: other components, and the tensors of the models.

        Args:
            folder: where the target grows; its shards are allocated.
            checked: what `Source.hash_weights` returned for each part.
            link: whether the other components are hard links instead of copies.

        Returns:
            What the files of the other components hold.

        Raises:
            CheckpointError: a tensor is not what was checked, or a file cannot be read.
        """
        self.remove_strays(folder)
        components = copy_components(self.others, folder, link=link)
        for part in self.parts:
            part.write_kept(folder, checked[part.component])
        return components

    def finish(
        self,
        folder: Path,
        reports: Mapping[str, Report],
        checked: Hashes,
        written: Hashes,
        components: Mapping[str, StoredFile],
    ) -> None:
        """Check all that was written, and write the configurations and manifests.

        Args:
            folder: where the target has grown.
            reports: what became of the layers of each part.
            checked: what `Source.hash_weights` returned for each part.
            written: what `LayerWriter.write` returned for each layer of each part.
            components: what `write_kept` returned.

        Raises:
            CheckpointError: something is not what was written.
        """
        self.remove_strays(folder)
        files = {
            part.component: part.finish_files(
                folder, checked[part.component], written[part.component]
            )
            for part in self.parts
        }
        check_components(folder, components)
        for part in self.parts:
            name = part.component
            beside = {**components, **list_siblings(files, name)}
            part.write_manifest(folder, reports[name], files[name], dict(sorted(beside.items())))

    def remove_strays(self, folder: Path) -> None:
        """Remove all that is not the target's: what an earlier run has copied, or anybody else."""
        ours = {folder / name for part in self.parts for name in part.list_files()}
        ours |= {folder / name for name in self.others}
        homes = {folder / part.component / "any" for part in self.parts}
        ours |= {parent for path in (*homes, *ours) for parent in path.parents}
        for parent, inner, files in os.walk(folder, topdown=False):
            for path in (Path(parent, name) for name in (*inner, *files)):
                if path in ours and not path.is_symlink():
                    continue
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink()


def list_siblings(
    files: Mapping[str, Mapping[str, StoredFile]], component: str
) -> dict[str, StoredFile]:
    """Return the files of the other quantized models of a pipeline, by their path in it.

    Their manifests are not among them: each would have to hold the hash of the other.
    """
    return {
        f"{sibling}/{name}": stored
        for sibling, of_sibling in files.items()
        if sibling != component
        for name, stored in of_sibling.items()
    }
