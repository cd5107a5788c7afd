"""The paired flow loss: how well a denoiser predicts the flow on a true drawing."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn.functional import mse_loss

_LEVELS = 1000


@torch.no_grad()
def paired_flow_loss(
    pipe: StableDiffusionPipeline, clean: Tensor, prompt: str, *, noises: int = 3, steps: int = 4
) -> float:
    """Compute the loss of the predicted flow on one drawing, with the same noises in every call.

    The pipeline runs its usual loop, so a schedule that follows its steps acts as it does in
    sampling. At each step the denoiser gets the drawing mixed with noise at the step's level,
    whatever it predicted before. Nothing is sampled and nothing is judged, so the loss orders
    rules with narrow intervals. What was *optimised* for it lost by the judges: never choose a
    rule by it alone.

    Args:
        clean: latents of the drawing, (1, channels, height, width).
        prompt: of the drawing, with its style.
        noises: drawn from seed 0.
        steps: of the loop; the levels and the progress at which the loss is taken.
    """
    noise = torch.randn(noises, *clean.shape[1:], generator=torch.Generator().manual_seed(0))
    noise = noise.to(clean)
    losses = []

    def mixed(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        _, level, *others = args
        sigma = level / _LEVELS
        return (sigma * noise + (1 - sigma) * clean, level, *others), kwargs

    def compared(module: Any, args: Any, output: Any) -> None:
        losses.append(mse_loss(output[0], noise - clean).item())

    hooks = (
        pipe.unet.register_forward_pre_hook(mixed, with_kwargs=True),
        pipe.unet.register_forward_hook(compared),
    )
    try:
        pipe(
            [prompt] * noises,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    finally:
        for hook in hooks:
            hook.remove()
    return sum(losses) / len(losses)
