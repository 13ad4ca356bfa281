"""The one writer of all targets: places first, then layer by layer, each checked as it is written.

A folder appears under its name only when it is whole. One layer is in memory at a time.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loraq import disk
from loraq.checkpoint.components import copy_components
from loraq.checkpoint.folder import EXPORT_REPORT, require_space
from loraq.checkpoint.model import weights_stem
from loraq.checkpoint.partial import atomic_folder
from loraq.errors import ExportError
from loraq.exports import card, lora
from loraq.exports.factors import pad_rank
from loraq.exports.layer import Decoded, Head, Layer, Specs, same
from loraq.exports.report import DENSE, EXACT, ROUNDED, ExportReport, LayerFate
from loraq.exports.source import ExportSource
from loraq.exports.target import Layout, Target
from loraq.json_files import write_json
from loraq.linalg import relative_error
from loraq.pipeline.progress import ProgressCallback
from loraq.safetensors.header import DTYPES, TensorSpec
from loraq.safetensors.layout import ShardLayout
from loraq.version import __version__

#: The largest relative change of main weight, factor or dense weight: rounding to bf16, the
#: coarsest that is done, makes 2⁻⁸ at most; a wrong order of values makes 1.
_LARGEST_CHANGE = 2.0**-8


@dataclass(frozen=True)
class Files:
    """Where every byte of a target will stand."""

    source: ExportSource
    target: Target
    #: Layers by name, and whether the target holds them.
    held: dict[str, Head]
    dense: dict[str, Head]
    kept: dict[str, TensorSpec]
    weights: Layout
    branch: ShardLayout | None

    @classmethod
    def lay_out(cls, source: ExportSource, target: Target, shard_bytes: int) -> "Files":
        """Lay out the files of a target.

        Raises:
            ExportError: the target does not take a tensor.
        """
        refused = {head.name: head for head in source.heads if target.refuses(head)}
        dense = dict(refused)
        held = {head.name: head for head in source.heads if head.name not in refused}
        specs: Specs = {}
        branches: Specs = {}
        for head in source.heads:
            if head.name in held:
                specs |= target.specs(head)
                branches |= target.branch_specs(head)
            elif target.is_dense:
                specs |= target.specs(head)
            else:
                specs[f"{head.name}.weight"] = target.dense_spec(head)
        kept = {}
        for name in source.list_kept():
            stored = source.stored_name(name)
            shape = source.reader.shape(stored)
            dtype = target.kept_dtype(name, source.reader.dtype(stored), shape)
            kept[name] = TensorSpec(dtype, shape)
        specs |= kept
        metadata = target.metadata(specs, list(held.values()))
        stem = weights_stem(source.config)
        return cls(
            source,
            target,
            held,
            dense,
            kept,
            target.layout(specs, stem, shard_bytes, metadata),
            ShardLayout.of(branches, lora.STEM, float("inf")) if branches else None,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the model."""
        return self.weights.nbytes + (self.branch.nbytes if self.branch else 0)

    def write(
        self,
        report: ExportReport,
        place: Path,
        *,
        link: bool,
        overwrite: bool,
        show: ProgressCallback,
    ) -> ExportReport:
        """Write all files, and return what became of each layer.

        Args:
            report: what was planned.
            place: the folder to make.
            link: whether a pipeline's other components are hard links instead of copies.
            overwrite: whether a model folder that is there may be replaced.
            show: is called after each layer.

        Raises:
            CheckpointError: the source cannot be read, or the disk refuses.
            ExportError: what the target would compute with is not the layer.
        """
        others = self.source.find_others()
        copied = sum(0 if link else path.stat().st_size for path in others.values())
        require_space(place, self.nbytes + copied, linked=others.values() if link else ())
        planned = {layer.name: layer for layer in report.layers}
        with atomic_folder(place, overwrite=overwrite) as partial, torch.no_grad():
            copy_components(others, partial, link=link)
            folder = partial / self.source.component
            folder.mkdir(exist_ok=True)
            for layout in self._layouts:
                layout.allocate(folder)
            fates = []
            for i, head in enumerate(self.source.heads):
                fates.append(self._write_layer(head, folder, planned[head.name]))
                show(i + 1, len(planned), head.name, fates[-1].relative_change or 0.0)
            for name, spec in self.kept.items():
                self.weights.write(folder, {name: self._read_kept(name, spec)})
            report = replace(report.finished(fates), nbytes=self.nbytes)
            return self._write_texts(report, partial, folder, place)

    @property
    def _layouts(self) -> list[Layout]:
        return [self.weights, *([self.branch] if self.branch else [])]

    def _write_layer(self, head: Head, folder: Path, planned: LayerFate) -> LayerFate:
        layer = self.source.read_layer(head)
        if head.name in self.held or self.target.is_dense:
            tensors = self.target.tensors(layer)
            decoded = self.target.decode(tensors, head)
        else:
            spec = self.target.dense_spec(head)
            weight = layer.dense.to(DTYPES[spec.dtype])
            tensors = {f"{head.name}.weight": weight.view(spec.shape)}
            decoded = Decoded(weight.float())
        fate = _judge(layer, decoded, planned)
        for layout, names in self._split(tensors):
            layout.write(folder, {name: tensors[name].contiguous() for name in names})
        return fate

    def _split(self, tensors: Mapping[str, Tensor]) -> list[tuple[Layout, list[str]]]:
        """Return the names of tensors by the layout that has room for them."""
        places = self.branch.specs if self.branch else {}
        branch = [name for name in tensors if name in places]
        rest = [name for name in tensors if name not in places]
        found: list[tuple[Layout, list[str]]] = [(self.weights, rest)]
        return [*found, (self.branch, branch)] if self.branch and branch else found

    def _read_kept(self, name: str, spec: TensorSpec) -> Tensor:
        tensor = self.source.read_kept(name)
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias" and owner in self.held:
            tensor = self.target.lay_bias(self.held[owner], tensor)
        cast = tensor.to(DTYPES[spec.dtype])
        if tensor.is_floating_point() and not cast.isfinite().all() and tensor.isfinite().all():
            raise ExportError(
                f"Tensor '{name}' has values beyond {spec.dtype}. Use another `--dtype`."
            )
        return cast

    def _write_texts(
        self, report: ExportReport, partial: Path, folder: Path, place: Path
    ) -> ExportReport:
        """Write configuration, card and report beside the weights."""
        write_json(folder / "config.json", self.target.config(list(self.held.values())))
        home = Path(place.absolute().name) / self.source.component
        name = type(self.source.model).__name__
        text = card.write_card(report, name, home.as_posix(), self.branch is not None)
        disk.write_file(folder / card.FILE_NAME, text.encode())
        paths = sorted(Path(root) / file for root, _, files in os.walk(partial) for file in files)
        files = {path.relative_to(partial).as_posix(): path.stat().st_size for path in paths}
        document = {
            "loraq": __version__,
            "source": {"class": name, "manifest_sha256": self.source.sha256},
            **report.to_dict(),
            "files": {file: {"bytes": nbytes} for file, nbytes in files.items()},
        }
        write_json(partial / EXPORT_REPORT, document)
        return replace(report, files=files)


def _judge(layer: Layer, decoded: Decoded, planned: LayerFate) -> LayerFate:
    """Return what became of a layer, by what the target's own formulas make of the tensors.

    Raises:
        ExportError: that is another weight.
    """
    if planned.fate == DENSE:
        change = relative_error(layer.dense, decoded.dense())
        _require_small(change, layer)
        return replace(planned, relative_change=change)
    of_main = relative_error(layer.main.dequantize(), decoded.main)
    of_branch = 0.0 if same(layer.branch, decoded.branch) else _compare(layer, decoded)
    _require_small(max(of_main, of_branch), layer)
    if not of_main and not of_branch:
        return replace(planned, fate=EXACT, reason="", relative_change=0.0)
    reason = planned.reason or ("scales rounded" if of_main else "factors rounded")
    change = relative_error(layer.dense, decoded.dense())
    return replace(planned, fate=ROUNDED, reason=reason, relative_change=change)


def _compare(layer: Layer, decoded: Decoded) -> float:
    """Return the largest relative change of a factor.

    Their product is no measure: it may be larger than the weight, whose other part cancels it.
    """
    rank = max(branch.rank for branch in (layer.branch, decoded.branch) if branch)
    wanted, found = (
        pad_rank(branch, rank, layer.head.shape) for branch in (layer.branch, decoded.branch)
    )
    return max(
        relative_error(wanted.up, found.up.float()),
        relative_error(wanted.down, found.down.float()),
    )


def _require_small(change: float, layer: Layer) -> None:
    if not change <= _LARGEST_CHANGE:
        raise ExportError(
            f"Layer '{layer.head.name}' would be another weight in the target: a part changes by "
            f"{change:.3g}, and {_LARGEST_CHANGE:.2g} is the most that rounding does. Nothing was "
            "written. Please report this; `--dtype float32` or `--to dense` may work meanwhile."
        )
