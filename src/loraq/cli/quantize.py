"""`loraq quantize` and `loraq plan`: the job, and what it would do."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraq.cli.command import command
from loraq.cli.options import (
    RECIPE_OPTIONS,
    components_option,
    config_option,
    devices_option,
    link_option,
    overwrite_option,
    read_recipe,
    recipe_options,
    shard_size_option,
    stats_option_value,
    variant_option,
    workers_option,
)
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
    from loraq.advice import Advice
    from loraq.pipeline.fitting import TargetFit
    from loraq.pipeline.plan import Plan
    from loraq.pipeline.report import Report


def show_notes(plan: "Plan") -> None:
    """Say on stderr what of the source was chosen, decoded or left out."""
    for note in plan.notes:
        click.echo(f"Note: {show(note)}", err=True)


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
@components_option
@config_option
@variant_option
@click.option(
    "--stats",
    metavar="[NAME=]FILE",
    multiple=True,
    callback=stats_option_value,
    help="Activation statistics that `loraq stats` wrote; of a component NAME, one for each.",
)
@devices_option
@workers_option
@shard_size_option
@overwrite_option
@click.option("--restart", is_flag=True, help="Forget what an interrupted run has finished.")
@link_option
@click.option(
    "--report",
    "with_report",
    is_flag=True,
    help="Also write the page of `loraq report` beside TARGET.",
)
@recipe_options
def quantize(source: Path, target: Path, with_report: bool, as_json: bool, **options: Any) -> None:
    """Quantize the model in SOURCE into the new folder TARGET.

    One tensor is in memory at a time.

    SOURCE is a model's folder (config.json and safetensors), a pipeline's, whose transformers and
    U-Nets are quantized and whose other components go along, one .safetensors file, or a repository
    of the hub. If the run is interrupted or killed, the same command goes on where it was.

    \b
    Example: loraq quantize PixArt-Sigma/transformer out --recipe mxfp4+w8a8 --workers 2
    """
    from loraq.checkpoint.apart import require_apart
    from loraq.integrations.checkpoints import quantize_checkpoint
    from loraq.pages.files import require_place
    from loraq.pages.report import page_beside, write_report
    from loraq.pipeline.ranks import is_leader
    from loraq.recipe import file_of

    if is_leader():
        _warn_of_unknown_class(source, options["config"])
    require_apart(target, file_of(options["recipe"]))
    page = page_beside(target) if with_report else None
    if page is not None:
        require_place(page, source, options["config"], file_of(options["recipe"]))
    recipe = read_recipe(**{name: options.pop(name) for name in RECIPE_OPTIONS})
    report = quantize_checkpoint(source, target, recipe, **options)
    if not is_leader():
        return
    show_notes(report.plan)
    if page is not None:
        write_report(target, page)
    if as_json:
        print_json(_report_document(report, target, page))
        return
    _show_report(report)
    click.echo(f"{'In' if report.already_complete else 'Written to'} {show(target)}.")
    if page is not None:
        click.echo(f"Report: {show(page)}")


def _show_report(report: "Report") -> None:
    if report.already_complete:
        click.echo("Already complete: made by the same settings from the same weights.")
    for name, of_one in report.components.items():
        click.echo(
            f"{name}: {_count_quantized(of_one.plan)} layers quantized, "
            f"{_count_kept(of_one.plan)}, {of_one.plan.bits_per_weight:.3f} bits per weight, mean "
            f"relative error {of_one.mean_relative_error:.4f}."
        )
    click.echo(f"{_count_quantized(report.plan)} layers quantized, {_count_kept(report.plan)}.")
    if report.kept and not report.already_complete:
        click.echo(f"{report.kept} of them were finished before the last run was interrupted.")
    if report.n_unsmoothed:
        click.echo(
            f"{report.n_unsmoothed} of them are not smoothed: a call of the samples would be worse."
        )
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


def _report_document(report: "Report", target: Path, page: Path | None) -> dict[str, Any]:
    return {
        "target": str(target),
        "report": None if page is None else str(page),
        "already_complete": report.already_complete,
        "recipe": report.recipe.to_dict(),
        "notes": report.plan.notes,
        "bits_per_weight": report.plan.bits_per_weight,
        **size_document(report.plan.parameters, report.plan.model_nbytes),
        "mean_relative_error": report.mean_relative_error,
        "mean_output_error": report.mean_output_error,
        "components": {
            name: {
                "layers": _count_quantized(of_one.plan),
                "bits_per_weight": of_one.plan.bits_per_weight,
                "mean_relative_error": of_one.mean_relative_error,
                "mean_output_error": of_one.mean_output_error,
            }
            for name, of_one in report.components.items()
        },
        "layers": [{"name": n.name, "seconds": n.seconds, **n.record()} for n in report.layers],
    }


@command
@click.argument("source", type=click.Path(path_type=Path))
@components_option
@config_option
@variant_option
@click.option(
    "--for",
    "runs_on",
    metavar="DEVICE",
    help="Plan with the recipe that suits a device: 'here', or a name such as hopper or cpu.",
)
@click.option(
    "--time",
    "takes_time",
    is_flag=True,
    help="Estimate how long it takes, by a trial of the largest layer on --device.",
)
@devices_option
@workers_option
@recipe_options
def plan(  # noqa: PLR0913 - each is an option
    source: Path,
    components: str | None,
    config: Path | None,
    variant: str | None,
    runs_on: str | None,
    takes_time: bool,
    device: str,
    workers: int,
    as_json: bool,
    **recipe: Any,
) -> None:
    """Show what `quantize` would do with SOURCE, layer by layer; what is kept, and why.

    Of a pipeline it shows each component, and says which others are large.

    Of the weights only names, shapes and dtypes are read; with --allocate every weight, once.

    \b
    Example: loraq plan PixArt-Sigma/transformer --budget 5.0
    """
    from dataclasses import asdict

    from loraq.devices import ALL, find_devices
    from loraq.integrations.checkpoints import plan_checkpoint
    from loraq.pipeline import estimate

    devices = find_devices(device)
    workers = max(workers, len(devices)) if device == ALL else workers
    _warn_of_unknown_class(source, config)
    advice = None if runs_on is None else _take_advice(runs_on, recipe)
    planned = plan_checkpoint(
        source, read_recipe(**recipe), components=components, config=config, variant=variant
    )
    show_notes(planned)
    jobs, seconds = planned.quantized, None
    if takes_time:
        seconds = estimate.estimate_seconds(jobs, devices[0], workers=workers)
    memory = estimate.run_nbytes(jobs, devices, workers, leads=workers > 1)
    if as_json:
        costs = {"workers": workers, "run_nbytes": memory, "estimated_seconds": seconds}
        costs["worker_nbytes"] = estimate.worker_nbytes(jobs)
        print_json(_plan_document(planned) | {"advice": advice and asdict(advice)} | costs)
        return
    if advice is not None:
        click.echo(f"For {advice.sentence}\n")
    for name, of_one in planned.components.items():
        click.echo(f"{show(name)}:")
        _print_plan(of_one)
        click.echo()
    if planned.components:
        _print_totals(planned)
    else:
        _print_plan(planned)
    at_a_time = "one worker" if workers == 1 else f"{workers} workers"
    click.echo(
        f"Loaded, the model takes {size_of(planned.model_nbytes)} and what decoding one layer "
        f"needs (`loraq inspect --memory` lists each back end). Quantizing takes about "
        f"{size_of(memory)}{estimate.name_place(devices)} with {at_a_time}."
    )
    if seconds is not None:
        click.echo(
            f"Quantizing takes about {estimate.show_time(seconds)} on {devices[0].type} with "
            f"{at_a_time}, by a trial of the largest layer."
        )
    if len(planned.sizes) > 1:
        click.echo()
        print_table(
            ("component", "class", "in bf16", "after", "if quantized"),
            (
                (
                    size.name,
                    size.class_name,
                    size_of(size.nbytes_bf16),
                    "as it is" if size.nbytes is None else size_of(size.nbytes),
                    "" if size.if_quantized is None else size_of(size.if_quantized),
                )
                for size in planned.sizes
            ),
        )


def _take_advice(device: str, recipe: dict[str, Any]) -> "Advice":
    """Return what suits a device, whose recipe is put among the options."""
    from loraq.advice import advice_for

    given = click.get_current_context().get_parameter_source("recipe")
    if given is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError("--for chooses the recipe itself. Give --recipe or --for, not both.")
    advice = advice_for(device)
    recipe["recipe"] = advice.recipe
    return advice


def _print_plan(planned: "Plan") -> None:
    print_table(
        ("layer", "out×in", "weight", "activation", "branch", "rank", "size", "bits/weight", "why"),
        _plan_rows(planned),
    )
    _print_totals(planned)
    if planned.target is not None:
        _print_target(planned.target)


def _print_target(fit: "TargetFit") -> None:
    click.echo(f"For `loraq export --to {fit.target}`: {'; '.join(fit.limits)}.")
    layers = ", ".join(f"{why} ({count})" for why, count in fit.left.items())
    kept = f" ({fit.share_left:.1%} of the weights): {layers}" if layers else ""
    click.echo(f"  stay in 16 bits for that: {sum(fit.left.values())} layers{kept}")
    if fit.ranks_alone[1]:
        alone = f"without the target {_span(fit.ranks_alone)}"
        click.echo(f"  ranks: {_span(fit.ranks)}, {alone}")
    click.echo(
        f"  bits for each weight: {fit.bits_per_weight:.3f}, without the target "
        f"{fit.bits_alone:.3f}"
    )


def _span(ranks: tuple[int, int]) -> str:
    least, most = ranks
    return str(most) if least == most else f"{least} to {most}"


def _print_totals(planned: "Plan") -> None:
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
    from loraq.pipeline.jobs import LayerJob

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

    from loraq.pipeline.jobs import LayerJob

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
    return {
        "layers": layers,
        "others": others,
        "notes": planned.notes,
        "target": planned.target and asdict(planned.target),
        **totals,
        "components": {
            name: {
                "nbytes": of_one.nbytes,
                "nbytes_bf16": of_one.nbytes_bf16,
                "bits_per_weight": of_one.bits_per_weight,
                "target": of_one.target and asdict(of_one.target),
            }
            for name, of_one in planned.components.items()
        },
        "sizes": [asdict(size) for size in planned.sizes],
    }
