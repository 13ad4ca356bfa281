"""`loraq absorb-lora`, `append-lora`, `remove-lora`: LoRAs as parts of a quantized folder."""

from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import click

from loraq.cli.command import command
from loraq.cli.options import (
    component_option,
    device_option,
    overwrite_option,
    split_scale,
    variant_option,
)
from loraq.cli.output import print_json, print_table, size_of
from loraq.errors import LoraqError, list_some, show


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
@device_option
@overwrite_option
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


@command
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("loras", nargs=-1, required=True, metavar="LORA[:SCALE]...")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--name",
    "names",
    multiple=True,
    help="Name of a LoRA, in the order of the LoRAs; by default that of its file.",
)
@component_option
@overwrite_option
def append_lora(
    path: Path,
    loras: tuple[str, ...],
    target: Path,
    names: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Append LoRA files to the branches of the quantized folder PATH, in the new folder TARGET.

    No float weights are needed, and `loraq remove-lora` takes each of them away again. One layer is
    in memory at a time.

    \b
    Example: loraq append-lora out style.safetensors:0.8 detail.safetensors styled
    """
    from loraq.integrations.append import Request, append_loras

    if len(names) > len(loras):
        raise LoraqError(f"There are {len(names)} names for {len(loras)} LoRAs. Leave some out.")
    requests = [
        Request(*split_scale(lora), names[i] if i < len(names) else None)
        for i, lora in enumerate(loras)
    ]
    appended = append_loras(path, requests, target=target, **options)
    if as_json:
        print_json({"target": str(target), **asdict(appended)})
        return
    rows = []
    for name in appended.names:
        errors = [each.relative_error for each in appended.factors if each.lora == name]
        rows.append((name, str(len(errors)), f"{mean(errors):.4f}", f"{max(errors):.4f}"))
    print_table(("LoRA", "layers", "mean error", "largest"), rows)
    if appended.kept:
        click.echo(f"{len(appended.kept)} layers that are kept in floats got a branch.")
    if appended.others:
        click.echo(
            f"Left out, because only the transformer is quantized: {list_some(appended.others)}."
        )
    click.echo(f"Written to {show(target)}, {size_of(appended.nbytes)} larger.")


@command
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("name")
@click.argument("target", type=click.Path(path_type=Path))
@component_option
@overwrite_option
def remove_lora(path: Path, name: str, target: Path, as_json: bool, **options: Any) -> None:
    """Take the LoRA NAME away from the quantized folder PATH, in the new folder TARGET.

    `loraq inspect PATH` lists the LoRAs that were appended. Without them, the model has the bytes
    that it had before.

    \b
    Example: loraq remove-lora styled style plain
    """
    from loraq.integrations.append import remove_lora as remove

    layers = remove(path, name, target=target, **options)
    if as_json:
        print_json({"target": str(target), "layers": layers})
        return
    click.echo(f"Removed from {len(layers)} layers. Written to {show(target)}.")
