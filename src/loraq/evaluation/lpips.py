"""LPIPS with AlexNet: how far apart two images are in the features of a network.

The network is that of torchvision, layer by layer, so that torchvision, which needs a build for the
very torch that is there, is not needed. The learned weights of its channels are in `assets/lpips`.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.evaluation.weights import read_weights

#: Mean and deviation that LPIPS was trained with, for pixels in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
#: Weights of the channels of each layer, by LPIPS 0.1 (see `assets/lpips/README.md`).
_HEADS = Path(__file__).parents[1] / "assets" / "lpips" / "alex.safetensors"
#: The layers of AlexNet's features after which LPIPS looks: its five ReLUs.
_LOOKS = (1, 4, 7, 9, 11)
#: Added to a sum of squares before its root, in torchmetrics.
_EPSILON = 1e-8


class LPIPS(nn.Module):
    """The distance of two batches of images, one number for each pair."""

    def __init__(self, weights: Path) -> None:
        """Read AlexNet's weights from a file, and those of the channels, which are ours to give.

        Raises:
            LoraqError: the file is not AlexNet's.
        """
        super().__init__()
        self.features = alexnet_features()
        own = {
            name.removeprefix("features."): tensor
            for name, tensor in read_weights(weights).items()
            if name.startswith("features.")
        }
        try:
            self.features.load_state_dict(own)
        except RuntimeError as error:
            raise LoraqError(f"The weights in '{weights}' are not AlexNet's: {error}") from error
        heads = read_weights(_HEADS)
        self.channels = nn.ParameterList(
            heads[f"lin{i}.model.1.weight"] for i in range(len(_LOOKS))
        )
        self.requires_grad_(False).eval()

    def forward(
        self,
        images_a: Float[Tensor, "batch 3 height width"],
        images_b: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, " batch"]:
        """Return the distance of each pair, 0 for equal ones; pixels are in [0, 1]."""
        total = torch.zeros(len(images_a), device=images_a.device)
        looks = zip(self._look(images_a), self._look(images_b), self.channels, strict=True)
        for a, b, channels in looks:
            weighted = nn.functional.conv2d((a - b).square(), channels)
            total += weighted.mean(dim=(1, 2, 3))
        return total

    def _look(self, images: Tensor) -> list[Tensor]:
        """Return what is seen after each ReLU, with unit length at each place."""
        shift, scale = (images.new_tensor(x).view(3, 1, 1) for x in (_SHIFT, _SCALE))
        x, seen = (2 * images - 1 - shift) / scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in _LOOKS:
                seen.append(x / (x.square().sum(dim=1, keepdim=True) + _EPSILON).sqrt())
        return seen


def alexnet_features() -> nn.Sequential:
    """Return the convolutions of torchvision's AlexNet, up to the last ReLU."""
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(),
    )
