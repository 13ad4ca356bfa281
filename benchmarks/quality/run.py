"""Which method leaves a trained transformer nearest to itself, at the same stored bytes?

Two test-beds: the digits transformer that ships with the package, and the patches transformer
(`benchmarks/worlds/patches.py`: 20 million parameters, trained on photographs, heavier activation
outliers). Every contender gets at most the bytes of a 16-bit branch of rank 32/1152 of the width,
unless its label says otherwise; a branch-free format has fewer or more. Activations are never
mixed in one table. "From weights alone" sees no data and never runs the model. "Own samples" sees
second moments of what goes into each layer while the float model draws pictures from noise: no
data either, but the model must run.

Read the velocity error: one forward on noised real images against the model as trained, one for
each seed of the solver. What the other columns of the record mean, and the tables with confidence
intervals, is on the page that `make docs` makes of it, docs/quality.md. `tables.py` says who is in
which table; those on rotation, activations, statistics and allocation are measured when
`--tables` names them.

    python -m benchmarks.quality.run --fast --workers 2 --save
    python -m benchmarks.quality.run --fast --tables "Rotation, W4A4, from weights alone"
"""

import copy
import gc
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from math import log10
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

import loraq
from benchmarks.quality.row import ModelRow
from benchmarks.quality.tables import TEXT_SIDE, all_tables, comparisons
from benchmarks.record import options, report
from benchmarks.worlds.world import WORLDS, World
from loraq.evaluation.contender import simulate
from loraq.evaluation.metrics import frechet_distance, psnr_db, relative_error, ssim
from loraq.layers import linear_layers, quantized_layers
from loraq.pipeline.module import quantize_
from loraq.recipe import Recipe

#: Tokens of each layer's real inputs that its output error is measured on, and the seed they come
#: from.
TOKENS, INPUT_SEED = 256, 50


class Exact(NamedTuple):
    """What the float model of a world does; what every row is compared with."""

    velocities: list[Tensor]
    samples: list[Tensor]
    #: Real inputs of every layer.
    inputs: dict[str, Tensor]
    #: Folder with a file for every source of statistics that is used.
    statistics: Path


def main() -> None:
    """Print a line for every row, and a JSON line for every world."""
    chosen = options(
        __doc__,
        seeds=(
            3,
            "seeds of the solver, each with images and noise of its own (default: 3, at most 8)",
        ),
        worlds=(tuple(WORLDS), "trained transformers (default: both)"),
        tables=(("",), "tables, by their titles (default: all but the studies)"),
        fast="effort 'fast' instead of the default",
        workers=(1, "rows measured at a time, one thread each (default: 1)"),
    )
    titles = [title for title in chosen.tables if title]
    known = {title: None for world in WORLDS for title in all_tables(world)}
    for title in titles:
        if title not in known:
            raise SystemExit(f"There is no table '{title}'. Tables: {'; '.join(known)}.")
    for name in chosen.worlds:
        tables = {title: rows for title, rows in all_tables(name).items() if title in titles}
        tables = tables or ({} if titles else comparisons(name))
        if not tables:
            continue
        jobs = [(title, i) for title, contenders in tables.items() for i in range(len(contenders))]
        sources = {c.statistics for table in tables.values() for c in table if c.statistics}
        effort, rows = "fast" if chosen.fast else "default", []
        with tempfile.TemporaryDirectory() as folder:
            exact = look_at(WORLDS[name], chosen.seeds, sources, Path(folder))
            # A process for each row, so that its memory is its own.
            with ProcessPoolExecutor(
                chosen.workers, get_context("spawn"), max_tasks_per_child=1
            ) as pool:
                one = partial(measure, name, exact, effort)
                for row in pool.map(one, *zip(*jobs, strict=True)):
                    error = fmean(row.velocity_errors)
                    print(f"{name}: {row.group}: {row.label}: {error:.4f}", flush=True)
                    rows.append(row.to_record())
        report(rows, save=chosen.save)


def look_at(world: World, n_seeds: int, sources: set[str], folder: Path) -> Exact:
    """Run the float model, and save its statistics from each source."""
    trained = world.load(torch.float32)
    widest = replace(Recipe.named("int4+bf16-r5"), rules=TEXT_SIDE)
    names = [layer.name for layer in loraq.plan_model(trained, widest).quantized]
    for name in sources:
        source = world.sources[name]
        collected = loraq.collect_stats(
            trained, partial(source.run, trained), names, second_moment=source.second_moment
        )
        loraq.save_stats(collected, folder / f"{name}.safetensors")
    seeds = range(n_seeds)
    return Exact(
        [world.probe(trained, seed=seed) for seed in seeds],
        [draw_samples(trained, world, seed) for seed in seeds],
        collect_inputs(trained, world, names),
        folder,
    )


def draw_samples(model: nn.Module, world: World, seed: int) -> Tensor:
    """Return the samples that one seed is judged by, drawn in ten steps without guidance."""
    return world.sample(
        model, torch.arange(world.n_samples) % world.n_labels, seed=seed, steps=10, guidance=1.0
    )


def collect_inputs(model: nn.Module, world: World, names: list[str]) -> dict[str, Tensor]:
    """Return some tokens of what goes into each layer."""
    found: dict[str, Tensor] = {}

    def keep(name: str, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].flatten(0, -2)
        found[name] = tokens[:: max(1, len(tokens) // TOKENS)][:TOKENS].clone()

    layers = linear_layers(model)
    hooks = [layers[name].register_forward_pre_hook(partial(keep, name)) for name in names]
    world.probe(model, seed=INPUT_SEED)
    for hook in hooks:
        hook.remove()
    return found


def measure(name: str, exact: Exact, effort: str, group: str, index: int) -> ModelRow:
    """Return one row: what becomes of the model with each seed."""
    torch.set_num_threads(1)
    world = WORLDS[name]
    contender = all_tables(name)[group][index]
    trained = world.load(torch.float32)
    recipe = contender.to_recipe(budget=world.budget, effort=effort)
    if contender.adapt:
        recipe = contender.adapt(trained, recipe)
    stats = (
        exact.statistics / f"{contender.statistics}.safetensors" if contender.statistics else None
    )
    velocities, drawn, of_first = [], [], {}
    for seed, velocity in enumerate(exact.velocities):
        model = copy.deepcopy(trained)
        gc.collect()
        before = reset_peak()
        done = quantize_(model, replace(recipe, seed=seed), stats=stats, progress=False)
        grown = peak_kib() - before
        simulate(model)
        if contender.finish:
            contender.finish(model)
        if seed == 0:
            of_first = {
                "peak_bytes": 1024 * grown,
                "output_error": fmean(output_errors(trained, model, exact.inputs)),
                "seconds": sum(layer.seconds for layer in done.layers),
            }
        velocities.append(relative_error(velocity, world.probe(model, seed=seed)))
        drawn.append(draw_samples(model, world, seed))
    return ModelRow(
        world=name,
        group=group,
        label=contender.label,
        recipe=contender.recipe,
        method=contender.method,
        effort=recipe.effort,
        same_bytes=contender.same_bytes,
        velocity_errors=tuple(velocities),
        bits_per_weight=done.plan.bits_per_weight,
        weight_error=done.mean_relative_error,
        **of_first,
        **judge_samples(world, torch.cat(drawn), torch.cat(exact.samples)),
    )


def judge_samples(world: World, ours: Tensor, exact: Tensor) -> dict[str, float]:
    """Return what samples can tell, against those of the model as trained."""
    found = {"psnr_db": -10 * log10((10 ** (-psnr_db(exact, ours, 2.0) / 10)).mean())}
    if ours.shape[-1] >= 11:
        found["ssim"] = ssim(exact, ours, 2.0).mean().item()
    if world.features is not None:
        real = world.features()
        found["frechet"] = frechet_distance(world.features(ours), real)
        found["frechet_as_trained"] = frechet_distance(world.features(exact), real)
    return found


def reset_peak() -> int:
    """Forget the process's peak memory, as Linux lets it, and return what it has now, in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_kib()


def peak_kib() -> int:
    """Return the process's peak memory in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


@torch.no_grad()
def output_errors(trained: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> list[float]:
    """Return the relative output error of every quantized layer on its own real inputs."""
    exact = linear_layers(trained)
    return [
        relative_error(exact[name](inputs[name]), layer(inputs[name]))
        for name, layer in quantized_layers(model).items()
    ]


if __name__ == "__main__":
    main()
