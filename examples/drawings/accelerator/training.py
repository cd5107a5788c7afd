"""The distillation: one step of the LoRA covers what the base does in several guided ones.

Source: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022,
with the guidance taken into the student as in Meng et al., "On Distillation of Guided Diffusion
Models", 2023. Here the paths are made once, and several guided steps become one at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import mse_loss

from drawings.accelerator.trajectories import Trajectories
from drawings.base.arithmetic import arithmetic
from drawings.loras.training import added_lora


@dataclass(frozen=True)
class Plan:
    """How the LoRA is trained."""

    updates: int
    batch: int = 32
    """Paths per update, all at one step."""
    rank: int = 8
    rate: float = 1e-3
    """Highest learning rate; it falls to 0."""
    bfloat16: bool = False
    seed: int = 0


def distil(pipe: Any, seen: Trajectories, plan: Plan) -> float:
    """Train a LoRA that stays on the pipeline's denoiser until it is removed.

    Args:
        pipe: the base that made the paths.
        seen: the paths.
        plan: the same plan gives the same LoRA.

    Returns:
        The mean squared error of the flow, averaged over the latest updates.
    """
    torch.manual_seed(plan.seed)
    weights = added_lora(pipe, plan.rank)
    optimizer = torch.optim.AdamW(weights, lr=plan.rate, weight_decay=0.0, fused=True)
    steps, mean = len(seen.timesteps), 0.0
    for update in range(plan.updates):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * (1 - update / plan.updates)
        step = int(torch.randint(steps, ()))
        chosen = torch.randint(len(seen.states), (plan.batch,))
        at = seen.timesteps[step].expand(plan.batch)
        optimizer.zero_grad(set_to_none=True)
        with arithmetic(pipe.device.type, plan.bfloat16):
            flow = pipe.unet(
                seen.latents[step, chosen], at, encoder_hidden_states=seen.states[chosen]
            ).sample
            loss = mse_loss(flow, seen.flow(step, chosen))
            loss.backward()
        optimizer.step()
        mean = loss.item() if update == 0 else 0.99 * mean + 0.01 * loss.item()
    return mean
