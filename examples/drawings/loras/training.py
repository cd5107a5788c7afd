"""The training of one LoRA, with PEFT on the base's denoiser, saved as diffusers saves LoRAs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from drawings.base.flow import flow_loss, latents, placed

#: All linear layers of the attention blocks, and the convolutions of the residual blocks, which a
#: style needs to reach the finest level.
_LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2"),
]
_WARMUP, _EMPTY = 20, 0.1
#: Each drawing is encoded at so many places, once, before the training, if it is moved.
_PLACES = 8
#: The adapter that is being trained.
_ADAPTER = "trained"


@dataclass(frozen=True)
class Plan:
    """How a LoRA is trained."""

    updates: int
    batch: int = 4
    rank: int = 8
    rate: float = 1e-3
    """Highest learning rate; it falls to 0."""
    seed: int = 0
    moved: bool = True
    """Whether each drawing is seen at several places."""


def added_lora(pipe: StableDiffusionPipeline, rank: int) -> list[torch.nn.Parameter]:
    """Put a new LoRA on the pipeline's denoiser, and return its weights.

    Nothing else of the pipeline is trained.
    """
    pipe.text_encoder.requires_grad_(False)
    pipe.unet.requires_grad_(False).to(memory_format=torch.channels_last)
    layers = LoraConfig(r=rank, lora_alpha=rank, target_modules=_LAYERS)
    pipe.unet.add_adapter(layers, adapter_name=_ADAPTER)
    return [weight for weight in pipe.unet.parameters() if weight.requires_grad]


def train(
    pipe: StableDiffusionPipeline, pictures: Tensor, prompts: tuple[str, ...], plan: Plan
) -> float:
    """Train a new LoRA, which stays on the pipeline's denoiser until ``remove``.

    Args:
        pipe: the base.
        pictures: (drawings, 3, height, width) in [-1, 1].
        prompts: one per drawing.
        plan: the same plan gives the same LoRA.

    Returns:
        The loss, averaged over the latest updates.
    """
    torch.manual_seed(plan.seed)
    weights = added_lora(pipe, plan.rank)
    optimizer = torch.optim.AdamW(weights, lr=plan.rate, weight_decay=0.0, fused=True)
    if plan.moved:
        places = placed(pipe, pictures, _PLACES).to(pipe.device)
    else:
        places = latents(pipe, pictures).expand(_PLACES, -1, -1, -1, -1)
    mean = 0.0
    for update in range(plan.updates):
        for group in optimizer.param_groups:
            left = 1 - update / plan.updates
            group["lr"] = plan.rate * min(1.0, (update + 1) / _WARMUP) * left
        chosen = torch.randint(len(prompts), (plan.batch,))
        clean = places[torch.randint(_PLACES, (plan.batch,)), chosen]
        empty = torch.rand(plan.batch) < _EMPTY
        texts = ["" if e else prompts[i] for i, e in zip(chosen, empty, strict=True)]
        loss = flow_loss(pipe, clean, texts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        mean = loss.item() if update == 0 else 0.98 * mean + 0.02 * loss.item()
    return mean


def remove(pipe: StableDiffusionPipeline) -> None:
    """Take the LoRA off the pipeline again."""
    pipe.unet.unload_lora()


def save(pipe: StableDiffusionPipeline, path: Path) -> None:
    """Write the trained LoRA in float16, in the keys of diffusers and with PEFT's configuration."""
    tensors = get_peft_model_state_dict(pipe.unet, adapter_name=_ADAPTER)
    path.parent.mkdir(parents=True, exist_ok=True)
    new: Any = path.with_suffix(".new")
    StableDiffusionPipeline.save_lora_weights(
        new,
        {key: value.half().contiguous() for key, value in tensors.items()},
        weight_name=path.name,
        unet_lora_adapter_metadata=pipe.unet.peft_config[_ADAPTER].to_dict(),
    )
    (new / path.name).replace(path)
    new.rmdir()
