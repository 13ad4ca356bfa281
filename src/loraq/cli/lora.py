"""`loraq absorb-lora`: a LoRA made a permanent part of a quantized folder."""

from pathlib import Path
from typing import Any

import click

from loraq.cli.command import command
from loraq.cli.options import component_option, variant_option
from loraq.cli.output import print_json
from loraq.errors import list_some, show


@command
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("lora", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--source",
    required=True,
    type=click.Path(path_type=Path),
    help="Float folder that PATH was made from.",
)
@component_option
@variant_option
@click.option("--scale", default=1.0, show_default=True, help="Strength of the LoRA.")
@click.option("--overwrite", is_flag=True, help="Replace a model that is at TARGET.")
def absorb_lora(path: Path, lora: Path, target: Path, as_json: bool, **options: Any) -> None:
    """Make the file LORA a permanent part of the quantized folder PATH, in the new folder TARGET.

    Only the layers that it touches are quantized again, from the float weights in SOURCE.

    \b
    Example: loraq absorb-lora out style.safetensors styled --source PixArt-Sigma/transformer
    """
    from loraq.integrations.absorb import absorb_lora as absorb

    absorbed = absorb(path, lora, target=target, **options)
    if as_json:
        layers = [{"name": layer.name, **layer.record()} for layer in absorbed.layers]
        print_json(
            {
                "target": str(target),
                "layers": layers,
                "kept": absorbed.kept,
                "others": absorbed.others,
            }
        )
        return
    click.echo(
        f"{len(absorbed.layers)} layers quantized again, {len(absorbed.kept)} float layers changed."
    )
    if absorbed.others:
        click.echo(
            f"Left out, because only the transformer is quantized: {list_some(absorbed.others)}."
        )
    click.echo(f"Written to {show(target)}.")
