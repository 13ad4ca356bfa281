"""`evaluate`: two pipelines draw the same prompts from the same noise; how far apart they are."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import loraq.diffusers  # noqa: F401 (quantized folders can be loaded then)
from loraq.checkpoint.apart import require_apart
from loraq.checkpoint.model_index import read_components
from loraq.devices import AUTO, find_device
from loraq.errors import LoraqError
from loraq.evaluation import weights as sources
from loraq.evaluation.drawn import Artist, Settings, draw
from loraq.evaluation.features import (
    clip_scores,
    dinov2_features,
    inception_features,
    read_image,
)
from loraq.evaluation.libraries import inception_class, torchmetrics
from loraq.evaluation.lpips import LPIPS
from loraq.evaluation.metrics import frechet_distance, psnr_db
from loraq.evaluation.prompts import Prompt
from loraq.integrations.drawing import pipeline_class, pipeline_folder, require_call
from loraq.integrations.hub import local_path
from loraq.layer_input import INPUT_DTYPES
from loraq.options import checked
from loraq.pipeline.progress import ImageCallback, show_images
from loraq.safetensors.header import DTYPES
from loraq.safetensors.reader import ShardReader

#: Samples of the images, with replacement, that give an interval, and what it holds of them.
_RESAMPLES, _CONFIDENCE = 2000, 0.95


@dataclass(frozen=True)
class Figure:
    """One metric: a mean over the images with its interval, or one number for all of them."""

    name: str
    value: float
    #: Ends of the 95 % interval by bootstrap over the images; `None` for what is no mean.
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What a run of `evaluate` has found."""

    #: Images of each of the two, in the order of the prompts.
    images_a: tuple[Path, ...]
    images_b: tuple[Path, ...]
    figures: tuple[Figure, ...]

    def figure(self, name: str) -> Figure:
        """Return the figure of a name."""
        return next(figure for figure in self.figures if figure.name == name)


@dataclass(frozen=True)
class _Networks:
    """Where the weights of the metrics that were asked for are; `None` for the others."""

    lpips: Path | None
    inception: Path | None
    dinov2: Path | None
    clip: Path | None

    @classmethod
    def find(cls, folder: Path | None, *, lpips: bool, fid: bool, clip: bool) -> "_Networks":
        """Find libraries and weights, or say which is missing, before anything is drawn."""
        torchmetrics()
        if fid:
            inception_class()
        return cls(
            sources.ALEXNET.find(folder) if lpips else None,
            sources.INCEPTION.find(folder) if fid else None,
            sources.DINOV2.find(folder) if fid else None,
            sources.CLIP.find(folder) if clip else None,
        )


@checked
def evaluate(  # noqa: PLR0913 - each is an option of the command too
    a: str | Path,
    b: str | Path,
    prompts: Sequence[Prompt],
    images: str | Path,
    *,
    lpips: bool = True,
    fid: bool = False,
    clip: bool = False,
    weights: str | Path | None = None,
    call: Mapping[str, Any] | None = None,
    device: str | torch.device = AUTO,
    dtype: torch.dtype | None = None,
    simulate: bool = False,
    progress: ImageCallback | bool = True,
) -> Evaluation:
    """Draw the same prompts from the same noise by two pipelines, one after the other, and compare.

    Images that an earlier run has drawn with the same weights and settings are used again; a run
    that was killed goes on.

    Args:
        a: the reference: folder of a pipeline, or a repository of the hub.
        b: what is judged: another pipeline, or the folder of a model, which takes the place of a's
            model of its class.
        prompts: of `read_named_prompts`.
        images: folder in which images are kept, in a folder for each pipeline and settings.
        lpips: whether LPIPS is computed.
        fid: whether the Fréchet distances of Inception and DINOv2 are computed, of b's images from
            a's.
        clip: whether the CLIP score of both is computed.
        weights: folder of the metrics' weights, looked at before the usual caches.
        call: further arguments of both pipelines' calls, such as `{"num_inference_steps": 4}`.
        device: such as "cuda"; by default a GPU if there is one.
        dtype: of both pipelines; `None` takes that in which a's denoiser is stored.
        simulate: whether activations are rounded as the recipe says on every device, as published
            tables have it; else as they would run on this one (`loraq.set_activations`).
        progress: False for silence, True for lines on stderr, or a function to call after each
            image.

    Raises:
        DeviceError: there is no such device.
        CheckpointError: a pipeline cannot be read, or the images cannot be written.
        LoraqError: a metric's weights or library are missing, an argument does not fit, there are
            too few prompts, a pipeline fails, or the images of the two differ in size.
    """
    _require_prompts(prompts, fid=fid)
    _require_plain(call or {})
    networks = _Networks.find(
        None if weights is None else Path(weights), lpips=lpips, fid=fid, clip=clip
    )
    place = find_device(device)
    first = Artist(pipeline_folder(local_path(a)))
    second = Artist.of(local_path(b), first)
    require_apart(images, first.folder, second.folder, second.model)
    for artist in (first, second):
        require_call(pipeline_class(artist.folder), call or {}, prompt=True)
    settings = Settings(dtype or _stored_dtype(first.folder), place, call or {}, simulate)
    images_a, images_b = (
        draw(artist, prompts, Path(images), settings, show_images(progress, "evaluate"))
        for artist in (first, second)
    )
    figures = [*_compare_pairs(images_a, images_b, networks.lpips, place)]
    if networks.clip:
        texts = [prompt.text for prompt in prompts]
        for name, drawn in (("CLIP score of A", images_a), ("CLIP score of B", images_b)):
            figures.append(_mean(name, clip_scores(drawn, texts, networks.clip, place)))
    for name, see, file in (
        ("FID", inception_features, networks.inception),
        ("FD DINOv2", dinov2_features, networks.dinov2),
    ):
        if file is not None:
            seen = (see(drawn, file, place) for drawn in (images_b, images_a))
            figures.append(Figure(name, frechet_distance(*seen)))
    return Evaluation(tuple(images_a), tuple(images_b), tuple(figures))


def _require_prompts(prompts: Sequence[Prompt], *, fid: bool) -> None:
    least = 2 if fid else 1
    if len(prompts) < least:
        why = ": the spread of its images is a part of the Fréchet distance" if fid else ""
        raise LoraqError(
            f"The number of prompts is {len(prompts)}, and at least {least} is required{why}."
        )


def _require_plain(call: Mapping[str, Any]) -> None:
    """Require what can be written beside the images, which says what they were drawn with."""
    for name, value in call.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise LoraqError(
                f"The argument '{name}' of `call` is of {type(value).__name__} and cannot be "
                f"written as JSON ({error}). Numbers, texts, lists and tables of these are "
                "required."
            ) from error


def _compare_pairs(
    images_a: Sequence[Path], images_b: Sequence[Path], alexnet: Path | None, device: torch.device
) -> Iterator[Figure]:
    """Yield what is a mean over pairs, as the tables of SVDQuant have it."""
    lpips = None if alexnet is None else LPIPS(alexnet).to(device)
    ssim = torchmetrics().functional.image.structural_similarity_index_measure
    found: dict[str, list[float]] = {}
    for paths in zip(images_a, images_b, strict=True):
        a, b = (_pixels(path) for path in paths)
        if a.shape != b.shape:
            sizes = (f"{x.shape[3]}×{x.shape[2]}" for x in (a, b))
            raise LoraqError(
                f"'{paths[0]}' and '{paths[1]}' differ in size: {' and '.join(sizes)} pixels. Give "
                "the pipelines the same height and width (`--set`, `call`)."
            )
        found.setdefault("PSNR", []).append(psnr_db(a, b, 1.0).item())
        a, b = a.to(device), b.to(device)
        # Its own mean, which counts the border that it adds: published tables have that one.
        found.setdefault("SSIM", []).append(ssim(b, a, data_range=1.0).item())
        if lpips:
            found.setdefault("LPIPS", []).append(lpips(a, b).item())
    for name, values in found.items():
        yield _mean(name, torch.tensor(values))


def _pixels(path: Path) -> Tensor:
    """Return an image as (1, 3, height, width) in [0, 1]."""
    try:
        pixels = numpy.array(read_image(path), dtype=numpy.float32)
    except OSError as error:
        raise LoraqError(
            f"Cannot read '{path}': {error}. Delete it, and run the same command to draw it again."
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0) / 255


def _mean(name: str, values: Tensor) -> Figure:
    """Return the mean over images, with its interval by the bootstrap."""
    values = values.double()
    mean = values.mean().item()
    if not math.isfinite(mean):  # of equal images the PSNR is infinite
        return Figure(name, mean)
    generator = torch.Generator().manual_seed(0)
    draws = (
        torch.randint(len(values), (_RESAMPLES // 20, len(values)), generator=generator)
        for _ in range(20)  # all at once would take gigabytes for tens of thousands of images
    )
    means = torch.cat([values[draw].mean(dim=1) for draw in draws])
    outside = (1 - _CONFIDENCE) / 2
    low, high = means.quantile(torch.tensor([outside, 1 - outside]).double()).tolist()
    return Figure(name, mean, low, high)


def _stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of most of what is float in a pipeline's first denoiser."""
    denoisers = [part.folder for part in read_components(folder).values() if part.is_denoiser]
    if not denoisers:
        raise LoraqError(
            f"'{folder}' has no transformer and no U-Net. Say which dtype (`--dtype`)."
        )
    reader = ShardReader(denoisers[0])
    counts = Counter(DTYPES[reader.dtype(name)] for name in reader.names)
    floats = [kind for kind, _ in counts.most_common() if kind in INPUT_DTYPES]
    return floats[0] if floats else torch.float32
