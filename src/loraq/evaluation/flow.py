"""A class-conditional rectified flow: noise an image, predict a velocity, draw a sample.

Time 0 is the image, time 1 is noise, `x_t = (1 − t) image + t noise`, and the transformer, one of
the PixArt family without a mask on its captions, predicts the velocity `noise − image` (Liu et al.
2022, arXiv 2209.03003).
"""

import json
import lzma
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.safetensors.reader import ShardReader

#: Steps of the time embedding per unit of flow time, as in PixArt.
TIME_SCALE = 1000.0


def interpolate(
    images: Float[Tensor, "batch *image"],
    noise: Float[Tensor, "batch *image"],
    times: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *image"]:
    """Return the noised images at flow times in [0, 1]."""
    return torch.lerp(images, noise, times.view(-1, *(1,) * (images.ndim - 1)))


def predict_velocity(
    transformer: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    times: Float[Tensor, " batch"],
    captions: Float[Tensor, "batch tokens width"],
) -> Float[Tensor, "batch channels height width"]:
    """Run the transformer once and return its velocity in float32.

    Args:
        transformer: of the PixArt family, quantized or not.
        images: noised images, on the transformer's device.
        times: flow time of each image, in [0, 1].
        captions: token embeddings; every one counts, so no attention mask is needed.
    """
    dtype = first_weight(transformer).dtype
    output: Tensor = transformer(
        images.to(dtype),
        encoder_hidden_states=captions.to(dtype),
        timestep=times * TIME_SCALE,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return output.float()


@torch.no_grad()
def sample(
    transformer: nn.Module,
    noise: Float[Tensor, "batch channels height width"],
    captions: Float[Tensor, "batch tokens width"],
    empty: Float[Tensor, "batch tokens width"],
    *,
    steps: int,
    guidance: float,
) -> Float[Tensor, "batch channels height width"]:
    """Draw one image from each noise with Euler steps; they are clamped to [-1, 1].

    Args:
        transformer: of the PixArt family, quantized or not.
        noise: where the samples start; like the captions it is moved to the transformer's device.
        captions: token embeddings of what is wanted.
        empty: those of the empty caption.
        steps: number of equal Euler steps.
        guidance: classifier-free guidance scale; 1 runs the captioned half only.
    """
    device = first_weight(transformer).device
    images, captions, empty = (each.to(device) for each in (noise, captions, empty))
    both = torch.cat([captions, empty])
    for now, later in pairwise(torch.linspace(1, 0, steps + 1, device=device)):
        if guidance == 1:
            velocity = predict_velocity(transformer, images, now.expand(len(images)), captions)
        else:
            doubled = predict_velocity(
                transformer, images.repeat(2, 1, 1, 1), now.expand(len(both)), both
            )
            captioned, uncaptioned = doubled.chunk(2)
            velocity = torch.lerp(uncaptioned, captioned, guidance)
        images = images + (later - now) * velocity
    return images.clamp(-1, 1)


@torch.no_grad()
def probe(
    transformer: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    captions: Float[Tensor, "batch tokens width"],
    generator: torch.Generator,
) -> Float[Tensor, "batch channels height width"]:
    """Return the velocities of one forward pass on noised images.

    Args:
        transformer: of the PixArt family, quantized or not.
        images: to be noised; times are stratified, one in each of as many equal intervals.
        captions: of the images.
        generator: of the times and the noise.
    """
    count, device = len(images), first_weight(transformer).device
    times = torch.arange(count, device="cpu") + torch.rand(count, generator=generator, device="cpu")
    times /= count
    noise = torch.randn(images.shape, generator=generator, device="cpu")
    noised = interpolate(images, noise, times)
    return predict_velocity(transformer, *(each.to(device) for each in (noised, times, captions)))


def load_compressed(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load a trained transformer, in evaluation mode, from a file that xz makes a third smaller.

    Args:
        folder: has "config.json" and "transformer.safetensors.xz".
        dtype: of the loaded weights; they are stored as bfloat16.

    Raises:
        LoraqError: diffusers is not installed, or the weights are not there.
    """
    try:
        from diffusers import PixArtTransformer2DModel
    except ImportError as error:
        raise LoraqError(
            'The trained model needs diffusers. Run: pip install "loraq[diffusers]"'
        ) from error
    file = folder / "transformer.safetensors.xz"
    if not file.is_file():
        raise LoraqError(
            f"The trained weights '{file}' are missing. They are in a checkout of loraq, and "
            "`experiments/` has the script that trains them."
        )
    model: Any = PixArtTransformer2DModel(**json.loads((folder / "config.json").read_text()))
    try:
        raw = lzma.decompress(file.read_bytes())
    except lzma.LZMAError as error:
        raise LoraqError(f"'{file}' is damaged ({error}). Check it out again.") from error
    with TemporaryDirectory() as place:
        plain = Path(place) / "transformer.safetensors"
        plain.write_bytes(raw)
        reader = ShardReader(plain)
        model.load_state_dict({name: reader.read(name) for name in reader.names})
    return nn.Module.to(model.eval(), dtype)


def first_weight(module: nn.Module) -> Tensor:
    """Return the first floating-point parameter.

    Packed weights are integers and say nothing of the dtype.
    """
    return next(parameter for parameter in module.parameters() if parameter.is_floating_point())
