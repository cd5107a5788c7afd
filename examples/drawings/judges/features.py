"""What the judges see in a picture: features of two pretrained networks, and a distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from drawings.judges.networks import EfficientNetLite0, ShiftTolerantVGG
from drawings.judges.scores import Discriminant, gram

#: Sizes in pixels to which drawings are enlarged for the networks.
_SUBJECT_PIXELS, _STYLE_PIXELS, _DISTANCE_PIXELS = 224, 96, 64
_BATCH = 32


@dataclass(frozen=True)
class SubjectFeatures:
    """Features of a picture's subject, by EfficientNet-Lite0."""

    network: EfficientNetLite0

    def __call__(self, pictures: Tensor) -> Tensor:
        """(pictures, 1280)."""
        return self.network(enlarged(pictures, _SUBJECT_PIXELS))


@dataclass(frozen=True)
class StyleFeatures:
    """Features of a picture's style: the Gram matrix of VGG's first stage (colours and edges)."""

    network: ShiftTolerantVGG

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return (pictures, 2080): square roots, so that a few large products do not dominate."""
        return gram(self.network.stages(enlarged(pictures, _STYLE_PIXELS), 1)[0]).sqrt()


@dataclass(frozen=True)
class Judge:
    """A judge that maps pictures to unit vectors, whose products are similarities."""

    features: Callable[[Tensor], Tensor]
    discriminant: Discriminant

    @classmethod
    def train(
        cls, features: Callable[[Tensor], Tensor], pictures: Tensor, groups: Sequence[str]
    ) -> Judge:
        """Train a judge to distinguish ``groups``."""
        return cls(features, Discriminant.fit(_batched(features, pictures), groups))

    def __call__(self, pictures: Tensor) -> Tensor:
        """(pictures, dimensions)."""
        return self.discriminant(_batched(self.features, pictures))


@dataclass(frozen=True)
class Distance:
    """ST-LPIPS."""

    network: ShiftTolerantVGG

    def __call__(self, one: Tensor, other: Tensor) -> Tensor:
        """(pictures,)."""
        pair = (enlarged(pictures, _DISTANCE_PIXELS) for pictures in (one, other))
        return self.network.distance(*pair)


def enlarged(pictures: Tensor, pixels: int) -> Tensor:
    """Resize pictures smoothly."""
    size = (pixels, pixels)
    return interpolate(pictures, size=size, mode="bicubic", align_corners=False).clamp(0, 1)


def _batched(features: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
    return torch.cat([features(some) for some in pictures.split(_BATCH)])
