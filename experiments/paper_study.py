"""The job that the studies of the paper's models share: quantize, generate, compare, one table.

`pixart_sigma.py` and `sana.py` say which model, with which settings, and what was published.
"""

import argparse
import json
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

import loraq
from loraq.evaluation.contender import Contender, Row
from loraq.evaluation.paired import Evaluation, evaluate
from loraq.evaluation.prompts import Prompt, read_named_prompts
from loraq.integrations.checkpoints import quantize_checkpoint
from loraq.integrations.hub import local_path
from loraq.recipe import Recipe
from tiny_pipelines import SENTENCES

#: What others have published of the same models.
PUBLISHED = Path(__file__).parent / "published.toml"


#: SVDQuant with all that LoRaQ gets from weights alone: a hundred alternations, searched scales,
#: factors rotated in rank space.
HELPED = "svdquant-x100"


def contender(method: str, recipe: str) -> Contender:
    """Return a contender that is called what it is; a method may be `HELPED`."""
    label = f"{method}-{recipe}"
    if method == HELPED:
        return Contender(label, recipe, "svdquant", {"rounds": 100, "rotate": True})
    return Contender(label, recipe, method)


def both(recipe: str) -> tuple[Contender, Contender]:
    """Return LoRaQ and its rival with the same formats and the same branch."""
    return contender(HELPED, recipe), contender("loraq", recipe)


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
    *both("int4+bf16-r32"),
    *both("nvfp4+bf16-r32"),
    *both("mxfp4+bf16-r32"),
    # The paper's quantized branches: W8A8, W6A6, W4A8; floating and integer elements.
    *both("mxfp4+w8a8-h0"),
    *both("mxfp4+w6a6-h0"),
    *both("mxfp4+w4a8-h0"),
    *both("mxint4+w8a8-h0"),
    *both("mxint4+w6a6-h0"),
    *both("mxint4+w4a8-h0"),
    # With the rotation of the input that 4-bit activations get by default here.
    *both("mxfp4+w6a8"),
    # Main path at 8-bit activations, as the authors' kernels run it; and the default of this
    # package.
    *both("mxfp4-a8+w8a8"),
    *both("default"),
    # What docs/quality.md is judged by, from weights alone, beside the default.
    *both("int4-a16+w8a8-h0"),
    *both("int4-a4+w4a16-h32"),
    *both("nvfp4-a4+w4a16-h0"),
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
    #: Of the pipelines, as published.
    dtype: str = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class StudyRow(Row):
    """One line of a study; image figures are means against the float model's images."""

    #: Bytes of the transformer's weight files.
    nbytes: int
    psnr_db: float
    ssim: float
    #: `None` where AlexNet's weights were not there.
    lpips: float | None


def main(study: Study, argv: list[str] | None = None) -> list[StudyRow]:
    """Run a study from the command line, print its table, and write `results.json`."""
    options = _options(study, argv)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    source = _tiny(study, out / "tiny") if options.local_tiny else local_path(options.source)
    call = {**study.call, **(study.tiny_call if options.local_tiny else {})}
    if options.steps:
        call["num_inference_steps"] = options.steps
    prompts = _prompts(options.prompts, options.images)

    def compare(model: Path) -> Evaluation:
        return evaluate(
            source,
            model,
            prompts,
            out / "images",
            lpips=options.lpips,
            weights=options.weights,
            call=call,
            device=options.device,
            dtype=getattr(torch, options.dtype),
            simulate=True,  # W4A4 on every device, as it was published
        )

    rows = []
    for asked in options.only or CONTENDERS:
        folder, recipe = out / "models" / asked.label, asked.to_recipe(effort=options.effort)
        figures = _quantize(source / "transformer", folder, recipe, options.workers)
        rows.append(_row(asked, folder, compare(folder), figures))
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
        "--prompts", type=Path, help="MJHQ's meta_data.json, sDCI.yaml, or a text file"
    )
    parser.add_argument("--no-lpips", dest="lpips", action="store_false", help="without LPIPS")
    parser.add_argument("--weights", type=Path, help="folder with the weights of AlexNet")
    parser.add_argument("--steps", type=int, help="sampling steps instead of the published setting")
    parser.add_argument("--effort", default="default", choices=["fast", "default", "best"])
    parser.add_argument("--workers", type=int, default=1, help="layers solved at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=study.dtype, choices=["bfloat16", "float16", "float32"])
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


def _prompts(file: Path | None, n: int) -> tuple[Prompt, ...]:
    if file is not None:
        return read_named_prompts(file, n)
    return tuple(Prompt(f"{i:05d}", SENTENCES[i % len(SENTENCES)]) for i in range(n))


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


def _row(
    measured: Contender,
    folder: Path,
    found: Evaluation,
    figures: tuple[float, float, float],
) -> StudyRow:
    """Return a row from what the images say, and the figures of `_quantize`."""
    bits, error, seconds = figures
    means = {figure.name: figure.value for figure in found.figures}
    return StudyRow(
        group="quantized",
        label=measured.label,
        method=measured.method,
        recipe=measured.recipe,
        nbytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        bits_per_weight=bits,
        weight_error=error,
        psnr_db=means["PSNR"],
        ssim=means["SSIM"],
        lpips=means.get("LPIPS"),
        seconds=seconds,
    )


def _line(row: StudyRow) -> str:
    cells = (
        f"{row.label.removesuffix(f'-{row.recipe}'):{len(HELPED)}}",
        f"{row.recipe:18}",
        f"{row.nbytes / 1e6:9.2f}",
        f"{row.bits_per_weight:6.2f}",
    )
    quality = (f"{row.weight_error:10.4f}", f"{row.psnr_db:8.2f}", f"{row.ssim:7.4f}")
    lpips = f"{'–' if row.lpips is None else f'{row.lpips:.4f}':>7}"
    return " ".join((*cells, *quality, lpips, f"{row.seconds:10.1f}"))


def _table(rows: list[StudyRow]) -> Iterator[str]:
    yield (
        "method        recipe                    MB   bits weight err  PSNR dB    SSIM   LPIPS "
        "quantize s\n" + "-" * 97
    )
    yield from map(_line, rows)


def published(name: str) -> Iterator[str]:
    """Yield the published rows of a model, and where they are from."""
    content = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))
    headings = (f"{'published':18}", f"{'format':12}", " PSNR dB", "   SSIM", "  LPIPS", "   FID")
    yield " ".join((*headings, " source"))
    for row in content[name]:
        numbers = (
            f"{row.get(key, '–'):>{width}}"
            for key, width in (("psnr", 8), ("ssim", 7), ("lpips", 7), ("fid", 6))
        )
        cells = (f"{row['method']:18}", f"{row.get('format', ''):12}", *numbers)
        yield " ".join((*cells, f" {row['source']}"))
    for key, text in content["sources"].items():
        yield f"{key}: {text}"


def _report(study: Study, rows: list[StudyRow], options: argparse.Namespace, n: int) -> None:
    print(
        f"\n{study.name}, {n} images, {options.device}, {options.dtype}, effort {options.effort}\n"
    )
    print("\n".join((*_table(rows), "", *published(study.name))))
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
