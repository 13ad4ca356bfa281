"""`loraq stats`: a pipeline draws samples of its own, what its layers see goes to a file."""

from pathlib import Path
from typing import Any

import click

from loraq.cli.command import command
from loraq.cli.options import (
    DTYPES,
    call_option,
    component_option,
    device_option,
    read_recipe,
    size_option_value,
    variant_option,
)
from loraq.cli.output import print_json, size_of
from loraq.errors import show


@command
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--recipe", default="default", show_default=True, help="Says which layers are quantized."
)
@component_option
@variant_option
@click.option("--method", help="Method that will use them, instead of the recipe's.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Text file, one prompt a line, instead of the empty prompt. Quantizing is data-aware "
    "then.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    help="Images to draw. [default: one for each prompt, 8 of the empty one]",
)
@click.option(
    "--steps", type=click.IntRange(1), help="Steps of each image. [default: the pipeline's]"
)
@click.option("--seed", default=0, show_default=True, help="Seed of the first image's noise.")
@click.option(
    "--mean-squares",
    is_flag=True,
    help="No correlations: a small file that brings little, and is not enough for gptq and qera.",
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Weigh timesteps and outputs by what their errors do to the image, by gradients. The "
    "model takes three to four times as long, and memory that `--memory` does not count.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    help="Inputs that a layer counts, spread over images and steps.",
)
@click.option(
    "--memory",
    "memory_bytes",
    default="8GB",
    show_default=True,
    callback=size_option_value,
    help="What counting may take beside the pipeline. If it is too little for all layers at once, "
    "all images are drawn several times.",
)
@device_option
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Of the pipeline. [default: as the transformer is stored]",
)
@call_option
@click.option("--overwrite", is_flag=True, help="Replace a file that is at TARGET.")
def stats(source: Path, target: Path, as_json: bool, **options: Any) -> None:
    """Let the pipeline SOURCE draw images from noise, and write what its layers see to TARGET.

    SOURCE is the folder of a float diffusers pipeline (model_index.json) or a repository of the
    hub. No data is needed. `loraq quantize --stats TARGET` uses the file, whose name ends with
    .safetensors.

    \b
    Example: loraq stats PixArt-Sigma pixart.safetensors --set height=512 --set width=512
    """
    import torch

    from loraq.checkpoint.apart import require_apart
    from loraq.integrations.pipelines import collect_pipeline_stats, read_prompts
    from loraq.recipe import file_of

    require_apart(target, options["prompts"], file_of(options["recipe"]))
    recipe = read_recipe(options.pop("recipe"), method=options.pop("method"))
    prompts, dtype = options.pop("prompts"), options.pop("dtype")
    report = collect_pipeline_stats(
        source,
        target,
        recipe,
        prompts=read_prompts(prompts) if prompts else (),
        second_moment=not options.pop("mean_squares"),
        dtype=getattr(torch, dtype) if dtype else None,
        **options,
    )
    if as_json:
        print_json(
            {
                "target": str(target),
                "nbytes": report.nbytes,
                "layers": report.layers,
                "samples": report.samples,
                "passes": report.passes,
                "seconds": report.seconds,
            }
        )
        return
    click.echo(f"{len(report.layers)} layers, {size_of(report.nbytes)}, {report.seconds:.0f} s.")
    click.echo(f"Written to {show(target)}.")
