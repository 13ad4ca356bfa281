"""This file holds the small world that `loraq demo` and the benchmarks stand on.

A 5-million-parameter `PixArtTransformer2DModel`, trained on the 8×8 digits of scikit-learn, lies
inside the package with a judge that reads digits. The wheel leaves the transformer out: a clone and
the source archive have it (docs/decisions/0034-wheel.md). Everything runs offline on one CPU thread
in seconds, and the weights are trained ones: random weights have neither the heavy tails nor the
leading directions that a quantizer meets in practice.

The model is a rectified flow; see `loraq.evaluation.flow`.
"""

import json
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from loraq.errors import LoraqError
from loraq.evaluation import flow
from loraq.evaluation.metrics import frechet_distance
from loraq.evaluation.subject import Subject
from loraq.integrations.diffusers import load_float
from loraq.safetensors.reader import ShardReader

#: Label of the empty caption, used by classifier-free guidance; 0 to 9 are the digits.
NULL_LABEL = 10


def assets_folder() -> Path:
    """Return the folder inside the package that holds the trained weights."""
    return Path(__file__).parents[1] / "assets" / "digits"


def transformer_folder() -> Path:
    """Return the folder of the trained transformer.

    Raises:
        LoraqError: it is not there, because loraq was installed as a wheel.
    """
    folder = assets_folder() / "transformer"
    if not folder.is_dir():
        raise LoraqError(
            "The digits model is in a clone of the repository, and not in the installed package. "
            "In a clone run `make demo`, or name its emoji model: "
            "`loraq demo --emoji benchmarks/assets/emoji`."
        )
    return folder


def real_digits() -> tuple[Float[Tensor, "count 1 8 8"], Int[Tensor, " count"]]:
    """Return the 1797 real images, in [-1, 1], and their labels.

    Raises:
        LoraqError: scikit-learn, which carries the images, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise LoraqError(
            "The real digits come with scikit-learn, which is not installed. "
            'Install it with `pip install "loraq[demo]"`.'
        ) from error
    digits = load_digits()
    # Pixels are stored as 0 to 16.
    images = torch.from_numpy(digits.images).float().div(8).sub(1).unsqueeze(1)
    return images, torch.from_numpy(digits.target).long()


def class_tokens(labels: Int[Tensor, " batch"]) -> Float[Tensor, "batch 4 64"]:
    """Return the caption of each label: fixed pseudo-random tokens of unit variance.

    Args:
        labels: 0 to 9, or `NULL_LABEL` for the empty caption.
    """
    return _token_table()[labels.cpu()].to(labels.device)


def load_transformer(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Load the trained diffusers transformer, in evaluation mode.

    Args:
        dtype: of the loaded weights; they are stored as bfloat16.

    Raises:
        LoraqError: diffusers is not installed, or the model is not there.
    """
    # The method of nn.Module, because that of diffusers warns about layers to keep in float32 even
    # if there are none.
    return nn.Module.to(load_float(transformer_folder()), dtype)


def predict_velocity(
    transformer: nn.Module,
    images: Float[Tensor, "batch 1 8 8"],
    times: Float[Tensor, " batch"],
    labels: Int[Tensor, " batch"],
) -> Float[Tensor, "batch 1 8 8"]:
    """Run the transformer once and return its velocity in float32.

    Args:
        transformer: the digits model, quantized or not.
        images: noised images, on the transformer's device.
        times: flow time of each image, in [0, 1].
        labels: caption of each image; every caption token is real, so no attention mask is needed.
    """
    return flow.predict_velocity(transformer, images, times, class_tokens(labels))


def sample(
    transformer: nn.Module,
    labels: Int[Tensor, " batch"],
    *,
    seed: int,
    steps: int = 20,
    guidance: float = 1.5,
) -> Float[Tensor, "batch 1 8 8"]:
    """Draw one digit for each label with Euler steps from noise to image.

    The noise of sample i depends on `seed` and i only, so the first n samples are the same digits
    for every batch size (up to the rounding of differently shaped matrix products).

    Args:
        transformer: the digits model, quantized or not.
        labels: wanted digits.
        seed: of the noise.
        steps: number of equal Euler steps.
        guidance: classifier-free guidance scale; 1 runs the captioned half only.

    Returns:
        Images on the transformer's device, clamped to [-1, 1].
    """
    captions, empty = class_tokens(labels), class_tokens(torch.full_like(labels, NULL_LABEL))
    noise = _noise(len(labels), seed)
    return flow.sample(transformer, noise, captions, empty, steps=steps, guidance=guidance)


@torch.no_grad()
def velocity_probe(
    transformer: nn.Module, *, count: int = 256, seed: int = 0
) -> Float[Tensor, "count 1 8 8"]:
    """Return the velocities of one forward pass on noised real images.

    The probe to compare two models with: it is deterministic, takes a second and orders the
    precisions, where class accuracy and Fréchet distance only move at 2 bits. Load the models in
    float32: rounding the network to bfloat16 alone is a relative error of 0.008, a third of that of
    plain 4-bit weights.

    Args:
        transformer: the digits model, quantized or not.
        count: number of real images, at most 1797; times are stratified, one in each of `count`
            equal intervals.
        seed: of the choice of images, the times and the noise.
    """
    images, labels = real_digits()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[:count]
    times = (
        torch.arange(count, device="cpu") + torch.rand(count, generator=generator, device="cpu")
    ) / count
    noise = torch.randn(count, *images.shape[1:], generator=generator, device="cpu")
    noised = flow.interpolate(images[chosen], noise, times)
    device = flow.first_weight(transformer).device
    return predict_velocity(
        transformer, noised.to(device), times.to(device), labels[chosen].to(device)
    )


def subject() -> Subject:
    """Return what the demo quantizes.

    Raises:
        LoraqError: the model, or scikit-learn, is not there.
    """
    transformer_folder()  # what is not there is said before all else
    judge = Judge.from_assets()
    real = judge.features(real_digits()[0])

    def look(images: Tensor, labels: Tensor) -> dict[str, float]:
        distance = frechet_distance(judge.features(images), real)
        return {"accuracy": judge.accuracy(images, labels), "frechet": distance}

    return Subject(
        about="of 5 million parameters that draws handwritten digits",
        command="loraq demo",
        folder=assets_folder(),
        budget="r16=5",  # of width 192
        load=load_transformer,
        probe=lambda model: velocity_probe(model),
        sample=sample,
        labels=lambda count: torch.arange(count, device="cpu") % 10,
        n_images=20,
        n_own=64,
        judge=look,
    )


class Judge(nn.Module):
    """A small convolutional classifier that reads digits and embeds them for a Fréchet distance."""

    def __init__(self, *, channels: int = 16, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(2 * channels * 16, width),
        )
        self.head = nn.Linear(width, classes)

    @classmethod
    def from_assets(cls) -> "Judge":
        """Load the trained judge."""
        folder = assets_folder() / "judge"
        judge = cls(**json.loads((folder / "config.json").read_text()))
        reader = ShardReader(folder)
        judge.load_state_dict({name: reader.read(name) for name in reader.names})
        return judge.eval()

    def forward(self, images: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch classes"]:
        """Return one logit for each class."""
        logits: Tensor = self.head(F.gelu(self.body(images)))
        return logits

    @torch.no_grad()
    def features(self, images: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch width"]:
        """Return the activations before the last nonlinearity, for a Fréchet distance."""
        features: Tensor = self.body(images)
        return features

    @torch.no_grad()
    def accuracy(
        self, images: Float[Tensor, "batch 1 8 8"], labels: Int[Tensor, " batch"]
    ) -> float:
        """Return the share of images that are read as their label, in [0, 1]."""
        return (self(images).argmax(dim=1) == labels).double().mean().item()


@lru_cache(maxsize=1)
def _token_table() -> Tensor:
    return ShardReader(assets_folder() / "class_tokens.safetensors").read("tokens")


def _noise(count: int, seed: int) -> Tensor:
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + index) for index in range(count)]
    return torch.stack(
        [torch.randn(1, 8, 8, generator=generator, device="cpu") for generator in generators]
    )
