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
from loraq.checkpoint.partial import atomic_folder
from loraq.errors import ExportError
from loraq.exports import card
from loraq.exports.factors import pad_rank
from loraq.exports.layer import Decoded, Head, Layer, Specs, same
from loraq.exports.report import EXACT, ROUNDED, ExportReport, LayerFate
from loraq.exports.source import ExportSource
from loraq.exports.target import BranchFile, Layout, Target
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
    #: The layers that the target holds, by name; all others are dense.
    held: dict[str, Head]
    #: The tensors that stay as they are.
    kept: dict[str, TensorSpec]
    weights: Layout
    branch: ShardLayout | None

    @classmethod
    def lay_out(cls, source: ExportSource, target: Target, shard_bytes: int) -> "Files":
        """Lay out the files of a target.

        Raises:
            ExportError: the target does not take a tensor.
        """
        held = {head.name: head for head in target.held}
        specs: Specs = {}
        branches: Specs = {}
        for head in source.heads:
            if head.name in held:
                specs |= target.specs(head)
                branches |= target.branch_specs(head)
            else:
                specs[head.weight_name] = target.dense_spec(head)
        kept = {}
        for name in source.list_kept():
            dtype, shape = source.kept_spec(name)
            kept[name] = TensorSpec(target.kept_dtype(name, dtype, shape), shape)
        specs |= kept
        return cls(
            source,
            target,
            held,
            kept,
            target.layout(specs, shard_bytes),
            _lay_out_branch(target.branch_file, branches),
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
        if head.name not in self.held:
            return self._write_dense(head, folder, planned)
        layer = self.source.read_layer(head)
        tensors = self.target.tensors(layer)
        fate = _judge(layer, self.target.decode(tensors, head), planned)
        for layout, names in self._split(tensors):
            layout.write(folder, {name: tensors[name].contiguous() for name in names})
        return fate

    def _write_dense(self, head: Head, folder: Path, planned: LayerFate) -> LayerFate:
        spec, dense = self.target.dense_spec(head), self.source.read_dense(head)
        weight = _cast(dense, spec, head.weight_name)
        change = relative_error(dense.flatten(0, -2), weight.float().flatten(0, -2))
        _require_small(change, head.name)
        laid = weight.mT if head.is_transposed else weight
        self.weights.write(folder, {head.weight_name: laid.reshape(spec.shape)})
        return replace(planned, relative_change=change)

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
        return _cast(tensor, spec, name)

    def _write_texts(
        self, report: ExportReport, partial: Path, folder: Path, place: Path
    ) -> ExportReport:
        """Write configuration, card and report beside the weights."""
        write_json(folder / "config.json", self.target.config())
        home = Path(place.absolute().name) / self.source.component
        name = type(self.source.model).__name__
        dtype = str(self.target.job.new_dtype).removeprefix("torch.")
        text = card.write_card(report, name, home.as_posix(), dtype)
        texts = {card.FILE_NAME: text} | self.target.texts(home.as_posix())
        for file, content in texts.items():
            disk.write_file(folder / file, content.encode())
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


def _lay_out_branch(file: BranchFile | None, specs: Specs) -> ShardLayout | None:
    return (
        ShardLayout.of(specs, file.name.removesuffix(".safetensors"), float("inf"))
        if file
        else None
    )


def _cast(tensor: Tensor, spec: TensorSpec, name: str) -> Tensor:
    """Return a tensor in the dtype of its place.

    Raises:
        ExportError: a number is beyond it.
    """
    cast = tensor.to(DTYPES[spec.dtype])
    if tensor.is_floating_point() and not cast.isfinite().all() and tensor.isfinite().all():
        raise ExportError(f"Tensor '{name}' has values beyond {spec.dtype}. Use another `--dtype`.")
    return cast


def _judge(layer: Layer, decoded: Decoded, planned: LayerFate) -> LayerFate:
    """Return what became of a layer, by what the target's own formulas make of the tensors.

    Raises:
        ExportError: that is another weight.
    """
    of_main = relative_error(layer.main.dequantize(), decoded.main)
    of_branch = 0.0 if same(layer.branch, decoded.branch) else _compare(layer, decoded)
    _require_small(max(of_main, of_branch), layer.head.name)
    if not of_main and not of_branch:
        return replace(planned, fate=EXACT, reason="", relative_change=0.0)
    reason = planned.reason or ("scales rounded" if of_main else "factors rounded")
    wanted = Decoded(layer.main.dequantize(), layer.branch).dense()
    change = relative_error(wanted, decoded.dense())
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


def _require_small(change: float, name: str) -> None:
    if not change <= _LARGEST_CHANGE:
        raise ExportError(
            f"Layer '{name}' would be another weight in the target: a part changes by "
            f"{change:.3g}, and {_LARGEST_CHANGE:.2g} is the most that rounding does. Nothing was "
            "written. Please report this; `--dtype float32` or `--to dense` may work meanwhile."
        )
