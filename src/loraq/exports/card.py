"""The model card of an export: how it is loaded, what runs there, and what goes wrong."""

from loraq.exports.report import DENSE, EXACT, ROUNDED, ExportReport
from loraq.version import __version__

#: Its name, which model hubs show.
FILE_NAME = "README.md"


def write_card(report: ExportReport, model_class: str, folder: str, has_branch_file: bool) -> str:
    """Return the text of the card.

    Args:
        report: what became of the layers.
        model_class: class of the model in diffusers.
        folder: name of the target, with that of the component in it.
        has_branch_file: whether the branch is a file of its own.
    """
    about, counts, (before, after) = report.about, report.counts, report.bits
    load = about.load.format(model_class=model_class, folder=folder)
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
    if about.traps:
        lines += ["## Traps", "", *(f"* {trap}" for trap in about.traps), ""]
    lines += [
        "`loraq_export.json` beside the model says what became of each layer"
        + (", `branch.safetensors` is a part of the model." if has_branch_file else "."),
        "",
    ]
    return "\n".join(lines)
