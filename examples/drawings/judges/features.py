"""Judges of pictures by features of pretrained networks, and a distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drawings.judges.scores import Discriminant
from klora_compile.judging.features import enlarged
from klora_compile.judging.networks import ShiftTolerantVGG

#: Size in pixels to which drawings are enlarged for the distance.
_DISTANCE_PIXELS = 64
_BATCH = 32


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


def _batched(features: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
    return torch.cat([features(some) for some in pictures.split(_BATCH)])
