"""The paths from noise to drawings that the base takes in many guided steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from drawings.base.parts import SHIFT, encoded

#: Steps of the base between two levels of the few steps.
_BETWEEN = 5
_GUIDANCE, _TOGETHER, _LEVELS = 3.0, 32, 1000


@dataclass(frozen=True)
class Trajectories:
    """Paths of the base, seen at the levels of a few steps."""

    latents: torch.Tensor
    """(levels, paths, channels, height, width): noise first, drawings last."""
    states: torch.Tensor
    """Encoded prompts, (paths, tokens, width)."""
    sigmas: torch.Tensor
    """Noise levels, (levels,), falling to 0."""
    timesteps: torch.Tensor
    """What the denoiser is told at each level but the last, (levels - 1,)."""

    def flow(self, step: int, paths: torch.Tensor) -> torch.Tensor:
        """Return the one flow that takes these paths from a level to the next."""
        here, there = self.latents[step, paths], self.latents[step + 1, paths]
        return (there - here) / (self.sigmas[step + 1] - self.sigmas[step])


def few_step_scheduler(pipe: StableDiffusionPipeline) -> DPMSolverMultistepScheduler:
    """Return the pipeline's scheduler at order 1, which for flows is Euler's method."""
    return DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)


@torch.no_grad()
def trajectories(
    pipe: StableDiffusionPipeline, prompts: list[str], steps: int, generator: torch.Generator
) -> Trajectories:
    """Follow the base's guided flow from random noise, one path per prompt.

    Args:
        pipe: the base.
        prompts: of the paths.
        steps: levels of the paths, but the last.
        generator: of the noise, on the CPU.
    """
    scheduler = few_step_scheduler(pipe)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.float()
    shape = (len(prompts), pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
    noise = torch.randn(shape, generator=generator)
    states = torch.cat([encoded(pipe, part) for part in _parts(prompts)])
    seen = [
        _path(pipe, some, told, sigmas)
        for some, told in zip(noise.split(_TOGETHER), states.split(_TOGETHER), strict=True)
    ]
    return Trajectories(torch.cat(seen, 1), states, sigmas, scheduler.timesteps)


def _path(
    pipe: Any, noise: torch.Tensor, states: torch.Tensor, sigmas: torch.Tensor
) -> torch.Tensor:
    """Follow some paths by Euler's method, in levels between those of the few steps."""
    both = torch.cat([states, encoded(pipe, [""]).expand_as(states)])
    now, seen = noise, [noise]
    for start, end in pairwise(sigmas.tolist()):
        levels = _between(start, end)
        for here, there in pairwise(levels):
            at = torch.full((2 * len(noise),), _LEVELS * here)
            flow = pipe.unet(torch.cat([now, now]), at, encoder_hidden_states=both).sample
            told, untold = flow.chunk(2)
            now = now + (there - here) * (untold + _GUIDANCE * (told - untold))
        seen.append(now)
    return torch.stack(seen)


def _between(start: float, end: float) -> list[float]:
    """Divide a step as the shifted schedule does: evenly before the shift."""
    first, last = (level / (SHIFT - (SHIFT - 1) * level) for level in (start, end))
    even = [first + (last - first) * index / _BETWEEN for index in range(_BETWEEN + 1)]
    return [SHIFT * level / (1 + (SHIFT - 1) * level) for level in even]


def _parts(prompts: list[str]) -> list[list[str]]:
    return [prompts[at : at + _TOGETHER] for at in range(0, len(prompts), _TOGETHER)]
