"""What one class needs besides the general rules of `models`: the
form of the entries, and what they share.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TEXT, SIDE, FRAMES = 2, 8, 4, 2
HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM


@dataclass(frozen=True)
class Own:
    """What one class needs besides the general rules."""

    #: Constructor arguments.
    config: dict[str, Any] = field(default_factory=dict)
    #: Layout of `hidden_states`: "image", "video" or "tokens"; `None` follows the name of the
    #: class.
    layout: str | None = None
    #: Arguments of forward, from the model; they replace or join those that the rules make. `None`
    #: leaves one out.
    inputs: Callable[[nn.Module], dict[str, Any]] = lambda model: {}


def rand(*shape: int) -> Tensor:
    """Return numbers that are the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
