"""`export` and `plan_export`: a quantized folder as files of another program."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loraq.checkpoint.apart import require_apart
from loraq.checkpoint.folder import require_free
from loraq.checkpoint.partial import require_no_run
from loraq.errors import ExportError, list_some
from loraq.exports.advice import recommend
from loraq.exports.layer import Head
from loraq.exports.options import Options
from loraq.exports.report import DENSE, EXACT, ROUNDED, ExportReport, LayerFate
from loraq.exports.source import ExportSource
from loraq.exports.table import get_target
from loraq.exports.target import Job, Target
from loraq.exports.write import Files
from loraq.integrations.lora import find_lora_file
from loraq.options import Size, checked
from loraq.pipeline.progress import ProgressCallback, show_layers
from loraq.targets import limits_of

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
    shard_bytes: Size | None = None,
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
        pad_rank: whether branches are filled up with zeros; for targets that need one rank.
        allow_dense: whether more than a tenth of the quantized weights may become floats.
        dtype: "bfloat16", "float16" or "float32", of all that is float; by default factors and
            dense weights are written in bfloat16, and everything else stays as it is. Graphs
            hold float32 only.
        shard_bytes: largest weight file, unless one tensor alone is larger, of targets that have
            several; 2 GB by default.
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
    place, loras, settled = Path(target), [_split(each) for each in lora], get_target(to)
    options = Options(pad_rank, allow_dense, dtype, shard_bytes)
    options.require_sense(settled)
    require_apart(place, source, *(find_lora_file(path) for path, _ in loras))
    require_free(place, overwrite=overwrite)
    require_no_run(place)
    opened = _open(source, settled, loras, verify=verify)
    chosen, report = _plan(opened, settled, options)
    files = Files.lay_out(opened, chosen, options.largest_file)
    with show_layers(progress, "export") as show:
        return files.write(report, place, link=link, overwrite=overwrite, show=show)


@checked
def plan_export(  # noqa: PLR0913 - as above
    source: str | Path,
    *,
    to: str,
    lora: Sequence[LoraFile] = (),
    pad_rank: bool = False,
    allow_dense: bool = False,
    dtype: str | None = None,
    shard_bytes: Size | None = None,
) -> ExportReport:
    """Return what `export` would do, or refuse what it would refuse.

    Of the weights only headers and scales are read.

    Raises:
        CheckpointError, ExportError: as `export` says.
    """
    settled, loras = get_target(to), [_split(each) for each in lora]
    options = Options(pad_rank, allow_dense, dtype, shard_bytes)
    options.require_sense(settled)
    opened = _open(source, settled, loras, verify=False)
    chosen, report = _plan(opened, settled, options)
    return replace(report, nbytes=Files.lay_out(opened, chosen, options.largest_file).nbytes)


def _open(
    place: str | Path, kind: type[Target], loras: list[tuple[Path, float]], *, verify: bool
) -> ExportSource:
    """Return a source of a class that a target takes, as the target sees it."""
    source = ExportSource.open(place, loras, verify=verify)
    name, model_kind = kind.about.name, type(source.model)
    if why := limits_of(name).explain_class(model_kind):
        raise ExportError(
            f"Target '{name}' takes no {model_kind.__name__}: {why}. "
            f"{recommend(name, source.heads, model_kind)}"
        )
    return kind.see(source)


def _plan(
    source: ExportSource, kind: type[Target], options: Options
) -> tuple[Target, ExportReport]:
    about = kind.about
    advice = recommend(about.name, source.heads, type(source.model))
    for what, done in (("rotation", "rotated"), ("smoothing", "smoothed")):
        found = [head.name for head in source.heads if getattr(head.scheme, what)]
        if found and not kind.takes_transforms:
            raise ExportError(
                f"{len(found)} layers are {done} (first '{found[0]}'), and target '{about.name}' "
                f"has no {what}: its codes would stand for another weight. {advice} Or export "
                "`--to dense`."
            )
    job = Job(
        heads=tuple(head for head in source.heads if not head.n_experts),
        model=source.model,
        config=source.config,
        floats=source.find_floats(),
        read_scale=source.read_scale,
        dtype=options.dtype_for(kind),
        pads_rank=options.pad_rank,
    )
    target = kind(job)
    layers = [_predict(target, head) for head in source.heads]
    report = ExportReport(about, tuple(layers), tuple(target.notes()), target.branch_file)
    if not kind.is_dense and report.dense_share > _MOST_DENSE and not options.allow_dense:
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
