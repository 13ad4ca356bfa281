"""`loraq inspect`, `compare`, `formats` and `methods`: look at what is there."""

import math
from pathlib import Path

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


@command
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--memory", is_flag=True, help="Measure what the loaded model takes on each back end instead."
)
def inspect(path: Path, memory: bool, as_json: bool) -> None:
    """Show what is inside the quantized folder PATH, and check that its files are whole.

    Of a pipeline all files are checked, whether PATH is the pipeline or the transformer in it.

    \b
    Example: loraq inspect out --memory
    """
    from dataclasses import asdict

    from loraq.checkpoint.inspect import count_stored, inspect_pipeline, read_checked
    from loraq.integrations.diffusers import transformer_folder

    if memory:
        _show_memory(transformer_folder(path), as_json=as_json)
        return
    folder = transformer_folder(path)
    manifest = read_checked(folder)
    checked, size = inspect_pipeline(folder, manifest), count_stored(folder, manifest)
    if as_json:
        layers = {
            name: {"shape": layer.shape, "scheme": asdict(layer.scheme), **layer.record}
            for name, layer in manifest.layers.items()
        }
        files = {name: stored.to_dict() for name, stored in manifest.components.items()}
        components = {"checked": checked, "files": files}
        print_json(
            {
                "recipes": manifest.recipes,
                "layers": layers,
                "components": components,
                **size_document(*size),
            }
        )
        return
    rows, nbytes, weights, kept = [], 0, 0, 0
    for name, layer in manifest.layers.items():
        scheme, branch, stored = layer.scheme, layer.scheme.branch, layer.scheme.nbytes(layer.shape)
        side = f"r{branch.rank} {branch.weight}/{branch.activation}" if branch else "none"
        error = f"{layer.record['relative_error']:.4f}" if "relative_error" in layer.record else ""
        shape, seen = "×".join(map(str, layer.shape)), activation_of(scheme)
        if layer.is_kept:
            kept += 1
        else:
            nbytes, weights = nbytes + stored, weights + math.prod(layer.shape)
        weight = f"{scheme.weight} (kept)" if layer.is_kept else scheme.weight
        rows.append((name, shape, weight, seen, side, size_of(stored), error))
    print_table(("layer", "out×in", "weight", "activation", "branch", "size", "error"), rows)
    bits = f"{8 * nbytes / max(1, weights):.3f} bits per weight"
    click.echo(f"{len(rows) - kept} quantized layers, {size_of(nbytes)}, {bits}.")
    if kept:
        click.echo(f"{kept} layers are kept in 8 bits.")
    show_size(*size)
    if with_stats := sum("stats_sha256" in layer.record for layer in manifest.layers.values()):
        click.echo(
            f"{with_stats} of them were made with activation statistics: their error counts "
            "weights, not outputs."
        )
    click.echo("All files are as they were written.")
    if n_others := len(manifest.components):
        click.echo(
            f"So are the other files of the pipeline: {n_others}."
            if checked
            else f"The other files of its pipeline ({n_others}) are not here, and were not checked."
        )


def _show_memory(folder: Path, *, as_json: bool) -> None:
    from dataclasses import asdict

    from loraq.checkpoint.inspect import measure_memory

    found = measure_memory(folder)
    if as_json:
        print_json({"memory": [asdict(each) for each in found]})
        return
    headings = ("back end", "packed", "kept", "not quantized", "total", "× bf16")
    base = max(1, found[0].total)
    rows = (
        (m.backend, *map(size_of, m.parts), f"{m.total / base:.2f}", str(m.refused)) for m in found
    )
    print_table((*headings, "layers refused"), rows)
    click.echo(
        "'float' is the model before, in 16 bits; 'auto' is what runs unless another is asked for. "
        "The memory of activations is not counted. A refused layer is counted on 'auto'."
    )


@command
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
def compare(a: Path, b: Path, as_json: bool) -> None:
    """Show the relative weight error between the folders A and B, layer by layer.

    Either may be quantized.

    \b
    Example: loraq compare PixArt-Sigma/transformer out
    """
    from loraq.checkpoint.inspect import compare as compare_folders
    from loraq.integrations.diffusers import transformer_folder

    differences = compare_folders(transformer_folder(a), transformer_folder(b))
    mean = sum(d.relative_error for d in differences) / len(differences)
    if as_json:
        layers = [
            {"name": d.name, "shape": d.shape, "relative_error": d.relative_error}
            for d in differences
        ]
        print_json({"mean_relative_error": mean, "layers": layers})
        return
    rows = [(d.name, "×".join(map(str, d.shape)), f"{d.relative_error:.4f}") for d in differences]
    print_table(("layer", "out×in", "error"), rows)
    click.echo(f"Mean relative error of {len(rows)} layers: {mean:.4f}.")


@command
def formats(as_json: bool) -> None:
    """List the number formats, and explain the names of recipes.

    \b
    Example: loraq formats
    """
    from loraq.formats import FORMATS, BlockFormat
    from loraq.recipe_names import GRAMMAR, SHOWCASE

    rows = []
    for fmt in FORMATS.values():
        if isinstance(fmt, BlockFormat):
            block = str(fmt.block_size or "row")
            rows.append(
                (fmt.name, f"{fmt.bits}", block, fmt.scale_format.name, f"{fmt.bits_per_value:g}")
            )
        else:
            rows.append((fmt.name, f"{fmt.bits}", "", "", f"{fmt.bits_per_value:g}"))
    headings = ("format", "bits", "block", "scale", "bits per value")
    if as_json:
        table = [dict(zip(headings, row, strict=True)) for row in rows]
        print_json({"formats": table, "grammar": GRAMMAR, "recipes": SHOWCASE})
        return
    print_table(headings, rows)
    click.echo(f"A recipe is a .toml or .json file, or a name:\n\n{GRAMMAR}\n")
    print_table(("recipe", ""), SHOWCASE.items())


@command
def methods(as_json: bool) -> None:
    """List the methods that quantize a weight.

    \b
    Example: loraq methods
    """
    from dataclasses import fields

    from loraq.methods import METHODS

    headings = ("method", "branch", "statistics", "efforts", "options", "what it does")
    rows = [
        (
            method.name,
            method.branch,
            method.use_of_stats,
            ", ".join(method.efforts) or "one",
            ", ".join(option.name for option in fields(method)),
            method.summary,
        )
        for _, method in sorted(METHODS.items())
    ]
    if as_json:
        print_json({"methods": [dict(zip(headings, row, strict=True)) for row in rows]})
        return
    # Options are many: they stand in a recipe file, and here only in the JSON document.
    print_table(headings[:4] + headings[5:], [row[:4] + row[5:] for row in rows])
