"""What judges see in a picture: features of its subject and of its style.

Pictures are (pictures, 3, height, width) in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from klora_compile.judging.networks import EfficientNetLite0, ShiftTolerantVGG

#: Sizes in pixels to which pictures are enlarged for the networks.
SUBJECT_PIXELS, STYLE_PIXELS = 224, 96

#: Levels of each colour channel.
_LEVELS = 4


@dataclass(frozen=True)
class SubjectFeatures:
    """Features of a picture's subject, by EfficientNet-Lite0."""

    network: EfficientNetLite0

    def __call__(self, pictures: Tensor) -> Tensor:
        """(pictures, 1280)."""
        return self.network(enlarged(pictures, SUBJECT_PIXELS))


@dataclass(frozen=True)
class StyleFeatures:
    """Features of a picture's style: the Gram matrix of VGG's first stage (colours and edges)."""

    network: ShiftTolerantVGG

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return (pictures, 2080): square roots, so that a few large products do not dominate."""
        return gram(self.network.stages(enlarged(pictures, STYLE_PIXELS), 1)[0]).sqrt()


@dataclass(frozen=True)
class Looks:
    """What is seen of a style: edges, textures and colours, wherever they are in a picture.

    Gram matrices of VGG's first stage, and a histogram of colours. On drawings of 240 subjects,
    with Fisher's discriminant of 800 components, Gram matrices alone were right in 91.8 % of
    comparisons, and with the histogram 92.3 % (88.5 and 89.1 % if blurred and grainy).
    """

    edges: StyleFeatures

    def __call__(self, pictures: Tensor) -> Tensor:
        """(pictures, 2144)."""
        return torch.cat([self.edges(pictures), colours(pictures).sqrt()], 1)


def enlarged(pictures: Tensor, pixels: int) -> Tensor:
    """Resize pictures smoothly."""
    size = (pixels, pixels)
    return interpolate(pictures, size=size, mode="bicubic", align_corners=False).clamp(0, 1)


def gram(features: Tensor) -> Tensor:
    """Return Gram matrices: which channels occur together (Gatys et al., arXiv 1508.06576).

    Args:
        features: (pictures, channels, height, width).

    Returns:
        (pictures, channels * (channels + 1) / 2): the product of two channels, averaged over all
        positions, for each pair of channels once.
    """
    flat = features.flatten(2)
    products = flat @ flat.transpose(1, 2) / flat.shape[-1]
    rows, columns = torch.triu_indices(*products.shape[1:])
    return products[:, rows, columns]


def colours(pictures: Tensor) -> Tensor:
    """Return the share of pixels in each of 64 colours, (pictures, 64).

    Args:
        pictures: (pictures, 3, height, width) in [0, 1].
    """
    steps = (pictures * _LEVELS).long().clamp_max(_LEVELS - 1)
    red, green, blue = steps.unbind(1)
    found = (red * _LEVELS + green) * _LEVELS + blue
    counts = one_hot(found.flatten(1), _LEVELS**3).float()
    return counts.mean(1)
