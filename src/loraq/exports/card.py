"""The model card of an export: how it is loaded, what runs there, and what goes wrong."""

from loraq.exports.report import DENSE, EXACT, ROUNDED, ExportReport
from loraq.exports.target import About, BranchFile
from loraq.version import __version__

#: Its name, which model hubs show.
FILE_NAME = "README.md"


def write_card(report: ExportReport, model_class: str, folder: str, dtype: str) -> str:
    """Return the text of the card.

    Args:
        report: what became of the layers.
        model_class: class of the model in diffusers.
        folder: name of the target, with that of the component in it.
        dtype: of the floats that are written anew, in which the model is loaded.
    """
    about, counts, (before, after) = report.about, report.counts, report.bits
    branch_file = report.branch_file
    load = write_load(about, branch_file, model_class=model_class, folder=folder, dtype=dtype)
    lines = [
        f"# {model_class}, quantized by loraq, for {about.name}",
        "",
        f"Written by `loraq export --to {about.name}` (loraq {__version__}). Loaded by: "
        f"{about.loaded_by}.",
        "",
        "```",
        *load.splitlines(),
        "```",
        "",
        "## What it computes with",
        "",
        f"* Activations there: {about.activations}.",
        f"* {counts[EXACT]} layers are bit for bit those of the source, {counts[ROUNDED]} with "
        f"rounded factors or scales, {counts[DENSE]} as floats. The largest relative change of a "
        f"weight is {report.largest_change:.2g}; codes are never rounded again.",
        f"* {after:.3f} bits for each quantized weight ({before:.3f} in loraq's own files).",
        f"* Checked: {about.verified}. Not checked: {about.unverified}.",
        *(f"* {note}" for note in report.notes),
        "",
    ]
    if report.traps:
        lines += ["## Traps", "", *(f"* {trap}" for trap in report.traps), ""]
    lines += [
        "`loraq_export.json` beside the model says what became of each layer"
        + (f", `{branch_file.name}` is a part of the model." if branch_file else "."),
        "",
    ]
    return "\n".join(lines)


def write_load(about: About, branch_file: BranchFile | None, **names: str) -> str:
    """Return the lines that load an export, with `model_class`, `folder` and `dtype` in them."""
    parts = [about.load, *([branch_file.load] if branch_file else [])]
    return "\n".join(parts).format(**names)
