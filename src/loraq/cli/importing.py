"""`loraq import`: a quantized folder of another program as one of loraq."""

from pathlib import Path

import click

from loraq.cli.command import command
from loraq.cli.output import print_json, print_table, size_of
from loraq.errors import show


@command
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace a model that is at TARGET.")
def import_(source: Path, target: Path, overwrite: bool, as_json: bool) -> None:
    """Make the new folder TARGET of loraq from SOURCE, which was quantized for Nunchaku Lite.

    Codes, scales and factors are the same numbers in another order. The model then runs on every
    device, with activations of 16 bits.

    \b
    Example: loraq import flux-nunchaku-lite flux-loraq
    """
    from loraq.exports.importing import import_checkpoint

    report = import_checkpoint(source, target, overwrite=overwrite)
    if as_json:
        print_json({"written": str(target), **report.to_dict()})
        return
    rows = [
        (
            layer.name,
            "×".join(map(str, layer.shape)),
            layer.kind,
            layer.scheme.weight,
            str(layer.scheme.branch.rank) if layer.scheme.branch else "",
            size_of(layer.nbytes),
        )
        for layer in report.layers
    ]
    print_table(("layer", "out×in", "was", "weight", "rank", "size"), rows)
    click.echo(f"{len(rows)} layers, all of them the same numbers. Written to {show(target)}.")
