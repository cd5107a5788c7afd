"""A pipeline of three layers, and a fusion for it that switches between its two steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from support.handmade import hand_entry, hand_fusion
from torch import nn

from klora_runtime.artifact.fusion import Fusion


class Net(nn.Module):
    """Layers of one shape, which are written together where a device groups, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.conv = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, tokens: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        rows = self.second(self.first(tokens)).flatten()
        return torch.cat([rows, self.conv(image).flatten()])


class Scheduler:
    order, timesteps = 1, torch.empty(0)

    def set_timesteps(self, number: int) -> None:
        self.timesteps = torch.arange(number)

    def step(self, output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> torch.Tensor:
        return output


class Pipe:
    """All that a pipeline needs."""

    def __init__(self, model: Net) -> None:
        self.unet, self.scheduler = model, Scheduler()


def a_fusion() -> Fusion:
    shapes = {"first": (24, 24), "second": (24, 24), "conv": (3, 2, 3, 3)}
    entries = (
        hand_entry(f"unet.{name}", shape, seed=seed, size=1.0)
        for seed, (name, shape) in enumerate(shapes.items())
    )
    return hand_fusion(*entries)


def a_net(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).requires_grad_(False)


def two_steps(pipe: Pipe, device: torch.device) -> Iterator[torch.Tensor]:
    """What the model gives in the two steps of a run, before and after the switch."""
    generator = torch.Generator().manual_seed(1)
    dtype = pipe.unet.first.weight.dtype
    inputs = [
        torch.randn(shape, generator=generator).to(dtype).to(device)
        for shape in ((5, 24), (1, 2, 6, 6))
    ]
    pipe.scheduler.set_timesteps(2)
    for step in range(2):
        output = pipe.unet(*inputs)
        pipe.scheduler.step(output, step, output)
        yield output.cpu()


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Within the rounding of the dtype: a base that comes from the host is added after the rest."""
    for one, other in zip(found, expected, strict=True):
        distance = (one.double() - other.double()).norm() / other.double().norm()
        assert distance <= 4 * torch.finfo(one.dtype).eps
