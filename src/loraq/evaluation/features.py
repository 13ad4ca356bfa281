"""What Inception, DINOv2 and CLIP see in images: features for Fréchet distances, a CLIP score."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from loraq.evaluation.libraries import inception_class
from loraq.evaluation.weights import read_weights
from loraq.integrations.diffusers import _quiet_diffusers

#: Sides of the images that the networks take.
INCEPTION_SIDE, DINOV2_SIDE = 299, 224
#: Images in one call of a network.
_BATCH = 16
#: Mean and deviation of ImageNet's channels, with which DINOv2 was trained.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resize_cleanly(image: Any, side: int) -> Tensor:
    """Return an RGB image as float32 pixels (3, side, side) in [0, 255].

    As clean-fid does it: PIL's bicubic filter, which smooths before it samples, on each channel as
    floats, without rounding to bytes.
    """
    from PIL import Image

    pixels = numpy.asarray(image).astype(numpy.float32)
    channels = [
        numpy.asarray(
            Image.fromarray(pixels[:, :, i]).resize((side, side), Image.Resampling.BICUBIC)
        ).clip(0, 255)
        for i in range(3)
    ]
    return torch.from_numpy(numpy.stack(channels))


def inception_features(images: Sequence[Path], weights: Path, device: torch.device) -> Tensor:
    """Return the 2048 features of FID, one row for each image."""
    network = _inception(weights).to(device)
    return _look(images, INCEPTION_SIDE, device, lambda x: network((x - 128) / 128).flatten(1))


def dinov2_features(images: Sequence[Path], weights: Path, device: torch.device) -> Tensor:
    """Return DINOv2's class token, one row for each image."""
    with _quiet_diffusers():
        from transformers import Dinov2Model

        network = Dinov2Model.from_pretrained(weights, use_safetensors=True, local_files_only=True)
    network = network.eval().to(device)
    mean, deviation = (torch.tensor(x, device=device).view(3, 1, 1) for x in (_MEAN, _DEVIATION))

    def class_token(x: Tensor) -> Tensor:
        token: Tensor = network((x / 255 - mean) / deviation).last_hidden_state[:, 0]
        return token

    return _look(images, DINOV2_SIDE, device, class_token)


def clip_scores(
    images: Sequence[Path], texts: Sequence[str], weights: Path, device: torch.device
) -> Tensor:
    """Return 100 cos(image, prompt) of each pair; a prompt is cut where CLIP stops reading."""
    with _quiet_diffusers():
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(weights, use_safetensors=True, local_files_only=True)
        processor = CLIPProcessor.from_pretrained(weights, local_files_only=True)
    model = model.eval().to(device)
    scores = []
    for i in range(0, len(images), _BATCH):
        inputs = processor(
            images=[read_image(path) for path in images[i : i + _BATCH]],
            text=list(texts[i : i + _BATCH]),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
        )
        with torch.inference_mode():
            seen = model(**inputs.to(device))
        scores.append(100 * (seen.image_embeds * seen.text_embeds).sum(dim=1).cpu())
    return torch.cat(scores)


def read_image(path: Path) -> Any:
    """Return an image as PIL's, in RGB."""
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _look(
    images: Sequence[Path], side: int, device: torch.device, network: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return what a network sees in images that are resized, one row for each."""
    rows = []
    for i in range(0, len(images), _BATCH):
        batch = [resize_cleanly(read_image(path), side) for path in images[i : i + _BATCH]]
        with torch.inference_mode():
            rows.append(network(torch.stack(batch).to(device)).cpu())
    return torch.cat(rows)


def _inception(weights: Path) -> nn.Module:
    """Return torch-fidelity's Inception up to its pooled features, for pixels in [-1, 1].

    Its own forward takes bytes only, and resizes them as TensorFlow 1 did; its layers stand in the
    order in which it runs them, the classifier last.
    """
    # It loads pickles only. So it gets what was read as safetensors, in bytes of our own.
    stored = io.BytesIO()
    torch.save(read_weights(weights), stored)
    stored.seek(0)
    whole = inception_class()("inception", ["2048"], feature_extractor_weights_path=stored)
    return nn.Sequential(*list(whole.children())[:-1])
