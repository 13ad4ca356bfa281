"""`collect_pipeline_stats`: statistics of the samples that a float pipeline draws by itself.

Nothing but the pipeline is needed. It starts from noise, on empty prompts unless others are given,
and runs all its timesteps; so its layers see what they will see later, as far as the prompts are
like those to come.
"""

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraq.checkpoint.apart import require_apart
from loraq.checkpoint.stats_file import require_room
from loraq.devices import AUTO, find_device
from loraq.errors import CalibrationError, LoraqError
from loraq.integrations.diffusers import empty_model, float_folder
from loraq.integrations.drawing import (
    draw_seeded,
    load_pipeline,
    pipeline_class,
    pipeline_folder,
    require_call,
)
from loraq.integrations.hub import local_path
from loraq.options import Seed, checked
from loraq.pipeline.collect import collect_stats, group_layers, shapes_of
from loraq.pipeline.plan import Plan
from loraq.pipeline.progress import ImageCallback, show_images
from loraq.pipeline.requirements import find_users, require_enough
from loraq.recipe import Recipe, file_of
from loraq.regular_file import read_regular
from loraq.safetensors.fp8 import decode_fp8, require_unscaled
from loraq.safetensors.header import DTYPES
from loraq.safetensors.reader import ShardReader
from loraq.scheme import Scheme

#: Images that are drawn unless the caller says otherwise.
DEFAULT_SAMPLES = 8
#: The longest file of prompts that is read.
_MOST_PROMPT_BYTES = 16_000_000
#: What the counts of layers take together unless the caller says otherwise.
DEFAULT_MEMORY_BYTES = 8_000_000_000


@dataclass(frozen=True)
class StatsReport:
    """What a run of `collect_pipeline_stats` has made."""

    #: The file, and its size.
    target: Path
    nbytes: int
    #: Dotted names of the layers in it.
    layers: tuple[str, ...]
    #: Images drawn in each run, and runs.
    samples: int
    passes: int
    #: Wall time of loading and all runs.
    seconds: float


@checked
def collect_pipeline_stats(  # noqa: PLR0913 - each is an option of the command too
    source: str | Path,
    target: str | Path,
    recipe: str | Path | Scheme | Recipe = "default",
    *,
    component: str | None = None,
    variant: str | None = None,
    prompts: Sequence[str] = (),
    samples: int | None = None,
    steps: int | None = None,
    seed: Seed = 0,
    second_moment: bool = True,
    sensitivity: bool = False,
    max_tokens: int | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    device: str | torch.device = AUTO,
    dtype: torch.dtype | None = None,
    call: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: ImageCallback | bool = True,
) -> StatsReport:
    """Let a float pipeline draw images, and write the statistics of its layers' inputs to a file.

    Without prompts no data is used. The same arguments give the same bytes on the same machine with
    as many threads, whatever `memory_bytes` is.

    Args:
        source: folder of a diffusers pipeline (model_index.json, safetensors), or a repository of
            the hub.
        target: the safetensors file to make, for `stats` of `quantize_checkpoint` and `quantize_`.
        recipe: says which layers are quantized, and by which method; the others are left out.
        component: whose layers are counted, such as "transformer_2"; `None` takes the only
            denoiser. Each of several gets a file of its own.
        variant: which of several copies of the weights is loaded, such as "fp16".
        prompts: one image after the other gets the next of them; empty for images of the empty
            prompt. With prompts quantization becomes data-aware: choose such as will be used.
        samples: images to draw; `None` takes one for each prompt, or `DEFAULT_SAMPLES` of the empty
            one.
        steps: of each image; `None` takes the pipeline's own default.
        seed: image i starts from the noise of seed + i.
        second_moment: whether all of E[x xᵀ] is collected; else only E[x²], in a file a thousand
            times smaller.
        sensitivity: whether timesteps and outputs count by what errors of them do to what the model
            returns, as `collect_stats` has it. The model takes three to four times as
            long, and memory for gradients beside `memory_bytes`.
        max_tokens: inputs that a layer counts in all, spread evenly over images and steps; `None`
            counts all. A pipeline that calls its model twice a step counts twice as many.
        memory_bytes: what the counts of layers may take together beside the pipeline. Where all are
            more, all images are drawn once for each group of layers.
        device: where the pipeline runs, such as "cuda:1"; "auto" is a GPU if there is one.
        dtype: of the whole pipeline; `None` takes that of the stored transformer.
        call: further arguments of the pipeline's call but its generator, such as `{"height": 512,
            "width": 512}`.
        overwrite: whether a file that is there may be replaced.
        progress: False for silence, True for lines on stderr, or a function to call after each
            image.

    Raises:
        CalibrationError: a number is out of range, no layer uses statistics, mean squares are not
            enough for the recipe's method, the pipeline fails or has no gradients, a layer was
            never called, or one alone takes more than `memory_bytes`.
        CheckpointError: the source is not a float pipeline, or the target cannot be written.
        DeviceError: there is no such device.
        LoraqError: diffusers is not installed, or the pipeline cannot be run with these arguments.
        RecipeError, SchemeError: the recipe cannot be read, or does not fit the model.
    """
    folder = pipeline_folder(local_path(source, variant))
    home, target = float_folder(folder, component), Path(target)
    require_apart(target, folder, file_of(recipe))
    place = find_device(device)
    recipe, weights = Recipe.of(recipe), ShardReader(home, variant)
    require_unscaled(weights)
    using = find_users(Plan.of_model(empty_model(home), recipe), recipe)
    if not second_moment:
        require_enough(using, recipe)
    widths = {layer.name: layer.shape[1] for layer in using}
    groups = group_layers(widths, memory_bytes, second_moment=second_moment)
    shapes = shapes_of(
        {layer.name: layer.matrix for layer in using},
        second_moment=second_moment,
        sensitivity=sensitivity,
    )
    nbytes = require_room(target, shapes, overwrite=overwrite)
    sampling = _Sampling.of(pipeline_class(folder), prompts, samples, steps, seed, call or {})
    tokens_per_call = None if max_tokens is None else sampling.share(max_tokens)

    show = show_images(progress, "stats")
    images = sampling.samples * len(groups)
    show(
        0,
        images,
        f"{len(using)} layers, {nbytes / 1e9:.3g} GB on the disk. To count in "
        f"{memory_bytes / 1e9:.3g} GB, runs of {sampling.samples} images: {len(groups)}. Loading "
        "the pipeline.",
    )
    dtype = dtype or DTYPES[decode_fp8(weights).dtype(f"{using[0].name}.weight")]
    done = 0

    def run() -> None:
        nonlocal done
        for i in range(sampling.samples):
            sampling.draw(pipeline, i)
            done += 1
            show(done, images, f"run {(done - 1) // sampling.samples + 1} of {len(groups)}")

    begin = time.perf_counter()
    # Loading draws random numbers too.
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        pipeline = load_pipeline(folder, dtype, place, variant=variant)
        show(0, images, f"drawing on {place} in {dtype}")
        model = getattr(pipeline, home.name)
        if sensitivity and getattr(model, "_supports_gradient_checkpointing", False):
            model.enable_gradient_checkpointing()
        collect_stats(
            model,
            run,
            widths,
            second_moment=second_moment,
            sensitivity=sensitivity,
            tokens_per_call=tokens_per_call,
            memory_bytes=memory_bytes,
            target=target,
        )
    seconds = time.perf_counter() - begin
    return StatsReport(target, nbytes, tuple(widths), sampling.samples, len(groups), seconds)


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one a line; blank lines count as none.

    Raises:
        CalibrationError: there is no such file, it is not text, or it holds no prompt.
    """
    try:
        lines = read_regular(path, _MOST_PROMPT_BYTES).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"Cannot read the prompts '{path}': {error}. A text file is required."
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise CalibrationError(
            f"'{path}' holds no prompt. One prompt a line is required; without a file the empty "
            "prompt is used."
        )
    return prompts


@dataclass(frozen=True)
class _Sampling:
    """How a pipeline of a class draws its images."""

    kind: type
    prompts: tuple[str, ...]
    samples: int
    seed: int
    #: Arguments of every call.
    call: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        kind: type,
        prompts: Sequence[str],
        samples: int | None,
        steps: int | None,
        seed: int,
        call: Mapping[str, Any],
    ) -> "_Sampling":
        """Check everything that can be known before the pipeline is loaded."""
        if samples is None:
            samples = len(prompts) or DEFAULT_SAMPLES
        for name, number in {"samples": samples, "steps": steps}.items():
            if number is not None and number < 1:
                raise CalibrationError(f"{name} is {number}. It must be at least 1.")
        call = {**({} if steps is None else {"num_inference_steps": steps}), **call}
        takes = require_call(kind, call, prompt=bool(prompts))
        if "output_type" in takes:
            call = {"output_type": "latent", **call}  # what a VAE would make of it does not matter
        return cls(kind, tuple(prompts) or ("",) if "prompt" in takes else (), samples, seed, call)

    def share(self, max_tokens: int) -> int:
        """Return how many inputs of each call a layer counts, so that all are `max_tokens`."""
        parameter = inspect.signature(self.kind.__call__).parameters.get("num_inference_steps")
        steps = self.call.get("num_inference_steps", parameter and parameter.default)
        if not isinstance(steps, int):
            raise CalibrationError(
                f"{self.kind.__name__} does not say how many steps it takes. Give `--steps`."
            )
        calls = self.samples * steps
        if max_tokens < calls:
            raise CalibrationError(
                f"max_tokens is {max_tokens}, and {self.samples} images of {steps} steps call the "
                f"model {calls} times. At least {calls} are required, one of each call; or draw "
                "fewer images."
            )
        return max_tokens // calls

    def draw(self, pipeline: Any, index: int) -> None:
        """Draw an image and forget it."""
        call = dict(self.call)
        if self.prompts:
            call.setdefault("prompt", self.prompts[index % len(self.prompts)])
        try:
            draw_seeded(pipeline, self.seed + index, call)
        except LoraqError:
            raise
        except Exception as error:  # pipelines raise what they like
            raise CalibrationError(
                f"{self.kind.__name__} fails on image {index + 1} ({error}). Its arguments can be "
                "set: `--set`, or `call`."
            ) from error
