"""A class-conditional rectified flow: noise an image, predict a velocity, draw a sample.

Time 0 is the image, time 1 is noise, `x_t = (1 − t) image + t noise`, and the transformer, one of
the PixArt family without a mask on its captions, predicts the velocity `noise − image` (Liu et al.
2022, arXiv 2209.03003).
"""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

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
        noise: where the samples start, on the transformer's device.
        captions: token embeddings of what is wanted.
        empty: those of the empty caption.
        steps: number of equal Euler steps.
        guidance: classifier-free guidance scale; 1 runs the captioned half only.
    """
    images, both = noise, torch.cat([captions, empty])
    for now, later in pairwise(torch.linspace(1, 0, steps + 1, device=noise.device)):
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


def first_weight(module: nn.Module) -> Tensor:
    """Return the first floating-point parameter.

    Packed weights are integers and say nothing of the dtype.
    """
    return next(parameter for parameter in module.parameters() if parameter.is_floating_point())
