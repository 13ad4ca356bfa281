"""`loraq inspect`, `compare`, `formats` and `methods`: look at what is there."""

import math
from dataclasses import asdict, replace
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
    from loraq.checkpoint.manifest import Manifest


@command
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--memory", is_flag=True, help="Measure what the loaded model takes on each back end instead."
)
def inspect(path: Path, memory: bool, as_json: bool) -> None:
    """Show what is inside the quantized folder PATH, and check that its files are whole.

    Of a pipeline all quantized models are shown; all of its files are checked, whether PATH is the
    pipeline or a model in it.

    \b
    Example: loraq inspect out --memory
    """
    from loraq.checkpoint.inspect import inspect_folder

    if memory:
        _show_memory(path, as_json=as_json)
        return
    found = inspect_folder(_home_of(path))
    if as_json:
        files = {name: stored.to_dict() for name, stored in found.others.items()}
        components = {"checked": found.is_checked, "files": files}
        models = {
            name: {**_document(manifest), **size_document(*found.sizes[name])}
            for name, manifest in found.manifests.items()
        }
        shown = models.popitem()[1] if len(models) == 1 else {"models": models}
        print_json({**shown, "components": components})
        return
    for name, manifest in found.manifests.items():
        if len(found.manifests) > 1:
            click.echo(f"{show(name)}:")
        _show_layers(manifest)
        show_size(*found.sizes[name])
        if len(found.manifests) > 1:
            click.echo()
    click.echo("All files are as they were written.")
    if n_others := len(found.others):
        click.echo(
            f"So are the other files of the pipeline: {n_others}."
            if found.is_checked
            else f"The other files of its pipeline ({n_others}) are not here, and were not checked."
        )


def _home_of(path: Path) -> Path:
    """Return the folder of a pipeline or of a model, or refuse what is neither."""
    from loraq.checkpoint.model_index import is_pipeline
    from loraq.integrations.diffusers import model_folder

    return path if is_pipeline(path) else model_folder(path)


def _document(manifest: "Manifest") -> dict[str, Any]:
    layers = {
        name: {"shape": layer.shape, "scheme": asdict(layer.scheme), **layer.record}
        for name, layer in manifest.layers.items()
    }
    return {"recipes": manifest.recipes, "layers": layers}


def _show_layers(manifest: "Manifest") -> None:
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
    loras: dict[str, list[float]] = {}
    for layer in manifest.layers.values():
        for part in layer.stack.loras:
            loras.setdefault(part.name, []).append(part.scale)
    for lora, scales in loras.items():
        click.echo(
            f"LoRA '{show(lora)}' at scale {scales[0]:g} is appended to {len(scales)} layers; the "
            "errors are those without it."
        )
    if with_stats := sum("stats_sha256" in layer.record for layer in manifest.layers.values()):
        click.echo(
            f"{with_stats} of them were made with activation statistics: their error counts "
            "weights, not outputs."
        )


def _show_memory(path: Path, *, as_json: bool) -> None:
    from loraq.checkpoint.inspect import find_packed, measure_memory
    from loraq.checkpoint.model_index import is_pipeline

    home = _home_of(path)
    folders = find_packed(home) if is_pipeline(home) else {"": home}
    found = {name: measure_memory(folder) for name, folder in folders.items()}
    if as_json:
        tables = {name: [asdict(each) for each in table] for name, table in found.items()}
        print_json({"memory": tables.popitem()[1] if len(tables) == 1 else tables})
        return
    headings = ("back end", "packed", "kept", "not quantized", "total", "× bf16")
    for name, table in found.items():
        if len(found) > 1:
            click.echo(f"{show(name)}:")
        base = max(1, table[0].total)
        rows = (
            (m.backend, *map(size_of, m.parts), f"{m.total / base:.2f}", str(m.refused))
            for m in table
        )
        print_table((*headings, "layers refused"), rows)
        if len(found) > 1:
            click.echo()
    click.echo(
        "'float' is the model before, in 16 bits; 'auto' is what runs unless another is asked for. "
        "The memory of activations is not counted. A refused layer is counted on 'auto'."
    )


@command
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
def compare(a: Path, b: Path, as_json: bool) -> None:
    """Show the relative weight error between the folders A and B, layer by layer.

    Either may be quantized. Of pipelines all models are compared that are quantized in either.

    \b
    Example: loraq compare PixArt-Sigma/transformer out
    """
    from loraq.checkpoint.inspect import compare as compare_folders

    pairs = _pair(a, b)
    differences = [
        replace(d, name=f"{name}/{d.name}" if len(pairs) > 1 else d.name)
        for name, folders in pairs.items()
        for d in compare_folders(*folders)
    ]
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


def _pair(a: Path, b: Path) -> dict[str, tuple[Path, Path]]:
    """Return the folders of the models to compare, by component."""
    from loraq.checkpoint.model_index import is_pipeline, read_components
    from loraq.integrations.diffusers import model_folder

    if not (is_pipeline(a) and is_pipeline(b)):
        return {"": (model_folder(a, quantized=True), model_folder(b, quantized=True))}
    first, second = read_components(a), read_components(b)
    packed = [
        name
        for name, part in first.items()
        if part.is_packed or (name in second and second[name].is_packed)
    ]
    if not packed:
        return {"": (model_folder(a), model_folder(b))}
    return {name: (a / name, b / name) for name in packed}


@command
def formats(as_json: bool) -> None:
    """List the number formats, and explain the names of recipes.

    \b
    Example: loraq formats
    """
    from loraq.formats import FORMATS, BlockFormat
    from loraq.recipe_names import GRAMMAR, SHOWCASE
    from loraq.targets import INTRODUCTION, target_recipes

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
        summaries = {name: recipe.summary for name, recipe in target_recipes().items()}
        document = {"formats": table, "grammar": GRAMMAR, "recipes": SHOWCASE, "targets": summaries}
        print_json(document)
        return
    print_table(headings, rows)
    click.echo(f"A recipe is a .toml or .json file, or a name:\n\n{GRAMMAR}\n")
    print_table(("recipe", ""), SHOWCASE.items())
    click.echo(f"\n{INTRODUCTION}\n")
    made = [(name, each.limits.name, each.summary) for name, each in target_recipes().items()]
    print_table(("recipe", "--to", ""), made)


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
