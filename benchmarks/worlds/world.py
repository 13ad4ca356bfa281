"""The two trained transformers, each with what quality is measured on."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.worlds import patches
from loraq.evaluation import digits

#: What a table of contenders with statistics of the model's own samples calls them.
OWN_SAMPLES = "own samples"
#: The same samples, weighed by what errors do in them.
OWN_SENSITIVITY = "own samples, sensitivity"
#: Seeds of the samples that statistics are collected on.
OWN_SEED, OTHER_SEED = 1000, 100


class Source(NamedTuple):
    """What lets a model see inputs, so that statistics can be collected."""

    run: Callable[[nn.Module], object]
    #: Whether E[xxᵀ] is collected, and not only E[x²].
    second_moment: bool = True
    #: Whether calls and outputs are weighed by what their errors do.
    sensitivity: bool = False


class World(NamedTuple):
    """A trained transformer, how to probe it, and how to look at its samples."""

    load: Callable[[torch.dtype], nn.Module]
    probe: Callable[..., Tensor]
    sample: Callable[..., Tensor]
    budget: str
    n_labels: int
    #: Samples of each seed.
    n_samples: int
    #: Sources of statistics by name.
    sources: dict[str, Source]
    #: Features in which a Fréchet distance means something, of images or of all real ones; `None`
    #: if there are none.
    features: Callable[..., Tensor] | None = None


def digit_features(images: Tensor | None = None) -> Tensor:
    """Return the judge's features of images, or of all real digits."""
    return digits.Judge.from_assets().features(
        digits.real_digits()[0] if images is None else images
    )


def draw_own(sample: Callable[..., Tensor], count: int, n_labels: int, model: nn.Module) -> None:
    """Draw samples of all labels, as `loraq stats` does with prompts."""
    sample(model, torch.arange(count) % n_labels, seed=OWN_SEED)


def draw_digits(labels: Tensor, model: nn.Module) -> None:
    """Draw digits without guidance."""
    digits.sample(model, labels, seed=OTHER_SEED, steps=20, guidance=1)


def see_noised_digits(model: nn.Module) -> None:
    """Run the model on noised training images."""
    for seed in range(OTHER_SEED, OTHER_SEED + 5):
        digits.velocity_probe(model, count=512, seed=seed)


def _patch_sources() -> dict[str, Source]:
    own = Source(partial(draw_own, patches.sample, 32, patches.NULL_LABEL))
    return {OWN_SAMPLES: own, OWN_SENSITIVITY: own._replace(sensitivity=True)}


def _digit_sources() -> dict[str, Source]:
    every, empty = torch.arange(128) % 10, torch.full((128,), digits.NULL_LABEL)
    runs = {
        "noised training images": see_noised_digits,
        "128 samples, all labels": partial(draw_digits, every),
        "8 samples, all labels": partial(draw_digits, every[:8]),
        "128 samples, empty label": partial(draw_digits, empty),
        "8 samples, empty label": partial(draw_digits, empty[:8]),
    }
    full = {name: Source(run) for name, run in runs.items()}
    squares = {f"{name}, mean squares": Source(run, False) for name, run in runs.items()}
    own = Source(partial(draw_own, digits.sample, 128, 10))
    weighed = own._replace(sensitivity=True)
    return {OWN_SAMPLES: own, OWN_SENSITIVITY: weighed, **full, **squares}


WORLDS = {
    "digits": World(
        load=digits.load_transformer,
        probe=digits.velocity_probe,
        sample=digits.sample,
        budget="r16=5",
        n_labels=10,
        n_samples=200,
        sources=_digit_sources(),
        features=digit_features,
    ),
    "patches": World(
        load=patches.load_transformer,
        probe=patches.velocity_probe,
        sample=patches.sample,
        budget="r16=11",
        n_labels=patches.NULL_LABEL,
        n_samples=32,
        sources=_patch_sources(),
    ),
}
