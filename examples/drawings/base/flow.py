"""Flow matching with a shift: the loss that bases and LoRAs are trained by."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch.nn.functional import mse_loss

from drawings.base.material import moved
from drawings.base.parts import SHIFT, encoded

_STEPS = 1000
#: Drawings that are encoded in one call.
_AT_ONCE = 64


def latents(pipe: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Encode drawings as the latents that the pipeline denoises.

    Args:
        pipe: a pipeline with an autoencoder.
        pictures: (pictures, 3, height, width) in [-1, 1].
    """
    with torch.no_grad():
        mode: torch.Tensor = pipe.vae.encode(pictures.to(pipe.device)).latent_dist.mode()
    return mode * pipe.vae.config.scaling_factor


def placed(pipe: Any, pictures: torch.Tensor, places: int) -> torch.Tensor:
    """Encode each drawing at several places, up to two pixels apart, before a training.

    Args:
        pipe: a pipeline with an autoencoder.
        pictures: (drawings, 3, height, width) in [-1, 1].
        places: encodings of each drawing.

    Returns:
        Latents, (places, drawings, channels, height, width), on the CPU.
    """
    parts = pictures.split(_AT_ONCE)
    return torch.stack(
        [torch.cat([latents(pipe, moved(some)).cpu() for some in parts]) for _ in range(places)]
    )


def levels(count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw noise levels to train at, in (0, 1): logit-normal, shifted towards noise."""
    u = compute_density_for_timestep_sampling("logit_normal", count, 0.0, 1.0, generator=generator)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def flow_loss(
    pipe: Any,
    clean: torch.Tensor,
    prompts: list[str],
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Compute the mean squared error of the predicted flow, noise - drawing.

    Each drawing is mixed with noise at a random level. Source: Esser et al., "Scaling
    Rectified Flow Transformers for High-Resolution Image Synthesis", 2024.

    Args:
        pipe: a pipeline; its denoiser and text encoder get gradients.
        clean: latents of drawings.
        prompts: of each drawing.
        generator: of noise and levels, on the CPU; torch's own if None. So every device trains
            on the same.
    """
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    sigma = levels(len(clean), generator).to(clean.device)
    at = sigma[:, None, None, None]
    states = encoded(pipe, prompts)
    noisy = at * noise + (1 - at) * clean
    flow = pipe.unet(noisy, _STEPS * sigma, encoder_hidden_states=states).sample
    return mse_loss(flow, noise - clean)
