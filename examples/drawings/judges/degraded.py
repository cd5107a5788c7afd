"""Drawings made worse in the ways of small generators: soft, grainy, or both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

#: Widest blur in pixels and strongest noise of the degradations that judges learn from.
_BLUR, _NOISE = (0.3, 1.2), 0.08
_REACH = 4


def blurred(pictures: Tensor, sigma: Tensor) -> Tensor:
    """Blur pictures by a Gaussian; the border is repeated outside.

    Args:
        pictures: (pictures, channels, height, width).
        sigma: width of each picture's blur in pixels, (pictures,), above 0.
    """
    count, channels = pictures.shape[:2]
    at = torch.arange(-_REACH, _REACH + 1.0)
    kernels = torch.exp(-(at**2) / (2 * sigma[:, None] ** 2))
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    x = pad(pictures, (_REACH,) * 4, mode="replicate").flatten(0, 1)[None]
    x = conv2d(x, kernels[:, None, None, :], groups=count * channels)
    x = conv2d(x, kernels[:, None, :, None], groups=count * channels)
    return x[0].unflatten(0, (count, channels))


def noisy(pictures: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise to pictures in [0, 1].

    Args:
        strength: its standard deviation, (pictures,).
    """
    noise = torch.randn(pictures.shape, generator=generator)
    return (pictures + strength[:, None, None, None] * noise).clamp(0, 1)


def degraded(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Blur each picture and add noise, both of random strength; judges are fitted on these."""
    low, high = _BLUR
    sigma = low + (high - low) * torch.rand(len(pictures), generator=generator)
    strength = _NOISE * torch.rand(len(pictures), generator=generator)
    return noisy(blurred(pictures, sigma), strength, generator)


def _blur(pictures: Tensor) -> Tensor:
    return blurred(pictures, torch.ones(len(pictures)))


def _noise(pictures: Tensor) -> Tensor:
    return noisy(pictures, torch.full((len(pictures),), 0.05), torch.Generator().manual_seed(1))


#: The degradations that judges are measured on: a blur of one pixel, noise of 5 %, and both.
MEASURED: dict[str, Callable[[Tensor], Tensor]] = {
    "blurred": _blur,
    "grainy": _noise,
    "blurred and grainy": lambda pictures: _noise(_blur(pictures)),
}
