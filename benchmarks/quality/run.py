"""Which method leaves a trained transformer nearest to itself, at the same stored bytes?

Two test-beds: the digits transformer of the repository, and the patches transformer
(`benchmarks/worlds/patches.py`: 20 million parameters, trained on photographs, heavier activation
outliers). Every branch gets at most the bytes of a 16-bit one of rank 32/1152 of the width, unless
the table says otherwise; a branch-free format has fewer. Activations are never mixed in one table.
"From weights alone" sees no data and never runs the model. "Own samples" sees second moments of
what goes into each layer while the float model draws pictures from noise: no data either, but the
model must run.

Read the velocity error: one forward on noised real images against the model as trained, one for
each seed of the solver. `field.py` says who meets whom, `tables.py` in which tables and which LoRaQ
row is declared; tables on rotation, activations, statistics and allocation are measured when
`--tables` names them. Every row and seed is a line in `benchmarks/results/quality`: what is there
is not measured again, so a run may be killed, and goes on when it is started again.

First all rows qualify, on seeds that the page does not use; then the declared rows, the rivals as
published and the strongest three of each table are measured on the page's seeds:

    nice -n 19 python -m benchmarks.quality.run --qualify --workers 2
    nice -n 19 python -m benchmarks.quality.run --workers 2
    nice -n 19 python -m benchmarks.quality.run --workers 2 --pictures   # samples too, first seed
"""

import copy
import gc
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import log10
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import loraq
from benchmarks.quality import ledger
from benchmarks.quality.field import Entrant
from benchmarks.quality.ranking import finalists, name_of, qualifiers
from benchmarks.quality.smoothing import divide_inputs, smooth
from benchmarks.quality.tables import CONTENDERS, QUALIFYING, SEEDS, TEXT_SIDE, all_tables
from benchmarks.record import environment, options
from benchmarks.worlds.world import OWN_SAMPLES, OWN_SENSITIVITY, WORLDS, World
from loraq.evaluation.contender import Contender, simulate
from loraq.evaluation.metrics import frechet_distance, psnr_db, relative_error, ssim
from loraq.layers import linear_layers, quantized_layers
from loraq.pipeline.module import plan_model, quantize_
from loraq.recipe import Recipe

#: Tokens of each layer's real inputs that its output error is measured on, and the seed they come
#: from.
TOKENS, INPUT_SEED = 256, 50


@dataclass(frozen=True)
class Exact:
    """What the float model of a world does; what every row is compared with."""

    velocities: dict[int, Tensor]
    #: Of the first seed.
    samples: Tensor | None
    #: Real inputs of every layer.
    inputs: dict[str, Tensor]
    #: Inputs of every layer while the model draws samples of its own.
    tokens: dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """A row to measure with one seed."""

    world: str
    group: str
    index: int
    seed: int
    effort: str
    pictures: bool
    #: Fingerprint of the line that is there, if one is.
    known: str = ""

    @property
    def contender(self) -> Contender:
        """The row's contender."""
        return all_tables(self.world)[self.group][self.index]

    @property
    def rounds(self) -> int:
        """Alternations that it is asked for; 0 where it does none."""
        return int(self.contender.options.get("rounds", 0))

    @property
    def names(self) -> tuple[str, str, str]:
        """What tells a reader which row it is."""
        return self.contender.label, self.contender.recipe, f"seed {self.seed}"


def main() -> None:
    """Measure what is not measured yet, a line for every row and seed."""
    chosen = options(
        __doc__,
        seeds=(SEEDS, "seeds of the solver, each with images and noise of its own"),
        worlds=(tuple(WORLDS), "trained transformers (default: both)"),
        tables=(("",), "tables, by their titles (default: all comparisons)"),
        qualify="measure all rows on the seeds that qualify",
        all="measure all rows, not only those that qualified",
        pictures="draw samples as well, with the first seed",
        workers=(1, "rows measured at a time, one thread each (default: 1)"),
        effort=("fast", "of LoRaQ, unless a row says otherwise (default: fast)"),
    )
    titles = [title for title in chosen.tables if title]
    known = {title: None for world in WORLDS for title in all_tables(world)}
    for title in titles:
        if title not in known:
            raise SystemExit(f"There is no table '{title}'. Tables: {'; '.join(known)}.")
    seeds = QUALIFYING if chosen.qualify and chosen.seeds == SEEDS else chosen.seeds
    for name in chosen.worlds:
        lines, jobs = ledger.read(), []
        for group, rows in all_tables(name).items():
            if group not in (titles or CONTENDERS):
                continue
            going = set(range(len(rows)))
            if group in CONTENDERS and not chosen.all:
                going = (qualifiers if chosen.qualify else finalists)(lines, name, group)
            for seed in seeds:
                for index in sorted(going):
                    done = lines.get((name, group, *name_of(rows[index])), {}).get(seed, {})
                    pictures = chosen.pictures and seed == SEEDS[0]
                    known_as = "" if pictures and "psnr_db" not in done else done.get("fingerprint")
                    jobs.append(
                        Job(name, group, index, seed, chosen.effort, pictures, known_as or "")
                    )
        # Seed by seed, and of the alternating rivals the longest first: a run that is killed has
        # met the strongest.
        jobs.sort(key=lambda job: (job.seed, job.rounds > 0, -job.rounds))
        run(name, jobs, chosen.workers)


def run(name: str, jobs: list[Job], workers: int) -> None:
    """Measure jobs of one world, and add each result to the ledger as it comes."""
    if not jobs:
        return
    sources = {job.contender.statistics for job in jobs} - {""}
    record, failed = environment(), []
    with tempfile.TemporaryDirectory() as folder:
        place, pictures = Path(folder), any(job.pictures for job in jobs)
        exact = look_at(WORLDS[name], {job.seed for job in jobs}, sources, place, pictures)
        (place / "exact.pickle").write_bytes(pickle.dumps(exact))
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            waiting = {pool.submit(measure, job, place): job for job in jobs}
            for count, done in enumerate(as_completed(waiting), 1):
                job = waiting[done]
                row = f"{count}/{len(jobs)} {name}: {job.group}: {', '.join(job.names)}"
                try:
                    line = done.result()
                except Exception as error:  # one row that fails must not lose the others
                    failed.append(row)
                    print(f"{row}: FAILED: {error!r}", flush=True)
                    continue
                if line:
                    kept = ("date", "commit", "changed", "torch", "cpu_count")
                    ledger.add(line | {item: record[item] for item in kept})
                    print(f"{row}: {line['velocity_error']:.4f}", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} rows failed:\n" + "\n".join(failed))


def look_at(
    world: World, seeds: set[int], sources: set[str], folder: Path, pictures: bool
) -> Exact:
    """Run the float model, and save its statistics from each source."""
    trained = world.load(torch.float32)
    widest = replace(Recipe.named("int4+bf16-r5"), rules=TEXT_SIDE)
    names = [layer.name for layer in loraq.plan_model(trained, widest).quantized]
    tokens: dict[str, Tensor] = {}
    if OWN_SENSITIVITY in sources:  # whose passes for gradients are no tokens of their own
        sources = sources | {OWN_SAMPLES}
    for name in sources:
        source = world.sources[name]
        keeping = keep_tokens(trained, names, every_call=16)
        found = next(keeping)
        collected = loraq.collect_stats(
            trained,
            partial(source.run, trained),
            names,
            second_moment=source.second_moment,
            sensitivity=source.sensitivity,
        )
        next(keeping, None)
        if name == OWN_SAMPLES:
            tokens = found
        loraq.save_stats(collected, folder / f"{name}.safetensors")
    keeping = keep_tokens(trained, names, every_call=TOKENS)
    inputs = next(keeping)
    world.probe(trained, seed=INPUT_SEED)
    next(keeping, None)
    samples = draw_samples(trained, world, SEEDS[0]) if pictures else None
    velocities = {seed: world.probe(trained, seed=seed) for seed in seeds}
    return Exact(velocities, samples, inputs, tokens)


def keep_tokens(
    model: nn.Module, names: list[str], *, every_call: int
) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that fills with tokens of each layer's inputs until the next step."""
    found: dict[str, Tensor] = {}

    def keep(name: str, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].detach().flatten(0, -2)
        some = tokens[:: max(1, len(tokens) // every_call)][:every_call].clone()
        found[name] = torch.cat([found.get(name, some[:0]), some])[:TOKENS]

    layers = linear_layers(model)
    hooks = [layers[name].register_forward_pre_hook(partial(keep, name)) for name in names]
    yield found
    for hook in hooks:
        hook.remove()


def draw_samples(model: nn.Module, world: World, seed: int) -> Tensor:
    """Return the samples that one seed is judged by, drawn in ten steps without guidance."""
    return world.sample(
        model, torch.arange(world.n_samples) % world.n_labels, seed=seed, steps=10, guidance=1.0
    )


@lru_cache(maxsize=1)
def _of_world(name: str, place: Path) -> tuple[nn.Module, Exact]:
    torch.set_num_threads(1)
    return WORLDS[name].load(torch.float32), pickle.loads((place / "exact.pickle").read_bytes())


def measure(job: Job, place: Path) -> dict[str, Any] | None:
    """Return what becomes of the model in one row with one seed; `None` if that is known."""
    world, contender = WORLDS[job.world], job.contender
    fingerprint = ledger.fingerprint(contender, world.budget, job.effort)
    if fingerprint == job.known:
        return None
    trained, exact = _of_world(job.world, place)
    recipe = contender.to_recipe(budget=world.budget, effort=job.effort)
    if contender.adapt:
        recipe = contender.adapt(trained, recipe)
    recipe, model = replace(recipe, seed=job.seed), copy.deepcopy(trained)
    stats: Any = place / f"{contender.statistics}.safetensors" if contender.statistics else None
    factors: Mapping[str, Tensor] = {}
    if isinstance(contender, Entrant) and contender.smoothing:
        schemes = {layer.name: layer.scheme for layer in plan_model(model, recipe).quantized}
        opened = loraq.load_stats(stats)
        factors, stats = smooth(model, contender.smoothing, schemes, opened, exact.tokens)
    gc.collect()
    before = reset_peak()
    done = quantize_(model, recipe, stats=stats, progress=False)
    grown = peak_kib() - before
    simulate(model)
    if factors:
        divide_inputs(model, factors)
    if contender.finish:
        contender.finish(model)
    found: dict[str, Any] = {
        "velocity_error": relative_error(
            exact.velocities[job.seed], world.probe(model, seed=job.seed)
        ),
        "bits_per_weight": done.plan.bits_per_weight,
        "weight_error": done.mean_relative_error,
        "output_error": fmean(output_errors(trained, model, exact.inputs)),
        "seconds": sum(layer.seconds for layer in done.layers),
        "peak_bytes": 1024 * grown,
        "n_layers": len(done.layers),
    }
    for name in ("optimized", "refitted"):
        told = [layer.metrics[name] for layer in done.layers if name in layer.metrics]
        if told:
            found[name] = round(sum(told))
    if job.pictures and exact.samples is not None:
        found |= judge_samples(world, draw_samples(model, world, job.seed), exact.samples)
    named = {"world": job.world, "group": job.group, "label": contender.label, "seed": job.seed}
    named |= {"recipe": contender.recipe, "method": contender.method, "effort": recipe.effort}
    named |= {"budget": contender.budget or "", "fingerprint": fingerprint}
    return named | found


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
        if name in inputs
    ]


if __name__ == "__main__":
    main()
