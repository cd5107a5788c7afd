"""Teach the text encoder what the drawings look like, before the denoiser learns to draw them.

An untrained text encoder gives the denoiser nothing to hold on to: of 1,250 subjects it still knew
hardly any word after 12,000 updates. Models of real size have a text encoder that was trained
before. So this one is: from a prompt it predicts the mean of the latents that fit, which is what a
denoiser must know where there is noise alone. That costs minutes, as no denoiser is run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from torch.nn.functional import mse_loss, pixel_shuffle

from drawings.base.parts import encoded
from drawings.base.subjects import prompts

_BATCH, _PEAK = 64, 1e-3
_WARMUP, _COOLDOWN = 100, 0.3
#: The glance sees patches of so many latents in height and width.
_PATCH = 2


class Glance(nn.Module):
    """A picture from the hidden states of its prompt: one cross attention, and one MLP.

    Args:
        latent: channels, height and width of the latents.
        width: of the hidden states.
        heads: of the attention.
    """

    def __init__(self, latent: Sequence[int], width: int, heads: int = 6) -> None:
        super().__init__()
        channels, height, across = latent
        self._grid = (height // _PATCH, across // _PATCH)
        self.places = nn.Parameter(0.5 * torch.randn(math.prod(self._grid), width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.colours = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, channels * _PATCH**2),
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Predict latents, (prompts, channels, height, width), from (prompts, tokens, width)."""
        places = self.places.expand(len(states), -1, -1)
        seen, _ = self.attention(places, states, states, need_weights=False)
        drawn: torch.Tensor = self.colours(seen + places)
        return pixel_shuffle(drawn.transpose(1, 2).unflatten(2, self._grid), _PATCH)


def teach(
    pipe: StableDiffusionPipeline,
    clean: torch.Tensor,
    names: Sequence[tuple[str, str]],
    updates: int,
) -> float:
    """Train the pipeline's text encoder by itself.

    Args:
        pipe: with an untrained text encoder.
        clean: latents of all drawings, (drawings, channels, height, width).
        names: subject and style of each drawing.
        updates: of 64 drawings each.

    Returns:
        The share of the drawings' variance that their words do not tell, in the last tenth.
    """
    glance = Glance(clean.shape[1:], pipe.text_encoder.config.hidden_size).to(clean.device)
    weights = [*pipe.text_encoder.parameters(), *glance.parameters()]
    optimizer = torch.optim.AdamW(
        weights, lr=_PEAK, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    spread = clean.var(0, correction=0).mean().item()
    last: list[float] = []
    for update in range(updates):
        left = (updates - update) / max(1.0, _COOLDOWN * updates)
        for group in optimizer.param_groups:
            group["lr"] = _PEAK * min(1.0, (update + 1) / _WARMUP, left)
        chosen = torch.randint(len(names), (_BATCH,)).tolist()
        states = encoded(pipe, prompts([names[index] for index in chosen]))
        loss = mse_loss(glance(states), clean[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        last = [*last[-(updates // 10) :], loss.item()]
    return sum(last) / len(last) / spread
