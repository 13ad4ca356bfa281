"""`loraq evaluate`: two pipelines draw the same prompts, and what that says of the second."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraq.cli.command import command
from loraq.cli.options import DTYPES, call_option, device_option
from loraq.cli.output import print_json, print_table
from loraq.errors import show

if TYPE_CHECKING:
    from loraq.evaluation.paired import Figure


@command
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--prompts",
    required=True,
    type=click.Path(path_type=Path),
    help="MJHQ-30K's meta_data.json, sDCI's sDCI.yaml, or a text file, one prompt a line.",
)
@click.option(
    "--images",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder in which images are kept: what is there is not drawn again.",
)
@click.option(
    "--count",
    type=click.IntRange(1),
    help="How many prompts: the subset of published tables. [default: all]",
)
@click.option("--lpips/--no-lpips", default=True, show_default=True, help="LPIPS of the pairs.")
@click.option("--fid", is_flag=True, help="Fréchet distances of Inception and DINOv2, B from A.")
@click.option("--clip", is_flag=True, help="CLIP score of both with the prompts.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="Folder with the weights of metrics. [default: the caches of torch and of the hub]",
)
@call_option
@device_option
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Of the pipelines. [default: as A's denoiser is stored]",
)
@click.option(
    "--simulate",
    is_flag=True,
    help="Round activations as B's recipe says also where the device gains nothing from it.",
)
def evaluate(
    a: Path, b: Path, prompts: Path, count: int | None, as_json: bool, **options: Any
) -> None:
    """Draw the same prompts from the same noise by A and by B, and measure how far B's images are.

    A is the folder of a diffusers pipeline or a repository of the hub, B another one, or the folder
    of a model that takes the place of A's. One is in memory at a time. A run that was killed goes
    on; for another B, A's images are used again.

    \b
    Example: loraq evaluate PixArt-Sigma quantized --prompts meta_data.json --count 1024 \\
        --images images
    """
    import torch

    from loraq.checkpoint.apart import require_apart
    from loraq.evaluation.paired import evaluate as run
    from loraq.evaluation.prompts import read_named_prompts

    require_apart(options["images"], prompts, options["weights"])
    dtype = options.pop("dtype")
    named = read_named_prompts(prompts, count)
    found = run(a, b, named, dtype=getattr(torch, dtype) if dtype else None, **options)
    folders = {"images_a": found.images_a[0].parent, "images_b": found.images_b[0].parent}
    if as_json:
        figures = {
            figure.name: {"value": figure.value, "low": figure.low, "high": figure.high}
            for figure in found.figures
        }
        document = {"images": len(named), **{k: str(v) for k, v in folders.items()}}
        print_json(document | {"figures": figures})
        return
    print_table(("", "value", "95 % interval"), map(_cells, found.figures))
    click.echo(f"{len(named)} images of each.")
    click.echo(f"A: {show(folders['images_a'])}")
    click.echo(f"B: {show(folders['images_b'])}")


def _cells(figure: "Figure") -> tuple[str, str, str]:
    ends = "" if figure.low is None else f"{figure.low:.4f} … {figure.high:.4f}"
    return figure.name, f"{figure.value:.4f}", ends
