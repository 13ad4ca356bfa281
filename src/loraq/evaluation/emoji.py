"""The emoji model: a picture is drawn from a caption in plain words.

A `PixArtTransformer2DModel` of 20 million parameters (384 wide, 8 transformer blocks) that draws
259 emoji of animals, plants and food, 64×64 in colour, from their Unicode names. Its text encoder
is a frozen table of word vectors, a token for each word of the caption. It is a rectified flow in
pixel space; see `loraq.evaluation.flow`.

Its files do not ship with the package: they are in `benchmarks/assets/emoji` of the repository,
where their README says where they come from.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.evaluation import flow
from loraq.evaluation.subject import Subject
from loraq.safetensors.reader import ShardReader

#: Pixels of a side, of the pictures and of their places on the sheet.
SIZE, COLUMNS = 64, 16
#: Tokens of a caption; the shorter ones end in zeros, and so does the empty one throughout.
N_TOKENS = 5
#: Captions of the first samples, which look nothing alike.
SHOWN = (
    *("red apple", "tiger face", "sunflower", "octopus", "hamburger"),
    *("cactus", "strawberry", "penguin", "slice of pizza", "frog face"),
)


@dataclass(frozen=True)
class Emoji:
    """The files of the emoji model, read when they are needed."""

    folder: Path

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """The caption of every picture, in the order of the sheet."""
        return tuple(json.loads((self.folder / "captions.json").read_text()))

    @cached_property
    def pictures(self) -> Float[Tensor, "count 3 64 64"]:
        """All pictures, in [-1, 1], on white.

        Raises:
            LoraqError: Pillow, which reads them, is not installed.
        """
        try:
            import numpy as np
            from PIL import Image
        except ImportError as error:
            raise LoraqError('The emoji need Pillow. Run: pip install "loraq[demo]"') from error
        with Image.open(self.folder / "pictures.png") as sheet:
            pixels = torch.from_numpy(np.asarray(sheet.convert("RGB")).copy())
        rows = pixels.unflatten(0, (-1, SIZE)).unflatten(2, (COLUMNS, SIZE))
        tiles = rows.permute(0, 2, 4, 1, 3).flatten(0, 1)
        return tiles[: len(self.captions)].float().div(127.5).sub(1)

    def encode(self, texts: list[str]) -> Float[Tensor, "batch 5 100"]:
        """Return the tokens of captions: the vector of each word.

        Args:
            texts: words of the captions; the empty text has no words.

        Raises:
            LoraqError: a word has no vector, or there are more than N_TOKENS.
        """
        vectors = self._word_vectors
        width = next(iter(vectors.values())).numel()
        tokens = torch.zeros(len(texts), N_TOKENS, width, device="cpu")
        for row, text in zip(tokens, texts, strict=True):
            words = text.split()
            if unknown := [word for word in words if word not in vectors] or words[N_TOKENS:]:
                raise LoraqError(
                    f"Caption '{text}' has words that cannot be encoded: {', '.join(unknown)}. Up "
                    f"to {N_TOKENS} words of the emoji's own captions are required."
                )
            for token, word in zip(row, words, strict=False):
                token.copy_(vectors[word])
        return tokens

    def class_tokens(self, labels: Int[Tensor, " batch"]) -> Float[Tensor, "batch 5 100"]:
        """Return the tokens of the caption of each label; the empty one comes after the last."""
        return self._caption_tokens[labels.cpu()].to(labels.device)

    def draw_pictures(
        self, count: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "count 3 64 64"], Int[Tensor, " count"]]:
        """Return random pictures, and their labels."""
        labels = torch.randint(len(self.captions), (count,), generator=generator, device="cpu")
        return self.pictures[labels], labels

    def load_transformer(self, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """Load the trained diffusers transformer, in evaluation mode.

        Raises:
            LoraqError: diffusers is not installed, or the weights are not there.
        """
        return flow.load_compressed(self.folder, dtype)

    def velocity_probe(
        self, transformer: nn.Module, *, count: int = 32, seed: int = 0
    ) -> Float[Tensor, "count 3 64 64"]:
        """Return the velocities of one forward pass on noised pictures.

        Args:
            transformer: the emoji model, quantized or not.
            count: number of pictures; times are stratified, one in each of `count` equal intervals.
            seed: of the choice of pictures, the times and the noise.
        """
        generator = torch.Generator().manual_seed(seed)
        pictures, labels = self.draw_pictures(count, generator)
        return flow.probe(transformer, pictures, self.class_tokens(labels), generator)

    def sample(
        self,
        transformer: nn.Module,
        labels: Int[Tensor, " batch"],
        *,
        seed: int,
        steps: int = 20,
        guidance: float = 2.0,
    ) -> Float[Tensor, "batch 3 64 64"]:
        """Draw one picture for each label, in [-1, 1]; see `loraq.evaluation.flow.sample`.

        Args:
            transformer: the emoji model, quantized or not.
            labels: of the captions.
            seed: of the noise; sample i depends on it and on how many samples there are.
            steps: number of equal Euler steps.
            guidance: classifier-free guidance scale.
        """
        empty = torch.full_like(labels, len(self.captions))
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(labels), 3, SIZE, SIZE, generator=generator, device="cpu")
        return flow.sample(
            transformer,
            noise,
            self.class_tokens(labels),
            self.class_tokens(empty),
            steps=steps,
            guidance=guidance,
        )

    def first_labels(self, count: int) -> Int[Tensor, " count"]:
        """Return labels, those of `SHOWN` first."""
        shown = [self.captions.index(caption) for caption in SHOWN]
        others = [label for label in range(len(self.captions)) if label not in shown]
        order = torch.tensor(shown + others, device="cpu")
        return order[torch.arange(count, device="cpu") % len(order)]

    def subject(self) -> Subject:
        """Return what the demo quantizes.

        Raises:
            LoraqError: a file is missing.
        """
        for name in ("captions.json", "words.safetensors", "pictures.png", "config.json"):
            if not (self.folder / name).is_file():
                raise LoraqError(
                    f"'{self.folder}' has no '{name}', so it is not the emoji model. It is "
                    "benchmarks/assets/emoji in a checkout of loraq."
                )
        return Subject(
            about="of 20 million parameters that draws emoji from their names",
            command="loraq demo --emoji benchmarks/assets/emoji",
            folder=self.folder,
            budget="r16=11",
            load=self.load_transformer,
            probe=self.velocity_probe,
            sample=self.sample,
            labels=self.first_labels,
            n_images=10,
            n_own=16,
            name=self.captions.__getitem__,
        )

    @cached_property
    def _word_vectors(self) -> dict[str, Tensor]:
        reader = ShardReader(self.folder / "words.safetensors")
        return {word: reader.read(word) for word in reader.names}

    @cached_property
    def _caption_tokens(self) -> Tensor:
        return self.encode([*self.captions, ""])
