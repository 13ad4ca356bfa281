"""`loraq quantize` and `loraq plan`: the job, and what it would do."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraq.cli.command import command
from loraq.cli.output import (
    activation_of,
    print_json,
    print_table,
    show_size,
    size_document,
    size_of,
)
from loraq.errors import show

if TYPE_CHECKING:
    from loraq.pipeline.plan import Plan
    from loraq.recipe import Recipe


def recipe_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that make a recipe."""
    options = (
        click.option(
            "--recipe",
            default="default",
            show_default=True,
            help="Name (`loraq formats`), or .toml/.json file.",
        ),
        click.option(
            "--budget",
            help="Bits per weight (5.25), or a 16-bit branch's bytes (r16=32); sets the ranks.",
        ),
        click.option(
            "--allocate",
            "allocation",
            flag_value="greedy",
            help="Share the budget among the layers: the same bytes in all, ranks where they help "
            "most.",
        ),
        click.option("--method", help="Method instead of the recipe's (`loraq methods`)."),
        click.option(
            "--effort",
            metavar="LEVEL",
            help="Level of effort; for method loraq: fast, default or best.",
        ),
        click.option(
            "--rank", type=click.IntRange(1), help="Rank of every branch instead of the recipe's."
        ),
        click.option(
            "--keep",
            metavar="HOW",
            help="How layers are stored that the model's class keeps: int8 or float.",
        ),
        click.option("--seed", type=int, help="Seed instead of the recipe's."),
    )
    for option in reversed(options):
        function = option(function)
    return function


RECIPE_OPTIONS = (
    "recipe",
    "budget",
    "allocation",
    "method",
    "effort",
    "rank",
    "keep",
    "seed",
)

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="config.json or its folder, for a SOURCE without one.",
)


variant_option = click.option(
    "--variant",
    metavar="NAME",
    help="Which copy of the weights in a folder that holds several, such as fp16.",
)


def show_notes(plan: "Plan") -> None:
    """Say on stderr what of the source was chosen, decoded or left out."""
    for note in plan.notes:
        click.echo(f"Note: {show(note)}", err=True)


def size_option_value(_context: click.Context, _parameter: click.Parameter, text: str) -> int:
    """Read a size such as "2GB", "500 MB" or "1GiB"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?)(i?)B?", text, re.IGNORECASE)
    size = found and round(
        float(found[1]) * (1024 if found[3] else 1000) ** " KMG".index(found[2].upper() or " ")
    )
    if not size:
        raise click.BadParameter(
            f"'{text}' is not a size. Write a number and a unit, such as 2GB or 500MB."
        )
    return size


def read_recipe(recipe: str, *, rank: int | None = None, **overrides: Any) -> "Recipe":
    """Return the recipe that the options describe."""
    from dataclasses import replace

    from loraq.methods import METHODS
    from loraq.recipe import Recipe

    asked = {key: value for key, value in overrides.items() if value is not None}
    made = replace(Recipe.of(recipe), **asked)
    if rank is not None:  # with a budget too, the recipe says that one of them settles it
        made = made.adjusted(rank=rank, budget=asked.get("budget"))
    if METHODS[made.method].efforts:
        return made
    if "effort" in asked:
        able = ", ".join(name for name, method in METHODS.items() if method.efforts)
        raise click.UsageError(
            f"Method '{made.method}' has no levels of effort. Leave --effort out, or use a method "
            f"that has them ({able})."
        )
    if made.effort != "default":
        click.echo(
            f"Note: method '{made.method}' has no levels of effort, so the recipe's "
            f"'{made.effort}' changes nothing.",
            err=True,
        )
    return made


def _warn_of_unknown_class(source: Path, config: Path | None) -> None:
    if source.is_file() and config is None:
        click.echo(
            "Note: one file does not say its model's class. Only the rules for all classes apply, "
            "and `loraq.load` cannot build the result. Give --config with the model's config.json.",
            err=True,
        )


@command
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@config_option
@variant_option
@click.option(
    "--stats",
    type=click.Path(path_type=Path),
    help="Activation statistics that `loraq stats` wrote.",
)
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Layers solved at a time.",
)
@click.option(
    "--shard-size",
    "shard_bytes",
    default="2GB",
    show_default=True,
    callback=size_option_value,
    help="Largest file.",
)
@click.option("--overwrite", is_flag=True, help="Replace a model that is at TARGET.")
@click.option("--restart", is_flag=True, help="Forget what an interrupted run has finished.")
@click.option(
    "--link", is_flag=True, help="Hard-link a pipeline's other components instead of copying them."
)
@recipe_options
def quantize(source: Path, target: Path, as_json: bool, **options: Any) -> None:
    """Quantize the transformer in SOURCE into the new folder TARGET.

    One tensor is in memory at a time.

    SOURCE is a diffusers transformer folder (config.json and safetensors), a pipeline folder, whose
    other components go along, one .safetensors file, or a repository of the hub. If the run is
    interrupted or killed, the same command goes on where it was.

    \b
    Example: loraq quantize PixArt-Sigma/transformer out --recipe mxfp4+w8a8 --workers 2
    """
    from loraq.checkpoint.apart import require_apart
    from loraq.integrations.checkpoints import quantize_checkpoint
    from loraq.recipe import file_of

    _warn_of_unknown_class(source, options["config"])
    require_apart(target, file_of(options["recipe"]))
    recipe = read_recipe(**{name: options.pop(name) for name in RECIPE_OPTIONS})
    report = quantize_checkpoint(source, target, recipe, **options)
    show_notes(report.plan)
    if as_json:
        print_json(
            {
                "target": str(target),
                "already_complete": report.already_complete,
                "recipe": report.recipe.to_dict(),
                "notes": report.plan.notes,
                "bits_per_weight": report.plan.bits_per_weight,
                **size_document(report.plan.parameters, report.plan.model_nbytes),
                "mean_relative_error": report.mean_relative_error,
                "mean_output_error": report.mean_output_error,
                "layers": [
                    {"name": n.name, "seconds": n.seconds, **n.record()} for n in report.layers
                ],
            }
        )
        return
    if report.already_complete:
        click.echo("Already complete: made by the same settings from the same weights.")
    click.echo(f"{_count_quantized(report.plan)} layers quantized, {_count_kept(report.plan)}.")
    if report.kept and not report.already_complete:
        click.echo(f"{report.kept} of them were finished before the last run was interrupted.")
    click.echo(
        f"Linear weights: {size_of(report.plan.nbytes_bf16)} in bf16, "
        f"{size_of(report.plan.nbytes)} now."
    )
    errors = f"mean relative error {report.mean_relative_error:.4f}"
    if report.mean_output_error is not None:
        errors += (
            f" of the weights, {report.mean_output_error:.4f} of the outputs by the statistics"
        )
    click.echo(f"{report.plan.bits_per_weight:.3f} bits per weight, {errors}.")
    show_size(report.plan.parameters, report.plan.model_nbytes)
    click.echo(f"{'In' if report.already_complete else 'Written to'} {show(target)}.")


@command
@click.argument("source", type=click.Path(path_type=Path))
@config_option
@variant_option
@recipe_options
def plan(
    source: Path, config: Path | None, variant: str | None, as_json: bool, **recipe: Any
) -> None:
    """Show what `quantize` would do with SOURCE, layer by layer; what is kept, and why.

    Of the weights only names, shapes and dtypes are read; with --allocate every weight, once.

    \b
    Example: loraq plan PixArt-Sigma/transformer --budget 5.0
    """
    from loraq.integrations.checkpoints import plan_checkpoint

    _warn_of_unknown_class(source, config)
    planned = plan_checkpoint(source, read_recipe(**recipe), config=config, variant=variant)
    show_notes(planned)
    if as_json:
        print_json(_plan_document(planned))
        return
    print_table(
        ("layer", "out×in", "weight", "activation", "branch", "rank", "size", "bits/weight", "why"),
        _plan_rows(planned),
    )
    click.echo(
        f"{_count_quantized(planned)} layers quantized at {planned.bits_per_weight:.3f} bits per "
        f"weight, {_count_kept(planned)}."
    )
    click.echo(
        f"Linear weights: {size_of(planned.nbytes_bf16)} in bf16, {size_of(planned.nbytes)} after."
    )
    show_size(planned.parameters, planned.model_nbytes)


def _count_quantized(planned: "Plan") -> int:
    return len(planned.quantized) - len(planned.kept_in_8_bits)


def _count_kept(planned: "Plan") -> str:
    in_8_bits = len(planned.kept_in_8_bits)
    text = f"{len(planned.kept) + in_8_bits} kept"
    return f"{text}, {in_8_bits} of them in 8 bits" if in_8_bits else text


def _plan_rows(planned: "Plan") -> list[tuple[str, ...]]:
    from loraq.pipeline.plan import LayerJob

    rows: list[tuple[str, ...]] = []
    for layer in (*planned.layers, *planned.others):
        shape, size = "×".join(str(n) for n in layer.shape), size_of(layer.nbytes)
        if not isinstance(layer, LayerJob):
            rows.append((layer.name, shape, "kept", "", "", "", size, "", layer.reason))
            continue
        scheme, branch = layer.scheme, layer.scheme.branch
        side = f"{branch.weight}/{branch.activation}" if branch else "none"
        rank = str(branch.rank) if branch else ""
        weight = f"{scheme.weight} (kept)" if layer.is_kept else scheme.weight
        formats = (weight, activation_of(scheme), side, rank)
        bits = f"{layer.bits_per_weight:.3f}"
        rows.append((layer.name, shape, *formats, size, bits, layer.reason))
    return rows


def _plan_document(planned: "Plan") -> dict[str, Any]:
    from dataclasses import asdict

    from loraq.pipeline.plan import LayerJob

    layers = [
        {
            "name": layer.name,
            "shape": layer.shape,
            "scheme": asdict(layer.scheme) if isinstance(layer, LayerJob) else None,
            "kept": not isinstance(layer, LayerJob) or layer.is_kept,
            "reason": layer.reason,
            "nbytes": layer.nbytes,
            "bits_per_weight": layer.bits_per_weight if isinstance(layer, LayerJob) else 16.0,
        }
        for layer in planned.layers
    ]
    others = [asdict(other) | {"nbytes": other.nbytes} for other in planned.others]
    totals = {
        "nbytes": planned.nbytes,
        "nbytes_bf16": planned.nbytes_bf16,
        "bits_per_weight": planned.bits_per_weight,
        **size_document(planned.parameters, planned.model_nbytes),
    }
    return {"layers": layers, "others": others, "notes": planned.notes, **totals}
