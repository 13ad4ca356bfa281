"""The command line: parse, call the library, print. Results go to stdout, progress and errors to stderr."""

import json
import math
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraq import __version__
from loraq.errors import LoraqError

if TYPE_CHECKING:
    from loraq.evaluation.demo import Row
    from loraq.pipeline.plan import Plan
    from loraq.recipe import Recipe

# Everything else is imported inside the commands, so that help does not wait for torch.


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="loraq")
def main() -> None:
    """Quantize diffusion transformers to 4 bits without any data.

    \b
    loraq plan MODEL                  what would happen, layer by layer
    loraq quantize MODEL OUT          do it
    loraq demo                        see it on a small trained transformer
    """


def command(function: Callable[..., None]) -> click.Command:
    """Register a command: `--json` and `--debug` for all, errors as one message, exit codes as documented."""

    @wraps(function)
    def run(*, debug: bool, **kwargs: Any) -> None:
        try:
            function(**kwargs)
        except BrokenPipeError:
            raise  # the reader has gone, as in `loraq formats | head`
        except (LoraqError, OSError) as error:
            if debug:
                raise
            click.echo(f"Error: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("Interrupted. No partial result was left.", err=True)
            sys.exit(130)

    run = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(run)
    run = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")(run)
    return main.command(name=function.__name__.rstrip("_"))(run)


def _recipe_options(function: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option(
            "--recipe", default="default", show_default=True, help="Name (`loraq formats`), or .toml/.json file."
        ),
        click.option("--budget", help="Bits per weight (5.25), or a 16-bit branch's bytes (r16=32); sets the ranks."),
        click.option("--method", help="loraq, svdquant, lqer or rtn instead of the recipe's."),
        click.option("--effort", type=click.Choice(["fast", "default", "best"]), help="How long loraq works."),
        click.option("--seed", type=int, help="Seed instead of the recipe's."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _read_recipe(recipe: str, **overrides: Any) -> "Recipe":
    from dataclasses import replace

    from loraq.recipe import Recipe

    return replace(Recipe.of(recipe), **{key: value for key, value in overrides.items() if value is not None})


@command
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@_recipe_options
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Layers solved at a time.")
@click.option("--overwrite", is_flag=True, help="Replace a target that is not empty.")
def quantize(source: Path, target: Path, workers: int, overwrite: bool, as_json: bool, **recipe: Any) -> None:
    """Quantize the transformer in SOURCE into the new folder TARGET.

    SOURCE is a diffusers transformer folder (config.json and safetensors) or a pipeline folder, whose other
    components are copied.

    \b
    Example: loraq quantize PixArt-Sigma/transformer out --recipe mxfp4-w8a8 --workers 2
    """
    from loraq.integrations.diffusers import quantize_folder

    report = quantize_folder(source, target, _read_recipe(**recipe), workers=workers, overwrite=overwrite)
    if as_json:
        _print_json(
            {
                "target": str(target),
                "recipe": report.recipe.to_dict(),
                "bits_per_weight": report.plan.bits_per_weight,
                "mean_relative_error": report.mean_relative_error,
                "layers": [{"name": layer.name, **layer.record()} for layer in report.layers],
            }
        )
        return
    click.echo(f"{len(report.layers)} layers quantized, {len(report.plan.layers) - len(report.layers)} kept.")
    click.echo(f"Linear weights: {_size(report.plan.nbytes_bf16)} in bf16, {_size(report.plan.nbytes)} now.")
    click.echo(
        f"{report.plan.bits_per_weight:.3f} bits per weight, mean relative error {report.mean_relative_error:.4f}."
    )
    click.echo(f"Written to {target}.")


@command
@click.argument("source", type=click.Path(path_type=Path))
@_recipe_options
def plan(source: Path, as_json: bool, **recipe: Any) -> None:
    """Show what `quantize` would do with SOURCE: format, rank, bytes of every layer; what is kept, and why.

    Only the configuration is read.

    \b
    Example: loraq plan PixArt-Sigma/transformer --budget 5.0
    """
    from loraq.integrations.diffusers import plan_folder

    planned = plan_folder(source, _read_recipe(**recipe))
    if as_json:
        _print_json(_plan_document(planned))
        return
    rows = []
    for layer in planned.layers:
        shape = f"{layer.shape[0]}×{layer.shape[1]}"
        if layer.scheme is None:
            rows.append((layer.name, shape, "kept", layer.reason, "", "", _size(layer.nbytes), ""))
            continue
        branch = layer.scheme.branch
        formats = (layer.scheme.weight, layer.scheme.activation)
        side = (f"{branch.weight}/{branch.activation}", str(branch.rank)) if branch else ("none", "")
        rows.append((layer.name, shape, *formats, *side, _size(layer.nbytes), f"{layer.bits_per_weight:.3f}"))
    _print_table(("layer", "out×in", "weight", "activation", "branch", "rank", "size", "bits/weight"), rows)
    kept = len(planned.layers) - len(planned.quantized)
    click.echo(
        f"{len(planned.quantized)} layers quantized at {planned.bits_per_weight:.3f} bits per weight, {kept} kept."
    )
    click.echo(f"Linear weights: {_size(planned.nbytes_bf16)} in bf16, {_size(planned.nbytes)} after.")


@command
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--memory", is_flag=True, help="Measure what the loaded model takes on each back end instead.")
def inspect(path: Path, memory: bool, as_json: bool) -> None:
    """Show what is inside the quantized folder PATH, and check that its files are whole.

    \b
    Example: loraq inspect out --memory
    """
    from dataclasses import asdict

    from loraq.checkpoint.manifest import Manifest
    from loraq.checkpoint.memory import measure
    from loraq.integrations.diffusers import transformer_folder

    if memory:
        found = measure(transformer_folder(path))
        if as_json:
            _print_json({"memory": [asdict(each) for each in found]})
            return
        headings = ("back end", "packed", "kept", "not quantized", "total", "× stored", "layers refused")
        _print_table(headings, ((m.backend, *map(_size, m.parts), f"{m.multiple:.2f}", str(m.refused)) for m in found))
        click.echo("With bf16 activations, whose own memory is not counted. A refused layer runs on 'resident'.")
        return

    manifest = Manifest.read(transformer_folder(path))
    if as_json:
        layers = {
            name: {"shape": layer.shape, "scheme": asdict(layer.scheme), **layer.record}
            for name, layer in manifest.layers.items()
        }
        _print_json({"recipes": manifest.recipes, "layers": layers})
        return
    rows, nbytes, weights = [], 0, 0
    for name, layer in manifest.layers.items():
        branch, size = layer.scheme.branch, layer.scheme.nbytes(layer.shape)
        side = f"r{branch.rank} {branch.weight}/{branch.activation}" if branch else "none"
        error = f"{layer.record['relative_error']:.4f}" if "relative_error" in layer.record else ""
        shape = f"{layer.shape[0]}×{layer.shape[1]}"
        rows.append((name, shape, layer.scheme.weight, layer.scheme.activation, side, _size(size), error))
        nbytes, weights = nbytes + size, weights + layer.shape[0] * layer.shape[1]
    _print_table(("layer", "out×in", "weight", "activation", "branch", "size", "error"), rows)
    click.echo(f"{len(rows)} quantized layers, {_size(nbytes)}, {8 * nbytes / max(1, weights):.3f} bits per weight.")
    click.echo("All files are as they were written.")


@command
def doctor(as_json: bool) -> None:
    """Show devices, versions, which back end each number format uses here and why, and test them for some seconds.

    \b
    Example: loraq doctor
    """
    from dataclasses import asdict

    from loraq.doctor import examine, require_healthy

    report = examine()
    if as_json:
        _print_json(asdict(report))
    else:
        for title, headings, rows in report.tables():
            click.echo(f"\n{title}")
            _print_table(headings, rows)
    require_healthy(report)


@command
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
def compare(a: Path, b: Path, as_json: bool) -> None:
    """Show the relative weight error between the folders A and B, layer by layer; either may be quantized.

    \b
    Example: loraq compare PixArt-Sigma/transformer out
    """
    from loraq.checkpoint.contents import compare as compare_folders
    from loraq.integrations.diffusers import transformer_folder

    differences = compare_folders(transformer_folder(a), transformer_folder(b))
    mean = sum(d.relative_error for d in differences) / len(differences)
    if as_json:
        layers = [{"name": d.name, "shape": d.shape, "relative_error": d.relative_error} for d in differences]
        _print_json({"mean_relative_error": mean, "layers": layers})
        return
    rows = [(d.name, f"{d.shape[0]}×{d.shape[1]}", f"{d.relative_error:.4f}") for d in differences]
    _print_table(("layer", "out×in", "error"), rows)
    click.echo(f"Mean relative error of {len(rows)} layers: {mean:.4f}.")


@command
def formats(as_json: bool) -> None:
    """List the number formats, and explain the names of recipes.

    \b
    Example: loraq formats
    """
    from loraq.formats import FORMATS, BlockFormat
    from loraq.recipe import GRAMMAR, SHOWCASE

    rows = []
    for fmt in FORMATS.values():
        if isinstance(fmt, BlockFormat):
            block = str(fmt.block_size or "row")
            rows.append((fmt.name, f"{fmt.bits}", block, fmt.scale_format.name, f"{fmt.bits_per_value:g}"))
        else:
            rows.append((fmt.name, f"{fmt.bits}", "", "", f"{fmt.bits_per_value:g}"))
    headings = ("format", "bits", "block", "scale", "bits per value")
    if as_json:
        table = [dict(zip(headings, row, strict=True)) for row in rows]
        _print_json({"formats": table, "grammar": GRAMMAR, "recipes": SHOWCASE})
        return
    _print_table(headings, rows)
    click.echo(f"A recipe is a .toml or .json file, or a name:\n\n{GRAMMAR}\n")
    _print_table(("recipe", ""), SHOWCASE.items())


@command
@click.option(
    "--out", default="demo", show_default=True, type=click.Path(path_type=Path), help="Folder for the report."
)
@click.option("--images", default=40, show_default=True, type=click.IntRange(10), help="Samples for each row.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Layers solved at a time.")
def demo(out: Path, images: int, workers: int, as_json: bool) -> None:
    """Quantize the small trained transformer that ships with loraq in every way at equal bytes, and measure.

    \b
    Example: loraq demo
    """
    from dataclasses import asdict

    from loraq.evaluation.demo import run
    from loraq.evaluation.report import draw, require_drawable

    require_drawable(out / "report.png")
    result = run(n_images=images, workers=workers, progress=lambda line: click.echo(line, err=True))
    draw(result, out / "report.png")
    if as_json:
        _print_json({"rows": [asdict(row) for row in result.rows], "report": str(out / "report.png")})
        return
    _print_demo(result.rows)
    click.echo(f"Report: {out / 'report.png'}")


def _print_demo(rows: "tuple[Row, ...]") -> None:
    headings = ("", "recipe", "KiB", "bits", "weight err", "velocity err", "PSNR dB", "judge", "Fréchet", "s")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    for group, members in groups.items():
        click.echo(f"\n{group}")
        table = []
        for row in members:
            quality = (f"{row.weight_error:.4f}", f"{row.velocity_error:.4f}", f"{row.psnr_db:.1f}")
            sanity = (f"{row.accuracy:.3f}", f"{row.frechet:.2f}")
            size = (f"{row.nbytes / 1024:.0f}", f"{row.bits_per_weight:.2f}")
            table.append((row.label, row.recipe, *size, *quality, *sanity, f"{row.seconds:.0f}"))
        _print_table(headings, table)
        _print_winners(members)
    click.echo(
        "\nVelocity error is the figure to read: one forward on noised real images against the model as trained."
    )
    click.echo("Judge accuracy and Fréchet distance are sanity checks: they cannot see differences at 4 bits.")


def _print_winners(rows: "list[Row]") -> None:
    """Say who has the best of each column among the rows of one size, also when it is not LoRaQ."""
    if len(rows) < 2:
        return
    best = {
        "weight error": min(rows, key=lambda row: row.weight_error),
        "velocity error": min(rows, key=lambda row: row.velocity_error),
        "PSNR": max(rows, key=lambda row: row.psnr_db),
    }
    click.echo("Best " + ", ".join(f"{column}: {row.label}" for column, row in best.items()) + ".")


def _plan_document(planned: "Plan") -> dict[str, Any]:
    from dataclasses import asdict

    layers = [
        {
            "name": layer.name,
            "shape": layer.shape,
            "scheme": asdict(layer.scheme) if layer.scheme else None,
            "reason": layer.reason,
            "nbytes": layer.nbytes,
            "bits_per_weight": layer.bits_per_weight,
        }
        for layer in planned.layers
    ]
    totals = {"nbytes": planned.nbytes, "nbytes_bf16": planned.nbytes_bf16, "bits_per_weight": planned.bits_per_weight}
    return {"layers": layers, **totals}


def _print_json(document: Any) -> None:
    click.echo(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(document: Any) -> Any:
    """JSON has no infinity (the PSNR of equal images) and no NaN: they become null."""
    if isinstance(document, dict):
        return {key: _finite(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_finite(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def _print_table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Plain columns; numbers to the right. No cell is cut, so that the output can be searched and copied."""
    table = [tuple(headings), *(tuple(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    numeric = [all(_is_number(row[i]) for row in table[1:]) for i in range(len(table[0]))]
    for row in table:
        cells = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        click.echo("  ".join(cells).rstrip())


def _is_number(cell: str) -> bool:
    return (
        not cell
        or cell.removesuffix("iB").removesuffix(" K").removesuffix(" M").removesuffix(" G").replace(".", "").isdigit()
    )


def _size(nbytes: int) -> str:
    size = nbytes / 1024
    for unit in ("KiB", "MiB"):
        if size < 1000:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
