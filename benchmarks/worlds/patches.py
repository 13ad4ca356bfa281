"""The patches world: a test-bed four times the digits world, trained on real photographs.

A 20-million-parameter `PixArtTransformer2DModel` (384 wide, 6 heads, 8 transformer blocks, 64
tokens) that draws 32×32 colour patches of sixteen photographs, which come with scikit-image and
scikit-learn and need no download. The left four fifths of every photograph are for training, the
right-most fifth for the velocity probe.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loraq.errors import LoraqError
from loraq.evaluation import flow

#: The trained transformer: its configuration, and a safetensors file in bf16 that xz makes a third
#: smaller.
ASSETS = Path(__file__).parents[1] / "assets" / "patches"

#: The class of a patch is the photograph it was cut from; the empty caption comes after the last.
PHOTOGRAPHS = (
    *("china", "flower"),  # of scikit-learn; the others are of scikit-image
    *(
        "astronaut",
        "chelsea",
        "coffee",
        "rocket",
        "hubble_deep_field",
        "immunohistochemistry",
        "retina",
    ),
    *("stereo_motorcycle", "brick", "grass", "gravel", "camera", "coins", "page"),
)
NULL_LABEL = len(PHOTOGRAPHS)
#: Pixels of a patch, each the mean of 2×2 pixels of the photograph.
SIZE = 32


def photographs(*, heldout: bool) -> list[Tensor]:
    """Return one part of every photograph, each (3, height, width) in [-1, 1].

    Grey ones have three equal channels.

    Args:
        heldout: the right-most fifth, which training never sees, instead of the left four fifths.

    Raises:
        LoraqError: scikit-image or scikit-learn, which carry the photographs, is not installed.
    """
    try:
        import skimage.data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise LoraqError(
            "The photographs come with scikit-image and scikit-learn, which are not both "
            "installed. Install them with `pip install scikit-image scikit-learn`."
        ) from error
    parts = []
    for name in PHOTOGRAPHS:
        if name in ("china", "flower"):
            pixels = load_sample_image(f"{name}.jpg")
        else:
            pixels = getattr(skimage.data, name)()
            pixels = pixels[0] if name == "stereo_motorcycle" else pixels  # the left eye of a pair
        image = torch.from_numpy(pixels.copy()).float().div(127.5).sub(1)
        image = image.permute(2, 0, 1) if image.ndim == 3 else image.expand(3, -1, -1)
        border = image.shape[2] * 4 // 5
        parts.append(image[..., border:] if heldout else image[..., :border])
    return parts


def cut_patches(
    parts: list[Tensor], count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cut patches at random places of random photographs, half of them mirrored.

    Args:
        parts: of `photographs`.
        count: number of patches.
        generator: the only source of randomness.

    Returns:
        Patches (count, 3, SIZE, SIZE) in [-1, 1] and their labels.
    """
    labels = torch.randint(len(parts), (count,), generator=generator)
    places = torch.rand(count, 2, generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    patches = []
    for label, (down, right), mirror in zip(
        labels.tolist(), places.tolist(), mirrored.tolist(), strict=True
    ):
        part = parts[label]
        top, left = (
            int(at * (size - 2 * SIZE + 1))
            for at, size in zip((down, right), part.shape[1:], strict=True)
        )
        patch = part[:, top : top + 2 * SIZE, left : left + 2 * SIZE]
        patches.append(patch.flip(2) if mirror else patch)
    return F.avg_pool2d(torch.stack(patches), 2), labels


def class_tokens(labels: Tensor) -> Tensor:
    """Return the caption of each label, (batch, 4, 64).

    Tokens are fixed and pseudo-random, of unit variance.
    """
    tokens = torch.randn(NULL_LABEL + 1, 4, 64, generator=torch.Generator().manual_seed(0))
    return (tokens / tokens.std(dim=-1, keepdim=True))[labels.cpu()].to(labels.device)


def load_transformer(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Load the trained diffusers transformer, in evaluation mode.

    Raises:
        LoraqError: diffusers is not installed, or the trained weights are not there.
    """
    return flow.load_compressed(ASSETS, dtype)


def velocity_probe(transformer: nn.Module, *, count: int = 128, seed: int = 0) -> Tensor:
    """Return the velocities (count, 3, SIZE, SIZE) of one forward pass on noised patches.

    Training never saw these patches.

    Args:
        transformer: the patches model, quantized or not.
        count: number of patches; times are stratified, one in each of `count` equal intervals.
        seed: of the choice of patches, the times and the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = cut_patches(photographs(heldout=True), count, generator)
    return flow.probe(transformer, images, class_tokens(labels), generator)


def sample(
    transformer: nn.Module, labels: Tensor, *, seed: int, steps: int = 20, guidance: float = 1.5
) -> Tensor:
    """Draw one patch for each label, (batch, 3, SIZE, SIZE) in [-1, 1].

    See `loraq.evaluation.flow.sample`.

    Args:
        transformer: the patches model, quantized or not.
        labels: photographs whose patches are wanted.
        seed: of the noise; sample i depends on it and on how many samples there are.
        steps: number of equal Euler steps.
        guidance: classifier-free guidance scale.
    """
    noise = torch.randn(len(labels), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    captions, empty = (
        class_tokens(which) for which in (labels, torch.full_like(labels, NULL_LABEL))
    )
    return flow.sample(transformer, noise, captions, empty, steps=steps, guidance=guidance)
