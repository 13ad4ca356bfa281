"""`export` and `plan_export`: a quantized folder as files of another program."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from loraq.checkpoint.apart import require_apart
from loraq.checkpoint.folder import require_free
from loraq.checkpoint.partial import require_no_run
from loraq.errors import ExportError, list_some
from loraq.exports.advice import recommend
from loraq.exports.layer import Head
from loraq.exports.report import DENSE, EXACT, ROUNDED, ExportReport, LayerFate
from loraq.exports.source import ExportSource
from loraq.exports.table import get_target
from loraq.exports.target import Job, Target
from loraq.exports.write import Files
from loraq.integrations.lora import find_lora_file
from loraq.options import Size, checked
from loraq.pipeline.progress import ProgressCallback, show_layers
from loraq.safetensors.layout import DEFAULT_SHARD_BYTES
from loraq.targets import limits_of

#: Dtypes that `dtype` takes, by name.
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
#: Share of the quantized weights that may become dense without being asked for.
_MOST_DENSE = 0.1

#: A LoRA's file, or the file and its strength.
LoraFile = str | Path | tuple[str | Path, float]


@checked
def export(  # noqa: PLR0913 - each is an option of the command too
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    lora: Sequence[LoraFile] = (),
    pad_rank: bool = False,
    allow_dense: bool = False,
    dtype: str | None = None,
    shard_bytes: Size = DEFAULT_SHARD_BYTES,
    link: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: ProgressCallback | bool = True,
) -> ExportReport:
    """Write a quantized model as files that another program loads.

    Codes are copied, never rounded again. Each layer is decoded by the target's own formulas as it
    is written, and compared with the weight that loraq computes with. One layer is in memory at a
    time, and the target appears under its name only when it is whole.

    Args:
        source: a quantized folder, a pipeline's folder with one in it (its other components go
            along), or a repository of the hub.
        target: the folder to make.
        to: name of a target; `loraq.exports.table.TARGETS` has them, `loraq export --list` shows
            them.
        lora: LoRA files to stack onto the branch, each alone or with its strength.
        pad_rank: whether branches are filled up with zeros where a target needs one rank.
        allow_dense: whether more than a tenth of the quantized weights may become floats.
        dtype: "bfloat16", "float16" or "float32", of all that is float; by default factors and
            dense weights are written in bfloat16, and everything else stays as it is.
        shard_bytes: largest weight file, unless one tensor alone is larger.
        link: whether a pipeline's other components are hard links instead of copies.
        overwrite: whether a model folder that is there may be replaced.
        verify: whether the hashes of the source's files are compared.
        progress: False for silence, True for a display on stderr, or a function to call after each
            layer.

    Returns:
        What became of each layer.

    Raises:
        CheckpointError: the source or a LoRA cannot be used, or the target cannot be written.
        ExportError: the target does not hold the model; the message names the option or the
            recipe that helps. Nothing is written then.
    """
    place, loras = Path(target), [_split(each) for each in lora]
    settled = get_target(to)
    require_apart(place, source, *(find_lora_file(path) for path, _ in loras))
    require_free(place, overwrite=overwrite)
    require_no_run(place)
    opened = settled.see(ExportSource.open(source, loras, verify=verify))
    chosen, report = _plan(opened, settled, _dtype_of(dtype), pad_rank, allow_dense)
    files = Files.lay_out(opened, chosen, shard_bytes)
    with show_layers(progress, "export") as show:
        return files.write(report, place, link=link, overwrite=overwrite, show=show)


@checked
def plan_export(
    source: str | Path,
    *,
    to: str,
    lora: Sequence[LoraFile] = (),
    pad_rank: bool = False,
    allow_dense: bool = False,
    dtype: str | None = None,
) -> ExportReport:
    """Return what `export` would do, or refuse what it would refuse.

    Of the weights only headers and scales are read.

    Raises:
        CheckpointError, ExportError: as `export` says.
    """
    settled = get_target(to)
    loras = [_split(each) for each in lora]
    opened = settled.see(ExportSource.open(source, loras, verify=False))
    chosen, report = _plan(opened, settled, _dtype_of(dtype), pad_rank, allow_dense)
    return replace(report, nbytes=Files.lay_out(opened, chosen, DEFAULT_SHARD_BYTES).nbytes)


def _plan(
    source: ExportSource,
    kind: type[Target],
    dtype: torch.dtype | None,
    pads_rank: bool,
    allow_dense: bool,
) -> tuple[Target, ExportReport]:
    about, model_kind = kind.about, type(source.model)
    advice = recommend(about.name, source.heads, model_kind)
    if why := limits_of(about.name).explain_class(model_kind):
        raise ExportError(f"Target '{about.name}' takes no {model_kind.__name__}: {why}. {advice}")
    rotated = [head.name for head in source.heads if head.scheme.rotation]
    if rotated and not kind.takes_rotation:
        raise ExportError(
            f"{len(rotated)} layers are rotated (first '{rotated[0]}'), and target "
            f"'{about.name}' has no rotation: its codes would stand for another weight. {advice} "
            "Or export `--to dense`."
        )
    job = Job(
        heads=tuple(head for head in source.heads if not head.n_experts),
        model=source.model,
        config=source.config,
        floats=source.find_floats(),
        read_scale=source.read_scale,
        dtype=dtype,
        pads_rank=pads_rank,
    )
    target = kind(job)
    layers = [_predict(target, head) for head in source.heads]
    report = ExportReport(about, tuple(layers), tuple(target.notes()))
    if not kind.is_dense and report.dense_share > _MOST_DENSE and not allow_dense:
        dense = [layer for layer in layers if layer.fate == DENSE and not layer.is_kept]
        reasons = dict.fromkeys(layer.reason for layer in dense)
        raise ExportError(
            f"Target '{about.name}' would hold {report.dense_share:.0%} of the quantized "
            f"weights as floats ({len(dense)} of {len(layers)} layers: "
            f"{list_some(reasons, most=4)}). {advice} Or allow that (`--allow-dense`)."
        )
    return target, report


def _predict(target: Target, head: Head) -> LayerFate:
    """Return what becomes of a layer as far as formats say."""
    refused = target.why_dense(head)
    reason = refused or target.explain_rounding(head)
    fate = DENSE if refused else ROUNDED if reason else EXACT
    specs = [target.dense_spec(head)] if refused else list(target.all_specs(head).values())
    nbytes = sum(spec.nbytes for spec in specs)
    return LayerFate(
        name=head.name,
        shape=head.packed_shape,
        fate=fate,
        reason=reason,
        nbytes_before=head.nbytes,
        nbytes=nbytes,
        is_kept=head.is_kept,
        parts=tuple(part.name for part in head.parts),
    )


def _split(lora: LoraFile) -> tuple[Path, float]:
    """Return the file of a LoRA and its strength."""
    path, scale = lora if isinstance(lora, tuple) else (lora, 1.0)
    return Path(path), float(scale)


def _dtype_of(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ExportError(f"Dtype '{name}' is none of {', '.join(DTYPES)}.")
    return DTYPES[name] if name else None
