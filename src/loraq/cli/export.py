"""`loraq export`: a quantized folder as files that another program loads."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraq.cli.command import command
from loraq.cli.options import (
    DTYPES,
    link_option,
    overwrite_option,
    size_option_value,
    split_scale,
)
from loraq.cli.output import print_json, print_table, size_of
from loraq.errors import show

if TYPE_CHECKING:
    from loraq.exports.report import ExportReport

#: Options that decide what is written; the others are how.
_PLANNED = ("lora", "pad_rank", "allow_dense", "dtype", "shard_bytes")


@command
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.argument("target", required=False, type=click.Path(path_type=Path))
@click.option("--to", metavar="TARGET", help="What is written (`loraq export --list`).")
@click.option("--list", "as_list", is_flag=True, help="List the targets, and what each holds.")
@click.option("--plan", "as_plan", is_flag=True, help="Show what would become of each layer.")
@click.option(
    "--lora",
    multiple=True,
    metavar="FILE[:SCALE]",
    help="Stack a LoRA onto the branch; may be given several times.",
)
@click.option("--pad-rank", is_flag=True, help="Fill ranks up with zeros where one is required.")
@click.option(
    "--allow-dense", is_flag=True, help="Write more than a tenth of the weights as floats."
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Of all that is float; `--list` says what each target takes.",
)
@click.option(
    "--shard-size",
    "shard_bytes",
    callback=size_option_value,
    help="Largest weight file, of targets that have several.  [default: 2GB]",
)
@link_option
@overwrite_option
def export(
    source: Path | None,
    target: Path | None,
    to: str | None,
    as_list: bool,
    as_plan: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the quantized folder SOURCE into the new folder TARGET, as files that others load.

    Codes are copied, never rounded again. A layer that the target cannot hold becomes a float
    weight, and is counted.

    \b
    Example: loraq export out out-sdnq --to sdnq
    """
    if as_list:
        _show_targets(as_json=as_json)
        return
    if source is None or to is None or (target is None and not as_plan):
        raise click.UsageError(
            "SOURCE, TARGET and --to are required: loraq export out out-sdnq --to sdnq. "
            "`loraq export --list` lists the targets."
        )
    from loraq.exports.run import export as run
    from loraq.exports.run import plan_export

    options["lora"] = [split_scale(text) for text in options["lora"]]
    if target is None or as_plan:
        planned = {name: value for name, value in options.items() if name in _PLANNED}
        report = plan_export(source, to=to, **planned)
    else:
        report = run(source, target, to=to, **options)
    if as_json:
        print_json({"written": None if as_plan else str(target), **report.to_dict()})
        return
    _show_report(report, as_plan=as_plan)
    if not as_plan:
        click.echo(f"Written to {show(target)}; `README.md` there says how it is loaded.")


def _show_targets(*, as_json: bool) -> None:
    from dataclasses import asdict

    from loraq.exports.table import TARGETS

    if as_json:
        listed = [
            asdict(target.about) | {"recipes": target.about.recipes, "dtypes": target.dtypes}
            for target in TARGETS.values()
        ]
        print_json({"targets": listed})
        return
    for target in TARGETS.values():
        about = target.about
        click.echo(about.name)
        lines = {
            "loaded by": about.loaded_by,
            "holds": about.holds,
            "exact": about.exact,
            "activations": about.activations,
            "floats": ", ".join(target.dtypes),
            "verified": about.verified,
            "not verified": about.unverified,
            "recipe": ", ".join(about.recipes) or "any",
        }
        for heading, text in lines.items():
            click.echo(f"  {heading}: {text}")


def _show_report(report: "ExportReport", *, as_plan: bool) -> None:
    rows = [
        (
            layer.name,
            "×".join(map(str, layer.shape)),
            layer.fate,
            size_of(layer.nbytes_before),
            size_of(layer.nbytes),
            "" if layer.relative_change is None else f"{layer.relative_change:.2g}",
            layer.reason,
        )
        for layer in report.layers
    ]
    print_table(("layer", "out×in", "fate", "before", "after", "change", "why"), rows)
    counts, (before, after) = report.counts, report.bits
    parts = ", ".join(f"{count} {fate}" for fate, count in counts.items())
    click.echo(f"{len(rows)} layers: {parts}. {report.dense_share:.1%} of the weights are dense.")
    click.echo(f"{before:.3f} bits per weight before, {after:.3f} after.")
    if not as_plan:
        click.echo(f"Largest relative change of a weight: {report.largest_change:.2g}.")
    click.echo(f"Activations there: {report.about.activations}.")
    for note in (*report.notes, *report.traps):
        click.echo(f"Note: {show(note)}", err=True)
