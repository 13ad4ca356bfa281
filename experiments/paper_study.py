"""The job that the studies of the paper's models share: quantize, generate, compare, one table.

`pixart_sigma.py` and `sana.py` say which model, with which settings, and what was published.
"""

import argparse
import gc
import json
import random
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import loraq.diffusers
from loraq.evaluation.contender import Contender, Row
from loraq.evaluation.metrics import psnr_db, ssim
from loraq.integrations.checkpoints import quantize_checkpoint
from loraq.recipe import Recipe
from tiny_pipelines import SENTENCES


def contender(method: str, recipe: str) -> Contender:
    """Return a contender that is called what it is."""
    return Contender(f"{method}-{recipe}", recipe, method)


#: All rows with a branch get at most the bytes of SVDQuant's 16-bit rank 32 in
#: the same main format.
CONTENDERS = (
    contender("rtn", "int4"),
    contender("rtn", "nvfp4"),
    contender("rtn", "mxfp4"),
    # SVDQuant in its native formats, and in the paper's.
    contender("svdquant", "int4+bf16-r32"),
    contender("svdquant", "nvfp4+bf16-r32"),
    contender("svdquant", "mxfp4+bf16-r32"),
    # LoRaQ with the same 16-bit branch.
    contender("loraq", "int4+bf16-r32"),
    contender("loraq", "nvfp4+bf16-r32"),
    contender("loraq", "mxfp4+bf16-r32"),
    # The paper's quantized branches: W8A8, W6A6, W4A8; floating and integer elements.
    contender("loraq", "mxfp4+w8a8-h0"),
    contender("loraq", "mxfp4+w6a6-h0"),
    contender("loraq", "mxfp4+w4a8-h0"),
    contender("loraq", "mxint4+w8a8-h0"),
    contender("loraq", "mxint4+w6a6-h0"),
    contender("loraq", "mxint4+w4a8-h0"),
    # With the rotation of the input that 4-bit activations get by default here.
    contender("loraq", "mxfp4+w6a8"),
    # Main path at 8-bit activations, as the authors' kernels run it; and the default of this
    # package.
    contender("loraq", "mxfp4-a8+w8a8"),
    contender("loraq", "default"),
)


@dataclass(frozen=True)
class Study:
    """One model of the paper."""

    name: str
    #: Where the real weights are.
    hub_id: str
    #: Arguments of the pipeline's call.
    call: dict[str, Any]
    #: Writes a small pipeline of the same class into a folder.
    tiny: Callable[[Path], Path]
    #: Arguments of the call for that one.
    tiny_call: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StudyRow(Row):
    """One line of a study; image figures are against the float model's, same prompts and seeds."""

    #: Bytes of the transformer's parameters.
    nbytes: int
    #: Median over the images; infinite for the float model.
    psnr_db: float
    ssim: float
    seconds_per_image: float
    #: Peak of the accelerator while images are made; without one, peak resident memory of this
    #: process so far.
    peak_bytes: int


def main(study: Study, argv: list[str] | None = None) -> list[StudyRow]:
    """Run a study from the command line, print its table, and write `results.json`."""
    options = _options(study, argv)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    source = _tiny(study, out / "tiny") if options.local_tiny else _local(options.source)
    call = {**study.call, **(study.tiny_call if options.local_tiny else {})}
    if options.steps:
        call["num_inference_steps"] = options.steps
    prompts = _prompts(options.prompts, options.images)
    dtype = getattr(torch, options.dtype)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(source, dtype=dtype).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    exact, seconds = _images(pipeline, prompts, call)
    _write_images(exact, out / "images" / "float")
    kind = type(pipeline.transformer)
    trained = contender("float", options.dtype)
    rows = [_row(trained, pipeline.transformer, (exact, exact), seconds, (16.0, 0.0, 0.0))]
    print(_line(rows[0]), flush=True)
    for asked in options.only or CONTENDERS:
        folder, recipe = out / "models" / asked.label, asked.to_recipe(effort=options.effort)
        figures = _quantize(source / "transformer", folder, recipe, options.workers)
        pipeline.transformer = None
        gc.collect()
        pipeline.transformer = kind.from_pretrained(folder, dtype=dtype).to(options.device)
        images, seconds = _images(pipeline, prompts, call)
        _write_images(images, out / "images" / folder.name)
        rows.append(_row(asked, pipeline.transformer, (exact, images), seconds, figures))
        print(_line(rows[-1]), flush=True)
    _report(study, rows, options, len(prompts))
    return rows


def _options(study: Study, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Quantize {study.name} in the paper's configurations and compare."
    )
    parser.add_argument(
        "--source", default=study.hub_id, help="pipeline folder or hub id (default: %(default)s)"
    )
    parser.add_argument(
        "--local-tiny", action="store_true", help="a small pipeline with random weights instead"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("studies") / study.name, help="where results go"
    )
    parser.add_argument("--images", type=int, default=8, help="number of prompts")
    parser.add_argument(
        "--prompts", type=Path, help="text file, one a line; or MJHQ's meta_data.json"
    )
    parser.add_argument("--steps", type=int, help="sampling steps instead of the published setting")
    parser.add_argument("--effort", default="default", choices=["fast", "default", "best"])
    parser.add_argument("--workers", type=int, default=1, help="layers solved at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--only", nargs="+", type=_contender, metavar="METHOD:RECIPE", help="only these rows"
    )
    return parser.parse_args(argv)


def _contender(text: str) -> Contender:
    method, _, recipe = text.partition(":")
    Recipe.of(recipe)
    return contender(method, recipe)


def _tiny(study: Study, folder: Path) -> Path:
    """Return a small pipeline.

    That of an earlier run, if there is one: training a tokenizer is not repeatable.
    """
    return folder if (folder / "model_index.json").is_file() else study.tiny(folder)


def _local(source: str) -> Path:
    """Return the folder of a pipeline, downloaded if `source` is a hub id."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(source, ignore_patterns=["*.bin", "*.ckpt", "*.pth", "*.md", "*.png"])
    )


def _prompts(file: Path | None, n: int) -> list[str]:
    """Return n prompts.

    Of a JSON table by key, those that a shuffle of the keys with seed 0 puts first, sorted.
    """
    if file is None:
        return [SENTENCES[i % len(SENTENCES)] for i in range(n)]
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".json":
        return text.splitlines()[:n]
    table = json.loads(text)
    keys = sorted(table)
    random.Random(0).shuffle(keys)
    return [table[key]["prompt"] for key in sorted(keys[:n])]


def _quantize(
    source: Path, folder: Path, recipe: Recipe, workers: int
) -> tuple[float, float, float]:
    """Return bits per weight, mean weight error and seconds.

    Nothing is quantized if an earlier run did just that.
    """
    file = folder.with_name(f"{folder.name}.json")
    job = {"source": str(source.resolve()), "recipe": recipe.to_dict()}
    done = json.loads(file.read_text()) if file.is_file() else {}
    if done.get("job") != json.loads(json.dumps(job)):
        begin = time.perf_counter()
        report = quantize_checkpoint(source, folder, recipe, workers=workers, overwrite=True)
        figures = (
            report.plan.bits_per_weight,
            report.mean_relative_error,
            time.perf_counter() - begin,
        )
        done = {"job": job, "figures": figures}
        file.write_text(json.dumps(done, indent=2) + "\n")
    bits, error, seconds = done["figures"]
    return bits, error, seconds


def _images(pipeline: Any, prompts: list[str], call: dict[str, Any]) -> tuple[Tensor, float]:
    """Return images (n, 3, height, width) in [0, 1], and the mean seconds for one.

    Each has a seed of its own.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    images = []
    begin = time.perf_counter()
    for seed, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that devices agree
        array = pipeline(prompt, generator=generator, output_type="np", **call).images[0]
        images.append(torch.from_numpy(array).permute(2, 0, 1))
    return torch.stack(images), (time.perf_counter() - begin) / len(prompts)


def _write_images(images: Tensor, folder: Path) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")


def _row(
    measured: Contender,
    transformer: nn.Module,
    images: tuple[Tensor, Tensor],
    seconds_per_image: float,
    figures: tuple[float, float, float],
) -> StudyRow:
    """Return a row from images of the float and of this model, and the figures of `_quantize`."""
    bits, error, seconds = figures
    cuda = torch.cuda.is_available()
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return StudyRow(
        group="float model" if measured.method == "float" else "quantized",
        label=measured.label,
        method=measured.method,
        recipe=measured.recipe,
        nbytes=sum(p.nbytes for p in transformer.parameters()),
        bits_per_weight=bits,
        weight_error=error,
        psnr_db=psnr_db(*images, 1.0).median().item(),
        ssim=ssim(*images, 1.0).median().item(),
        seconds=seconds,
        seconds_per_image=seconds_per_image,
        peak_bytes=peak,
    )


def _line(row: StudyRow) -> str:
    cells = (
        f"{row.method:9}",
        f"{row.recipe:15}",
        f"{row.nbytes / 1e6:9.2f}",
        f"{row.bits_per_weight:6.2f}",
    )
    quality = (f"{row.weight_error:10.4f}", f"{row.psnr_db:8.2f}", f"{row.ssim:7.4f}")
    cost = (
        f"{row.seconds:10.1f}",
        f"{row.seconds_per_image:8.2f}",
        f"{row.peak_bytes / 1e6:8.0f}",
    )
    return " ".join((*cells, *quality, *cost))


def _table(rows: list[StudyRow]) -> Iterator[str]:
    yield (
        "method    recipe                 MB   bits weight err  PSNR dB    SSIM quantize s  "
        "s/image  peak MB\n" + "-" * 101
    )
    yield from map(_line, rows)


def _report(study: Study, rows: list[StudyRow], options: argparse.Namespace, n: int) -> None:
    print(
        f"\n{study.name}, {n} images, {options.device}, {options.dtype}, effort {options.effort}\n"
    )
    print("\n".join(_table(rows)))
    if options.local_tiny:
        print("\nRandom weights: this shows that everything runs, and says nothing about quality.")
    facts = {
        "loraq": loraq.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    settings = {key: str(value) for key, value in vars(options).items()}
    content = {
        "study": study.name,
        "versions": facts,
        "options": settings,
        "rows": [row.to_record() for row in rows],
    }
    (options.out / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    print(f"\nWritten to {options.out / 'results.json'}, images beside it.")
