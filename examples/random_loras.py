"""LoRAs with random weights that act about as strongly as trained ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from klora_runtime.artifact.delta import LowRank

_ADAPTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

#: Layers vary around the strength by up to this factor, so that some lean to one LoRA and some to
#: the other.
VARIATION = 3.0


def random_lora(
    models: Mapping[str, nn.Module],
    path: Path,
    adapts: Callable[[str], bool],
    *,
    seed: int,
    rank: int,
    strength: float,
) -> Path:
    """Write a LoRA in diffusers/PEFT keys, in the dtype of the weights.

    Args:
        models: component of the pipeline -> its model.
        adapts: returns whether to adapt the linear layer or convolution of a name.
        seed: seed of the numbers.
        rank: rank of every layer.
        strength: norm of each delta relative to the norm of its weight, before layers vary.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for component, model in models.items():
        for name, module in model.named_modules():
            if not isinstance(module, _ADAPTED) or not adapts(name):
                continue
            weight = module.weight.detach()
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            up = torch.randn(weight.shape[0], rank, *(1,) * (weight.dim() - 2), generator=generator)
            variation = VARIATION ** float(2 * torch.rand((), generator=generator) - 1)
            up *= strength * variation * float(weight.float().norm()) / LowRank(down, up).norm()
            tensors[f"{component}.{name}.lora_A.weight"] = down.to(weight.dtype)
            tensors[f"{component}.{name}.lora_B.weight"] = up.to(weight.dtype)
    save_file(tensors, str(path))
    return path
