"""What the demo quantizes: a small trained transformer, and how it is looked at."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Subject(NamedTuple):
    """A trained transformer that draws pictures from labels."""

    #: What it is, in words: "of 5 million parameters that draws …".
    about: str
    #: What quantizes it.
    command: str
    #: Of its files; nothing is written among them.
    folder: Path
    #: Budget whose share of the weights is that of a 16-bit branch of rank 32 of width 1152.
    budget: str
    load: Callable[[torch.dtype], nn.Module]
    #: Returns what two models are compared by.
    probe: Callable[[nn.Module], Tensor]
    #: Draws pictures in [-1, 1], (batch, channels, height, width), of labels; `seed`, `steps`.
    sample: Callable[..., Tensor]
    #: Labels of the first samples.
    labels: Callable[[int], Tensor]
    #: Samples of each row, unless somebody asks for others.
    n_images: int
    #: Samples that statistics are collected on.
    n_own: int
    #: What samples of labels say besides, by the name of the figure.
    judge: Callable[[Tensor, Tensor], dict[str, float]] | None = None
    #: Name of what a label stands for.
    name: Callable[[int], str] = str
