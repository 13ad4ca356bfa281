"""The main job on a small trained model: quantize in every way at equal bytes, and measure."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from loraq.checkpoint.inspect import FLOAT, measure_memory
from loraq.checkpoint.model import save
from loraq.checkpoint.summary import Summary
from loraq.devices import AUTO, find_devices
from loraq.evaluation.contender import Contender, Row, simulate
from loraq.evaluation.metrics import psnr_db, relative_error
from loraq.evaluation.subject import Subject
from loraq.kernels import DEFAULT_BACKEND
from loraq.options import Range, Workers, checked
from loraq.pipeline.collect import collect_stats
from loraq.pipeline.module import plan_model, quantize_
from loraq.pipeline.report import Report
from loraq.recipe_names import NAMED
from loraq.stats import ActivationStats

#: Statistics of what the layers see while the float model draws samples from noise.
OWN_SAMPLES = "own samples"
#: SVDQuant as published: scales of the largest value, no search.
DIRECT = {"scale_rule": None}
#: SVDQuant with all that LoRaQ gets: alternation, searched scales, factors rotated in rank space.
HELPED = {"rounds": 100, "rotate": True}
#: Alternations of the short demo: a hundred take most of its time, and gain percents.
SHORT_ROUNDS = 20


#: Grouped by the activations of the main path, which are never mixed in one comparison. Every row
#: of LoRaQ has its twin: SVDQuant with the same formats and rotation, helped.
CONTENDERS: dict[str, tuple[Contender, ...]] = {
    "weight-only": (
        Contender("round to nearest", "mxfp4-a16", "rtn"),
        Contender("round to nearest, INT4", "int4-a16", "rtn"),
        Contender("plain INT5 (more bytes)", "int5-a16", "rtn"),
        Contender("SVDQuant, 16-bit branch", "mxfp4-a16+bf16", "svdquant", DIRECT),
        Contender("SVDQuant ×100, 16-bit branch", "mxfp4-a16+bf16", "svdquant", HELPED),
        Contender("LoRaQ, 16-bit branch", "mxfp4-a16+bf16"),
        Contender("SVDQuant ×100, 8-bit branch", "mxfp4-a16+w8a8", "svdquant", HELPED),
        Contender("LoRaQ, 8-bit branch", "mxfp4-a16+w8a8"),
        Contender("SVDQuant ×100, INT4 main, 8-bit branch", "int4-a16+w8a8", "svdquant", HELPED),
        Contender("LoRaQ, INT4 main, 8-bit branch", "int4-a16+w8a8"),
    ),
    "weight-only, own samples (still no data)": (
        Contender("GPTQ, INT4", "int4-a16", "gptq", statistics=OWN_SAMPLES),
        Contender(
            "SVDQuant + GPTQ, 16-bit branch", "int4-a16+bf16", "gptq", statistics=OWN_SAMPLES
        ),
        Contender(
            "SVDQuant ×100 + GPTQ, smoothed, 4-bit branch",
            "int4-a16+w4a8-s",
            "gptq",
            HELPED,
            statistics=OWN_SAMPLES,
        ),
        Contender("LoRaQ, smoothed, 4-bit branch", "int4-a16+w4a8-s", statistics=OWN_SAMPLES),
    ),
    "4-bit weights, 8-bit activations": (
        Contender("round to nearest", "mxfp4-a8", "rtn"),
        Contender("SVDQuant, 16-bit branch", "mxfp4-a8+bf16", "svdquant", DIRECT),
        Contender("SVDQuant ×100, W8A8 branch", "mxfp4-a8+w8a8", "svdquant", HELPED),
        Contender("LoRaQ, W8A8 branch", "mxfp4-a8+w8a8"),
        Contender("SVDQuant ×100, W4A8 branch", "mxfp4-a8+w4a8", "svdquant", HELPED),
        Contender("LoRaQ, W4A8 branch", "mxfp4-a8+w4a8"),
    ),
    "INT4 weights, INT8 activations": (
        Contender("round to nearest", "int4-a8", "rtn"),
        Contender("SVDQuant, 16-bit branch", "int4-a8+bf16", "svdquant", DIRECT),
        Contender("SVDQuant ×100, INT8 branch", "int4-a8+int8", "svdquant", HELPED),
        Contender("LoRaQ, INT8 branch", "int4-a8+int8"),
        Contender("SVDQuant ×100, W8A16 branch", "int4-a8+w8a16", "svdquant", HELPED),
        Contender("LoRaQ, W8A16 branch", "int4-a8+w8a16"),
    ),
    "4-bit weights, 4-bit activations": (
        Contender("round to nearest", "mxfp4-a4", "rtn"),
        Contender("SVDQuant, 16-bit branch", "mxfp4-a4+bf16", "svdquant", DIRECT),
        Contender("SVDQuant ×100, W8A8 branch", "mxfp4-a4+w8a8", "svdquant", HELPED),
        Contender("LoRaQ, W8A8 branch", "mxfp4-a4+w8a8"),
        Contender("SVDQuant ×100, W4A8 branch", "mxfp4-a4+w4a8", "svdquant", HELPED),
        Contender("LoRaQ, W4A8 branch", "mxfp4-a4+w4a8"),
    ),
}


#: The recipes of the short demo, by group: weight-only, because that is what runs unless somebody
#: asks for rounded activations, and of these the ones that docs/quality.md is judged by.
SHORT_RECIPES = dict(zip(list(CONTENDERS)[:2], ("int4-a16+w8a8", "int4-a16+w4a8-s"), strict=True))


def choose_short() -> dict[str, tuple[Contender, ...]]:
    """Return the rows of the short demo: a recipe by LoRaQ, and by SVDQuant at the same bytes.

    Before the first stands its main format alone, rounded to nearest. SVDQuant alternates less
    often than among all rows. Stronger rivals are in docs/quality.md.
    """
    return {
        group: tuple(
            _shorten(each)
            for each in CONTENDERS[group]
            if each.recipe == recipe
            or (each.recipe, each.method) == (recipe.partition("+")[0], "rtn")
        )
        for group, recipe in SHORT_RECIPES.items()
    }


def _shorten(row: Contender) -> Contender:
    label, options = row.label.partition(",")[0], row.options
    if "rounds" in options:
        label = label.replace(f"×{options['rounds']}", f"×{SHORT_ROUNDS}")
        options = options | {"rounds": SHORT_ROUNDS}
    return replace(row, label=label, options=options)


@dataclass(frozen=True, kw_only=True)
class DemoRow(Row):
    """One line of the demo."""

    #: Bytes of the quantized layers.
    nbytes: int
    #: Bytes of the whole model when it runs, on the back end that runs unless another is asked for:
    #: those that `loraq inspect --memory` measures, and of a quantized model what decoding its
    #: largest layer takes. Activations are not counted.
    memory: int
    #: ‖v − v̂‖ / ‖v‖ of one forward on noised real images, against the model as trained. The
    #: discriminating figure.
    velocity_error: float
    #: Median over the samples, against the sample of the model as trained from the same noise.
    psnr_db: float
    #: Of digits: share of samples that the judge reads as their class, and the Fréchet distance of
    #: its features to real ones. Neither can see differences at 4 bits.
    accuracy: float | None = None
    frechet: float | None = None


@dataclass(frozen=True)
class DemoResult:
    """All rows, and what the report draws."""

    subject: Subject
    rows: tuple[DemoRow, ...]
    #: Samples of every row, from the same noise; the first are those of the model as trained.
    images: tuple[Tensor, ...]
    #: Of method "loraq".
    effort: str


@checked
def run(  # noqa: PLR0913 - each is an option of the command too
    subject: Subject,
    *,
    every: bool = False,
    n_images: Annotated[int, Range(2, 100_000)] | None = None,
    steps: Annotated[int, Range(1, 100_000)] = 10,
    effort: Literal["fast", "default", "best"] = "default",
    device: str | torch.device = AUTO,
    workers: Workers = 1,
    progress: Callable[[str], None],
) -> DemoResult:
    """Quantize, generate and measure contenders.

    Args:
        subject: what is quantized.
        every: whether all are measured, in every format; else those of `choose_short`.
        n_images: samples for each contender, from the same noise; `None`: as many as suit it.
        steps: Euler steps of the sampler.
        effort: of method "loraq".
        device: where layers are solved, as for `quantize_`; images are drawn on the CPU.
        workers: layers solved at a time.
        progress: called with a line before each contender.
    """
    find_devices(device)  # what is not there is refused before long work
    trained = subject.load(torch.float32)
    labels = subject.labels(n_images or subject.n_images)
    velocity = subject.probe(trained)
    reference = subject.sample(trained, labels, seed=0, steps=steps)
    progress("statistics of the model's own samples")
    own = own_statistics(subject, trained, steps)

    def measure(model: torch.nn.Module, images: Tensor) -> dict[str, Any]:
        psnr = psnr_db(reference, images, data_range=2.0)
        return {
            "velocity_error": relative_error(velocity, subject.probe(model)),
            "psnr_db": psnr.median().item(),
            **(subject.judge(images, labels) if subject.judge else {}),
        }

    groups = CONTENDERS if every else choose_short()
    n_weights, float_memory = 0, 0
    rows: list[DemoRow] = []
    pictures = [reference]
    total = sum(map(len, groups.values()))
    for group, contenders in groups.items():
        for contender in contenders:
            progress(
                f"[{len(rows) + 1} of {total}] {group}: {contender.label} ({contender.recipe})"
            )
            model = copy.deepcopy(trained)
            stats = own if contender.statistics else None
            recipe = contender.to_recipe(budget=subject.budget, effort=effort)
            report = quantize_(
                model, recipe, stats=stats, device=device, workers=workers, progress=False
            )
            float_memory, memory = measure_loaded(model)
            simulate(model)
            pictures.append(subject.sample(model, labels, seed=0, steps=steps))
            measured = measure(model, pictures[-1]) | {"memory": memory}
            rows.append(_row(group, contender, report, measured))
            n_weights = sum(math.prod(layer.shape) for layer in report.layers)
    trained_row = DemoRow(
        group="as trained",
        label="16 bits",
        method="",
        nbytes=2 * n_weights,
        memory=float_memory,
        bits_per_weight=16.0,
        weight_error=0.0,
        seconds=0.0,
        **measure(trained, reference),
    )
    return DemoResult(subject, (trained_row, *rows), tuple(pictures), effort)


def measure_loaded(model: torch.nn.Module) -> tuple[int, int]:
    """Return the bytes of a quantized model before it was quantized and as it runs, in bf16.

    It is saved for that, and what is measured is what a user would load. It runs with its largest
    layer decoded beside the packed ones, as `loraq report` and the model card count it.
    """
    with TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        # The method of nn.Module: that of diffusers has something to say of every cast.
        save(torch.nn.Module.to(copy.deepcopy(model), torch.bfloat16), place)
        found = {memory.backend: memory.total for memory in measure_memory(place)}
        scratch = Summary.read(place).scratch
    return found[FLOAT], found[DEFAULT_BACKEND] + scratch


def own_statistics(
    subject: Subject, trained: torch.nn.Module, steps: int
) -> Mapping[str, ActivationStats]:
    """Return statistics of the layers' inputs while the model draws samples.

    No row is judged by samples from the same noise.
    """
    recipe = Contender("", next(iter(SHORT_RECIPES.values()))).to_recipe(
        budget=subject.budget, effort="fast"
    )
    names = [layer.name for layer in plan_model(trained, recipe).quantized if not layer.is_kept]
    labels = subject.labels(subject.n_own)
    return collect_stats(
        trained, lambda: subject.sample(trained, labels, seed=1, steps=steps), names
    )


def _row(group: str, contender: Contender, report: Report, measured: dict[str, Any]) -> DemoRow:
    return DemoRow(
        group=group,
        label=contender.label
        + (" ★" if contender.recipe == NAMED["default"] and contender.method == "loraq" else ""),
        recipe=contender.recipe,
        method=contender.method,
        nbytes=sum(layer.nbytes for layer in report.layers),
        bits_per_weight=report.plan.bits_per_weight,
        weight_error=report.mean_relative_error,
        seconds=sum(layer.seconds for layer in report.layers),
        **measured,
    )
